"""`torch.nn.functional.scaled_mm` as a GPU has it, on a CPU: checks what torch 2.13 and cuBLAS 12.9 ask of their arguments,
and multiplies what the bytes mean, read one by one. torch itself is asked too, for the shape of the result on a GPU.

Sources: PyTorch, aten/src/ATen/native/cuda/ScaledBlas.cpp, and NVIDIA's page on cuBLAS, "narrow precision data types usage".
"""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import ScalingType, SwizzleType
from torch.nn.functional import scaled_mm as real_scaled_mm

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
WIDTHS = {ScalingType.BlockWise1x16: 16, ScalingType.BlockWise1x32: 32, ScalingType.BlockWise1x128: 128}
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def scaled_mm(
    mat_a: Tensor,
    mat_b: Tensor,
    scale_a: list[Tensor],
    scale_recipe_a: list[ScalingType],
    scale_b: list[Tensor],
    scale_recipe_b: list[ScalingType],
    swizzle_a: list[SwizzleType] | None = None,
    swizzle_b: list[SwizzleType] | None = None,
    bias: Tensor | None = None,
    output_dtype: torch.dtype | None = torch.bfloat16,
    contraction_dim: tuple[int, ...] = (),
    use_fast_accum: bool = False,
) -> Tensor:
    """mat_a [M, K], mat_b [K, N]."""
    assert bias is None
    assert not contraction_dim
    assert not use_fast_accum
    with FakeTensorMode():
        a, b = _on_gpu(mat_a), _on_gpu(mat_b)
        of_a, of_b = (list(map(_on_gpu, scales)) for scales in (scale_a, scale_b))
        shaped = real_scaled_mm(
            a, b, of_a, scale_recipe_a, of_b, scale_recipe_b, swizzle_a, swizzle_b, output_dtype=output_dtype
        )
    assert shaped.shape == (mat_a.shape[0], mat_b.shape[1])
    right = mat_b.T
    assert not (mat_a.dtype == right.dtype == torch.float8_e5m2), "two operands in E5M2"
    square = ScalingType.BlockWise128x128
    assert (scale_recipe_a[0], scale_recipe_b[0]) != (square, square), "128 x 128 by 128 x 128"
    a = numbers(mat_a, scale_a, scale_recipe_a, swizzle_a)
    b = numbers(right, scale_b, scale_recipe_b, swizzle_b)
    return (a @ b.T).to(output_dtype)


def _on_gpu(x: Tensor) -> Tensor:
    """No numbers, but all that is known of a tensor."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")


def numbers(codes: Tensor, scales: list[Tensor], ways: list[ScalingType], swizzles: list[SwizzleType]) -> Tensor:
    """What an operand [rows, K] is, in float64."""
    assert codes.is_contiguous(), "the sum runs along a stride"
    assert len(scales) == len(ways) == len(swizzles)
    values, way, scale = _values(codes), ways[0], scales[0]
    assert all(size % 16 == 0 for size in values.shape), "cuBLAS takes 16 bytes at a time"
    if way in (ScalingType.BlockWise1x128, ScalingType.BlockWise128x128):
        assert all(size % 128 == 0 for size in values.shape), "a block of 128 is cut"
    swizzled = SwizzleType.SWIZZLE_32_4_4 if way in (ScalingType.BlockWise1x16, ScalingType.BlockWise1x32) else None
    assert swizzles == [swizzled or SwizzleType.NO_SWIZZLE, *[SwizzleType.NO_SWIZZLE] * (len(ways) - 1)]
    if way == ScalingType.TensorWise:
        assert scale.dtype == torch.float32
        assert scale.numel() == 1
        assert len(scales) == 1
        return values * scale.double()
    if way == ScalingType.BlockWise128x128:
        return values * _of_squares(scale, values.shape)
    by_row = _of_rows(scale, values.shape, WIDTHS[way], bool(swizzled))
    if way != ScalingType.BlockWise1x16:
        assert len(scales) == 1
        return values * by_row
    assert ways[1] == ScalingType.TensorWise
    assert scales[1].dtype == torch.float32
    assert scales[1].numel() == 1
    assert values.shape[1] % 32 == 0, "cuBLAS takes 16 bytes at a time"
    return values * by_row * scales[1].double()


def _values(codes: Tensor) -> Tensor:
    if codes.dtype in FP8:
        return codes.double()
    assert codes.dtype == torch.float4_e2m1fn_x2
    rows = [
        [E2M1[half] for byte in row for half in (byte % 16, byte // 16)] for row in codes.view(torch.uint8).tolist()
    ]
    return torch.tensor(rows, dtype=torch.float64)


def _of_squares(scale: Tensor, shape: torch.Size) -> Tensor:
    rows, K = shape
    blocks = -(-K // 128)
    assert scale.dtype == torch.float32
    assert scale.shape == (-(-blocks // 4) * 4, -(-rows // 128)), scale.shape
    assert scale.stride() == (1, scale.shape[0]), scale.stride()
    table = scale.tolist()
    return torch.tensor([[table[k // 128][r // 128] for k in range(K)] for r in range(rows)], dtype=torch.float64)


def _of_rows(scale: Tensor, shape: torch.Size, width: int, swizzled: bool) -> Tensor:
    rows, columns = shape[0], -(-shape[1] // width)
    if not swizzled:
        assert scale.dtype == torch.float32
        assert scale.shape == (rows, columns)
        assert scale.stride() == (1, rows), scale.stride()
        table = scale.double()
    else:
        assert scale.dtype == {16: torch.float8_e4m3fn, 32: torch.float8_e8m0fnu}[width]
        table = unswizzled(scale, rows, columns).double()
    return table.repeat_interleave(width, 1)[:, : shape[1]]


def unswizzled(scale: Tensor, rows: int, columns: int) -> Tensor:
    """[rows, columns], fp32: one byte after the other, from the tile of 128 x 4 and the place in it where it must be."""
    tiles = -(-columns // 4)
    assert scale.is_contiguous()
    assert scale.numel() == -(-rows // 128) * tiles * 512
    flat = scale.float().flatten().tolist()
    out = torch.zeros(rows, columns)
    for r in range(rows):
        for c in range(columns):
            tile, row, column = (r // 128) * tiles + c // 4, r % 128, c % 4
            out[r, c] = flat[tile * 512 + (row % 32) * 16 + (row // 32) * 4 + column]
    return out
