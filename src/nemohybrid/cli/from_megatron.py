"""`nemohybrid from-megatron FILE`: the overrides that say what an argument list of Megatron-LM says."""

import argparse
from pathlib import Path

from nemohybrid.interop.megatron.output import as_command, as_experiment
from nemohybrid.interop.megatron.translate import translate

EXAMPLE = """FILE is a shell script, the model_config.yaml of a functional test (MODEL_ARGS), or the dump of a Megatron-Bridge
recipe (.yaml, .json). It is read, never executed. Every argument without a counterpart is named, with the reason.

examples:
  nemohybrid from-megatron pretrain_hybrid.sh
  nemohybrid from-megatron model_config.yaml --yaml > configs/experiment/mine.yaml
"""


def main(argv: list[str]) -> int:
    """Print the translation of a file; 0 when it could be read. Raises ConfigError otherwise."""
    args = build_parser().parse_args(argv)
    now = translate(args.file)
    print(as_experiment(now, args.file.name) if args.yaml else as_command(now), end="")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The options of `nemohybrid from-megatron`."""
    parser = argparse.ArgumentParser(
        prog="nemohybrid from-megatron",
        description="Translate arguments of Megatron-LM into overrides.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="where the arguments stand")
    parser.add_argument("--yaml", action="store_true", help="print an experiment file instead of a command line")
    return parser
