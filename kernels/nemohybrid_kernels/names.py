"""The names of all backends, for who chooses one before torch is imported. Tests hold the operators to it."""

BACKENDS = {
    "mixer": ("triton", "cpp", "separate"),
    "ssd": ("triton", "mamba_ssm", "cpp", "torch"),
    "conv1d": ("triton", "causal_conv1d", "cpp", "torch"),
    "attention": ("sdpa", "flash3", "flash4", "flash2", "flex", "cudnn", "cpp", "torch"),
    "norm": ("triton", "cpp", "torch"),
    "activation": ("triton", "cpp", "torch"),
    "cross_entropy": ("triton", "torch", "plain"),
    "moe": ("triton", "grouped", "torch"),
}
"""Operator -> its backends, in the order in which "auto" tries them."""

WITHOUT_SOFTCAP = ("sdpa", "flash4", "cudnn", "cpp")
"""Backends of attention that cannot cap scores, or not backwards."""
