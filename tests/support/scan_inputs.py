"""Arguments of a scan, small and random."""

import torch


def scan_inputs(batch=2, L=21, H=4, P=8, G=2, N=6, dtype=torch.float64, documents=False, state=True, seed=0):
    """Random inputs of a scan; x, B and C in `dtype`, the rest in fp32 (fp64 for fp64)."""
    g = torch.Generator().manual_seed(seed)
    maths = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    inputs = {
        "x": normal(batch, L, H, P).to(dtype),
        "dt": torch.nn.functional.softplus(normal(batch, L, H) - 1).to(maths),
        "A": (-torch.exp(normal(H))).to(maths),
        "B": normal(batch, L, G, N).to(dtype),
        "C": normal(batch, L, G, N).to(dtype),
        "D": normal(H).to(maths),
    }
    if documents:
        inputs["document_ids"] = torch.randint(0, 3, (batch, L), generator=g)  # repeats, disorder, single tokens
    if state:
        inputs["initial_state"] = normal(batch, H, P, N).to(maths)
    return inputs


def in_double(inputs):
    return {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
