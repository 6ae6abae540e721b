"""`nemohybrid export-hf`: a checkpoint becomes a Hugging Face folder."""

import argparse
import re
from pathlib import Path

EXAMPLE = """example:
  nemohybrid export-hf --checkpoint runs/quickstart --output exported --dtype bfloat16"""
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = argparse.ArgumentParser(
        "nemohybrid export-hf",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "--checkpoint", type=Path, required=True, help="a checkpoint, or a run folder (its newest sound one)"
    )
    p.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="must be absent or empty")
    dtype = "what matrices are stored in (default float32); A_log, D, dt_bias and routers stay float32"
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help=dtype)
    shard = "cut weights into files of at most this size (default 5GB)"
    p.add_argument("--max-shard-size", type=size, default=size("5GB"), metavar="SIZE", help=shard)
    return p


def size(text: str) -> int:
    """`500MB` -> 500,000,000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)", text)
    if not match or match[2].upper() not in UNITS or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text} is no size. Legal: 5GB, 500MB, 2GiB, a number of bytes")
    return int(float(match[1]) * UNITS[match[2].upper()])


def main(argv: list[str]) -> int:
    """Check the checkpoint, write the folder."""
    options = parser().parse_args(argv)
    from nemohybrid.checkpoint import verify
    from nemohybrid.generate.load import find_checkpoint
    from nemohybrid.interop.hf.checkpoints import export_checkpoint
    from nemohybrid.model.hybrid import DTYPES

    checkpoint = find_checkpoint(options.checkpoint)
    if checkpoint == options.checkpoint:  # of a run folder, the newest is sought by its hashes
        verify(checkpoint)
    export_checkpoint(checkpoint, options.output, DTYPES[options.dtype], options.max_shard_size)
    written = sum(file.stat().st_size for file in options.output.iterdir())
    print(f"exported {checkpoint} to {options.output} ({written / 1e6:,.1f} MB, {options.dtype})")
    if (options.output / "tokenizer.model").is_file():
        print(
            "tokenizer.model is a SentencePiece model; transformers converts it and may give other ids than training did"
        )
    return 0
