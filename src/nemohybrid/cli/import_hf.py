"""`nemohybrid import-hf`: a Hugging Face folder becomes a checkpoint."""

import argparse
from pathlib import Path

EXAMPLE = """example:
  nemohybrid import-hf --input models/Nemotron-H-8B --output runs/imported
  nemohybrid generate --checkpoint runs/imported --prompt 'The sea'
  nemohybrid train init_from=runs/imported data.train=corpus run.name=continued"""


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = argparse.ArgumentParser(
        "nemohybrid import-hf",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = "a folder with config.json of type nemotron_h and *.safetensors"
    p.add_argument("--input", type=Path, required=True, metavar="FOLDER", help=source)
    target = "gets checkpoints/step_00000000: weights, tokenizer, no optimizer"
    p.add_argument("--output", type=Path, required=True, metavar="FOLDER", help=target)
    depth = "depths of multi-token prediction; 0: leave them out (default: the blocks that the folder stores)"
    p.add_argument("--mtp-depth", type=int, metavar="N", help=depth)
    eod = "ends a document (default: eos_token of tokenizer_config.json, <|endoftext|> or </s>)"
    p.add_argument("--eod-token", metavar="TOKEN", help=eod)
    return p


def main(argv: list[str]) -> int:
    """Read, write, say what there is now."""
    options = parser().parse_args(argv)
    from nemohybrid.interop.hf.checkpoints import import_checkpoint

    path, tokenizer = import_checkpoint(options.input, options.output, options.mtp_depth, options.eod_token)
    has = (
        "no tokenizer: it can be trained on, but cannot generate"
        if tokenizer is None
        else f"{tokenizer.vocab_size} ids"
    )
    print(f"imported {options.input} into {path} ({has})")
    print(f"generate:  nemohybrid generate --checkpoint {options.output} --prompt ...")
    print(f"train on:  nemohybrid train init_from={options.output} data.train=... run.dir=...")
    return 0
