"""`nemohybrid data ...`: turn text into a corpus that a run can read, and look into one."""

import argparse
import sys
from pathlib import Path

from nemohybrid.data.corpus import Corpus
from nemohybrid.data.inspect import describe, printable, show_document, tokenizer_of_corpus
from nemohybrid.data.prepare import Prepared, PrepareOptions, prepare
from nemohybrid.data.readers import Reading
from nemohybrid.data.trained import TRAIN_BYTES
from nemohybrid.data.workers import usable_cores
from nemohybrid.errors import DataError

PREPARE_EXAMPLE = """examples:
  nemohybrid data prepare --input books/*.jsonl --output corpus/train --tokenizer bpe:32000
  nemohybrid data prepare --input web/*.jsonl.zst --output corpus/web --tokenizer llama/tokenizer.model --workers 16
  nemohybrid data prepare --input held_out.jsonl --output corpus/valid --tokenizer corpus/train.tokenizer

The same command goes on after an interruption: what is done lies in PREFIX.parts until the corpus is whole.
"""
INSPECT_EXAMPLE = """examples:
  nemohybrid data inspect corpus/train
  nemohybrid data inspect corpus/train --document 0 -1
  nemohybrid data inspect megatron_corpus_text_document --tokenizer tokenizer.json --document 7
"""


def main(argv: list[str]) -> int:
    """Run `nemohybrid data` on `argv`; 0 when done, 130 when interrupted. Raises DataError for what cannot be done."""
    args = build_parser().parse_args(argv)
    return args.run(args)


def build_parser() -> argparse.ArgumentParser:
    """The options of `nemohybrid data`."""
    parser = argparse.ArgumentParser(prog="nemohybrid data", description="Work with training text.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_prepare(commands)
    _add_inspect(commands)
    return parser


def summary(prefix: str, prepared: Prepared) -> str:
    """What was made, for people."""
    info, tokenizer = prepared.info, prepared.tokenizer
    left_out = {"empty": info.empty_documents_skipped, "damaged": info.damaged_documents_skipped}
    skipped = ", ".join(f"{count:,} {kind}" for kind, count in left_out.items() if count)
    speed = prepared.read_bytes / 1e6 / max(prepared.seconds, 1e-9)
    return (
        f"{prefix}.bin, .idx, .json: {info.documents:,} documents{f' ({skipped} left out)' if skipped else ''}, "
        f"{info.tokens:,} tokens\n"
        f"  {info.text_bytes:,} bytes of text, {info.text_bytes / info.tokens:.2f} bytes per token\n"
        f"{prefix}.tokenizer: {tokenizer.vocab_size:,} ids, documents end with {tokenizer.eod}\n"
        f"read {prepared.read_bytes:,} bytes in {prepared.seconds:.1f} s, {speed:.1f} MB/s"
    )


def warnings(prepared: Prepared) -> list[str]:
    """What people should know of a corpus that was made all the same."""
    info, lines = prepared.info, []
    if count := info.damaged_documents_skipped:
        more = [f"  and {count - len(prepared.damages):,} more"] if count > len(prepared.damages) else []
        lines += [f"{count:,} damaged documents were left out:", *(f"  {place}" for place in prepared.damages), *more]
    if info.unknown_tokens:
        lines.append(
            f"{info.unknown_tokens:,} of {info.tokens:,} tokens are unknown: the tokenizer cannot spell that text"
        )
    return lines


def _add_prepare(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "prepare",
        help="text, jsonl or parquet -> Megatron .bin/.idx",
        description="Encode files into one corpus in Megatron's .bin/.idx format.",
        epilog=PREPARE_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=_prepare)
    add = parser.add_argument
    files = ".jsonl / .ndjson, .parquet, or UTF-8 text; also compressed, as .jsonl.zst or .txt.gz"
    add("--input", nargs="+", type=Path, required=True, metavar="FILE", help=files)
    writes = "writes PREFIX.bin, .idx, .json and the folder PREFIX.tokenizer"
    add("--output", required=True, metavar="PREFIX", help=writes)
    specs = "byte, bpe:SIZE (trained on the input), a tokenizer.json, or a SentencePiece tokenizer.model"
    add("--tokenizer", required=True, metavar="SPEC", help=specs)
    add("--eod-token", metavar="TOKEN", help="ends a document (default: the tokenizer's own, <|endoftext|> or </s>)")
    add("--text-field", default="text", metavar="NAME", help="jsonl, parquet: where the text is (default: text)")
    separator = "text: a line that ends a document, '' for a blank one (default: a file is one)"
    add("--separator", metavar="LINE", help=separator)
    on_error = "a document that cannot be read: stop there (default), or skip it and say so at the end"
    add("--on-error", choices=("stop", "skip"), default="stop", help=on_error)
    add("--workers", type=_positive, metavar="N", help="processes that encode (default: the cores they may use)")
    train_bytes = f"of text that bpe:SIZE learns from, evenly from all files (default: {TRAIN_BYTES})"
    add("--train-bytes", type=_positive, default=TRAIN_BYTES, metavar="N", help=train_bytes)


def _add_inspect(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "inspect",
        help="what a corpus is, and what its documents say",
        description="Describe a corpus, or decode some of its documents.",
        epilog=INSPECT_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=_inspect)
    parser.add_argument("prefix", metavar="PREFIX", help="the corpus, without .bin or .idx")
    documents = "print these documents, counted from 0, or from the end with -1, -2"
    parser.add_argument("--document", nargs="+", type=int, metavar="N", help=documents)
    tokenizer = "decodes the ids (default: PREFIX.tokenizer)"
    parser.add_argument("--tokenizer", metavar="SPEC", help=tokenizer)
    parser.add_argument("--ids", action="store_true", help="print token ids instead of text")


def _prepare(args: argparse.Namespace) -> int:
    options = PrepareOptions(
        reading=Reading(args.text_field, args.separator),
        skip_damaged=args.on_error == "skip",
        eod_token=args.eod_token,
        train_bytes=args.train_bytes,
        workers=args.workers or usable_cores(),
    )
    try:
        prepared = prepare(args.input, args.output, args.tokenizer, options)
    except KeyboardInterrupt:
        parts = Path(f"{args.output}.parts")
        kept = f"the same command goes on from {parts}" if parts.is_dir() else "nothing was done yet"
        print(f"\nstopped; {kept}", file=sys.stderr)
        return 130
    print(summary(args.output, prepared))
    for line in warnings(prepared):
        print(line, file=sys.stderr)
    return 0


def _inspect(args: argparse.Namespace) -> int:
    corpus = Corpus(args.prefix)
    tokenizer = None if args.ids else tokenizer_of_corpus(corpus, args.tokenizer)
    if args.document and not tokenizer and not args.ids:
        raise DataError(f"no tokenizer is known for {args.prefix}: give --tokenizer SPEC, or --ids to see token ids")
    if args.document is None:
        print(describe(corpus, tokenizer))
    for number in args.document or ():
        shown = show_document(corpus, number, tokenizer)
        print(printable(shown) if sys.stdout.isatty() else shown)  # a file gets the text as it is
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value
