"""What a device could do at best, to compare with what it does."""

PEAK_BF16 = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100": 989.4e12,
    "A100": 312e12,
}
"""Dense bf16 FLOP/s from NVIDIA's data sheets (never the figure with sparsity); SXM boards where the name does not say."""


def peak_flops(device_name: str, override_tflops: float | None = None) -> float | None:
    """Peak FLOP/s of a device by its name, e.g. "NVIDIA H100 80GB HBM3"; None when unknown, as for CPUs."""
    if override_tflops:
        return override_tflops * 1e12
    return next((peak for name, peak in PEAK_BF16.items() if name in device_name), None)
