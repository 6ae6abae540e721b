"""What tune_kernels.py tries: for each kernel of the table, values of each tile, of warps and of stages."""

from collections.abc import Iterator, Mapping
from itertools import product

from nemohybrid_kernels.launching import Config

Space = Mapping[str, list[int]]
_CONV: Space = {"BLOCK_C": [64, 128, 256], "UNROLL": [2, 4, 8], "warps": [1, 2, 4], "stages": [1]}
_DECAYS: Space = {"HEADS": [4, 8, 16], "warps": [4, 8], "stages": [1]}
_HEADS: Space = {"HEADS": [4, 8, 16], "warps": [4, 8], "stages": [1, 2, 3]}
_ROWS: Space = {"ELEMENTS": [1024, 2048, 4096, 8192], "warps": [4, 8, 16], "stages": [1]}
_LOGITS: Space = {"BLOCK": [2048, 4096, 8192, 16384], "warps": [4, 8, 16], "stages": [1]}

SPACES: dict[str, Space] = {
    "conv1d_forward": _CONV,
    "conv1d_backward": _CONV,
    "norm_forward": {"ELEMENTS": [2048, 4096, 8192], "warps": [4, 8, 16], "stages": [1]},
    "norm_backward": {"ELEMENTS": [1024, 2048, 4096, 8192], "warps": [4, 8, 16, 32], "stages": [1]},
    "cross_entropy_rows": _LOGITS,
    "cross_entropy_gradient": _LOGITS,
    "moe_permute": _ROWS,
    "moe_unpermute": _ROWS,
    "relu2_forward": _ROWS,
    "relu2_backward": _ROWS,
    "ssd_chunk": {"CHUNK": [64, 128], "warps": [4], "stages": [1]},
    "ssd_decays": _DECAYS,
    "ssd_decays_backward": _DECAYS,
    "ssd_states": {"BLOCK_N": [32, 64, 128], "BLOCK_P": [32, 64], "warps": [4, 8], "stages": [1, 2, 3]},
    "ssd_scan": {"ROWS": [16, 32, 64, 128], **_HEADS},
    "ssd_pair_gradients": {"ROWS": [16, 32, 64], **_HEADS},
    "ssd_group_gradients": {"ROWS": [32, 64], "BLOCK_N": [32, 64, 128], "warps": [4, 8], "stages": [1, 2, 3]},
}
"""ssd_chunk is no kernel: the length of chunks, which all kernels of the scan share."""


def candidates(kernel: str, current: Config) -> Iterator[Config]:
    """The current configuration, and all others of its space."""
    yield current
    names = list(SPACES[kernel])
    for values in product(*SPACES[kernel].values()):
        tiles = dict(zip(names, values, strict=True))
        found = Config(warps=tiles.pop("warps"), stages=tiles.pop("stages"), tiles=tiles)
        if found != current:
            yield found
