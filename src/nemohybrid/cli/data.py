"""`nemohybrid data ...`: turn text into a corpus that a run can read."""

import argparse
from collections.abc import Iterator
from pathlib import Path

from nemohybrid.data.info import CorpusInfo
from nemohybrid.data.prepare import prepare
from nemohybrid.data.text import read_documents
from nemohybrid.data.tokenizer import Tokenizer, make_tokenizer

EXAMPLE = """example:
  nemohybrid data prepare --input books/*.jsonl --output corpus/train --tokenizer bpe:32000
  nemohybrid data prepare --input held_out.jsonl --output corpus/valid --tokenizer corpus/train.tokenizer
"""


def main(argv: list[str]) -> int:
    """Run `nemohybrid data` on `argv`; 0 when done. Raises DataError for what cannot be read or written."""
    args = build_parser().parse_args(argv)
    tokenizer = make_tokenizer(args.tokenizer, lambda: _texts(args), args.eod_token)
    info = prepare(args.input, args.output, tokenizer, args.text_field, args.separator)
    tokenizer.save(f"{args.output}.tokenizer")
    print(summary(args.output, info, tokenizer))
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The options of `nemohybrid data`."""
    parser = argparse.ArgumentParser(prog="nemohybrid data", description="Work with training text.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    prepare_parser = commands.add_parser(
        "prepare",
        help="text or jsonl -> Megatron .bin/.idx",
        description="Encode text and jsonl files into one corpus in Megatron's .bin/.idx format.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = prepare_parser.add_argument
    add("--input", nargs="+", type=Path, required=True, metavar="FILE", help=".jsonl / .ndjson, or UTF-8 text")
    add(
        "--output",
        required=True,
        metavar="PREFIX",
        help="writes PREFIX.bin, .idx, .json and the folder PREFIX.tokenizer",
    )
    add("--tokenizer", required=True, metavar="SPEC", help="byte, bpe:SIZE (trained on the input), or a tokenizer.json")
    add("--eod-token", metavar="TOKEN", help="ends a document (default: the tokenizer's own, <|endoftext|> or </s>)")
    add("--text-field", default="text", metavar="NAME", help="jsonl: the field that holds the text (default: text)")
    add(
        "--separator",
        metavar="LINE",
        help="text: a line that ends a document, '' for a blank one (default: a file is one)",
    )
    return parser


def summary(prefix: str, info: CorpusInfo, tokenizer: Tokenizer) -> str:
    """What was made, for people."""
    skipped = f" ({info.empty_documents_skipped:,} empty left out)" if info.empty_documents_skipped else ""
    return (
        f"{prefix}.bin, .idx, .json: {info.documents:,} documents{skipped}, {info.tokens:,} tokens\n"
        f"  {info.text_bytes:,} bytes of text, {info.text_bytes / info.tokens:.2f} bytes per token\n"
        f"{prefix}.tokenizer: {tokenizer.vocab_size:,} ids, documents end with {tokenizer.eod}"
    )


def _texts(args: argparse.Namespace) -> Iterator[str]:
    for path in args.input:
        for document in read_documents(path, args.text_field, args.separator):
            yield document.text
