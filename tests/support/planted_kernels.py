"""Kernels with faults that compiling ahead of time must find. Run as a program, it prints as JSON what was found.

Not imported by tests: they run under TRITON_INTERPRET=1, where nothing can be compiled.
"""

import json

import torch
import triton
import triton.language as tl

from nemohybrid_kernels import ahead_of_time
from nemohybrid_kernels.launching import Config, Launch


@triton.jit
def product(a, b, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    left = tl.load(a + m[:, None] * K + k[None, :])
    right = tl.load(b + k[:, None] * N + n[None, :])
    tl.store(out + m[:, None] * N + n[None, :], tl.dot(left, right).to(out.dtype.element_ty))


@triton.jit
def sums(a, out, SIZE: tl.constexpr):
    """All of a tile is needed after all of it is read."""
    i = tl.arange(0, SIZE)
    values = tl.load(a + i)
    tl.store(out + i, values * tl.sum(values, 0) + tl.cumsum(values, 0))


@triton.jit
def arguments(t, aligned, one, sixteen, three, wide, real, flag, nothing, SIZE: tl.constexpr):
    tl.store(t + tl.arange(0, SIZE), tl.load(aligned + tl.arange(0, SIZE)) * real + one + sixteen + three + wide)


def new(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def products(M, N, K, warps):
    tiles = {"M": M, "N": N, "K": K}
    return Launch(product, (1,), Config(tiles, warps, 1), {"a": new(M, K), "b": new(K, N), "out": new(M, N)})


def of_sums(size, warps):
    vectors = {name: new(size, dtype=torch.float32) for name in ("a", "out")}
    return Launch(sums, (1,), Config({"SIZE": size}, warps, 1), vectors)


LAUNCHES = {
    "sound on 90": (products(64, 64, 64, 4), 90),
    "sound on 80": (products(64, 64, 64, 4), 80),
    "sound on 100": (products(128, 64, 64, 4), 100),
    "two warps": (products(64, 64, 64, 2), 90),
    "too much shared memory": (products(256, 256, 256, 8), 80),
    "too many registers": (of_sums(32768, 4), 90),
}


def found(launch, architecture):
    resources = ahead_of_time.compile_launch(launch, architecture)
    return resources.faults(architecture, ahead_of_time.compilation_of(launch, architecture).dtype)


def specialisation():
    """Of one argument of every kind: its type, and what else is known."""
    row = new(64)
    given = {"t": row[1:33], "aligned": row[8:40], "one": 1, "sixteen": 16, "three": 3, "wide": 2**40, "real": 2.5}
    launch = Launch(arguments, (1,), Config({"SIZE": 32}, 4, 1), {**given, "flag": True, "nothing": None})
    compilation = ahead_of_time.compilation_of(launch, 90)
    names = list(compilation.signature)
    divisible = [names[path[0]] for path, attributes in compilation.attributes.items() if attributes]
    return {"signature": compilation.signature, "divisible": divisible}


def from_the_folder():
    """What was compiled once is not compiled again."""
    ahead_of_time._compile = lambda compilation: 1 / 0
    return found(*LAUNCHES["two warps"])


if __name__ == "__main__":
    report = {name: found(*launch) for name, launch in LAUNCHES.items()}
    print(json.dumps({"faults": report, "again": from_the_folder(), **specialisation()}))
