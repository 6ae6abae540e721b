"""What kernels of the scan do on a GPU and not in the interpreter. Run as a program, it prints as JSON what was found.

Products of large numbers in 32 bits: in rows so long, and so many, that a few times a stride leaves 32 bits though the stride
itself does not. Minima and maxima, which drop NaN, with a limit of time steps and without. Nothing runs: the code that Triton
makes of each launch is read.
"""

import json
import re

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import JITFunction

from nemohybrid_kernels import ahead_of_time
from nemohybrid_kernels.launching import Launch, compiler_options, recording
from nemohybrid_kernels.ssd.triton import Call, backward, forward
from nemohybrid_kernels.ssd.triton.launch import decays_of

BATCH, L, H, P, G, N = 32, 80_000, 128, 16, 8, 256
FROM = 2**24
"""Smaller numbers meet only places in a tile, fewer than 128."""
PRODUCT = re.compile(r"arith\.muli %(\w+), %(\w+)(?: loc\(.*\))? : i32")


def launches() -> list[Launch]:
    """Forward and backward in fp32, with chunks of 128 in eight tiles."""

    def new(*shape: int) -> torch.Tensor:
        return torch.empty(BATCH, L, *shape, device="meta")

    of_heads = torch.empty(H, device="meta")
    call = Call(new(H, P), new(H), of_heads, new(G, N), new(G, N), of_heads, chunk_size=128)
    with recording(90) as found:
        y, state, _ = forward(call)
        backward(call, y, state)
    return found


def code(launch: Launch) -> str:
    """Triton's own representation, before any optimisation and with all that is called in it."""
    from triton._C.libtriton import ir

    compilation, target = ahead_of_time.compilation_of(launch, 90), GPUTarget("cuda", 90, 32)
    backend, context = make_backend(target), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    options = backend.parse_options(compiler_options(launch.config))
    functions = backend.get_codegen_implementation(options), backend.get_module_map()
    return str(ahead_of_time._source(compilation).make_ir(target, options, *functions, context))


def narrow_products(launch: Launch) -> list[str]:
    large = {name for name, value in launch.arguments.items() if isinstance(value, int) and FROM <= value < 2**31}
    return [name for pair in PRODUCT.findall(code(launch)) for name in pair if name in large or name == "stride"]


def extremes_of_decays(limit: tuple[float, float] | None) -> int:
    x, of_heads = torch.empty(1, 64, 2, 16, device="meta"), torch.empty(2, device="meta")
    call = Call(x, x[..., 0], of_heads, x, x, bias=of_heads, softplus=True, limit=limit)
    with recording(90) as found:
        decays_of(call)
    return len(re.findall(r"arith\.(?:max|min)numf", code(found[0])))


if __name__ == "__main__":
    assert all(isinstance(launch.kernel, JITFunction) for launch in launches())
    found = {
        "narrow": {launch.kernel.__name__: narrow_products(launch) for launch in launches()},
        "extremes": [extremes_of_decays(None), extremes_of_decays((0.001, 0.1))],
    }
    print(json.dumps(found))
