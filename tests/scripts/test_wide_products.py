"""bf16 products in fp32: the very numbers of a product that is rounded once, forward and backward, and nothing else changed."""

import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "scripts" / "bench"
CHECK = """
import torch, wide_products
a, b = torch.randn(3, 40, 50).bfloat16(), torch.randn(3, 50, 60).bfloat16()
singles = torch.randn(7, 50), torch.randn(50, 9)
before = singles[0] @ singles[1]
torch.ops.mkldnn._is_mkldnn_bf16_supported = lambda: False
assert wide_products.install()
assert torch.equal(a[0] @ b[0], (a[0].float() @ b[0].float()).bfloat16())
assert torch.equal(torch.bmm(a, b), torch.stack([(x.float() @ y.float()).bfloat16() for x, y in zip(a, b)]))
assert torch.equal(torch.mm(a[0], b[0], out=torch.empty(40, 60).bfloat16()), a[0] @ b[0])
assert torch.allclose(singles[0] @ singles[1], before, atol=1e-6)
leaf = a[0].clone().requires_grad_()
(leaf @ b[0]).sum().backward()
assert torch.equal(leaf.grad, (torch.ones(40, 60) @ b[0].float().T).bfloat16())
torch.ops.mkldnn._is_mkldnn_bf16_supported = lambda: True
assert not wide_products.install()
"""


def test_products_are_rounded_once():
    """In a process of its own, whose operators they replace."""
    run = subprocess.run([sys.executable, "-c", CHECK], cwd=BENCH, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
