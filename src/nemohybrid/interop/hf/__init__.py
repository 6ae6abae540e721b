"""Hugging Face NemotronH folders in and out.

    model = load_hf("models/Nemotron-H-8B", dtype=torch.bfloat16, device="cuda")
    save_hf(model, "export", dtype=torch.bfloat16)

`time_step_min` is a floor of the time steps that transformers 5.23 applies in training and prefill but not when decoding;
Megatron, the hub configs' `time_step_limit` (0, inf) and we apply none. What we export sets it to 1e-30.
"""

from nemohybrid.interop.hf.load import load_hf
from nemohybrid.interop.hf.save import save_hf

__all__ = ["load_hf", "save_hf"]
