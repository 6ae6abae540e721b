"""`nemohybrid generate`: continue prompts from a checkpoint."""

import argparse
import sys
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

EXAMPLE = """example:
  nemohybrid generate --checkpoint runs/quickstart --prompt 'ROMEO.' --prompt 'Enter' --max-new-tokens 200"""


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = argparse.ArgumentParser(
        "nemohybrid generate", description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--checkpoint", type=Path, required=True, help="a checkpoint, or a run folder (its newest sound one)"
    )
    p.add_argument("--prompt", action="append", required=True, help="give it again for a batch")
    p.add_argument("--max-new-tokens", type=_positive, default=200)
    p.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default 0.8)")
    p.add_argument("--greedy", action="store_true", help="the same as --temperature 0")
    p.add_argument("--top-k", type=int, default=0, help="sample among this many tokens; 0: all")
    p.add_argument("--top-p", type=float, default=1.0, help="sample among the most likely tokens with this probability")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: as it was trained")
    p.add_argument(
        "--speculative",
        nargs="?",
        type=_positive,
        const=0,
        metavar="N",
        help="draft N tokens a step with the MTP blocks (default: their depths), prompt by prompt; the text is that of "
        "plain decoding, in bfloat16 but for near ties",
    )
    p.add_argument("--no-stream", action="store_true", help="print when all is done; a batch is never streamed")
    return p


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(text)


def main(argv: list[str]) -> int:
    """Load, generate, print."""
    options = parser().parse_args(argv)
    from nemohybrid.generate.load import load_for_inference
    from nemohybrid.generate.sampling import Sampling
    from nemohybrid.parallel.world import choose_device

    sampling = Sampling(0.0 if options.greedy else options.temperature, options.top_k, options.top_p)
    model, tokenizer = load_for_inference(options.checkpoint, choose_device(options.device, 0), options.dtype)
    write = _plain if options.speculative is None else _speculative
    write(model, tokenizer, options, sampling)
    return 0


def _plain(model, tokenizer, options: argparse.Namespace, sampling) -> None:
    """All prompts in one batch, a token at a time."""
    from nemohybrid.generate.engine import encode_prompt, generate_text, stream_tokens

    if _streams(options):
        prompts = [encode_prompt(tokenizer, prompt) for prompt in options.prompt]
        tokens = stream_tokens(model, prompts, options.max_new_tokens, sampling, options.seed)
        _print_stream(options.prompt[0], tokenizer, takewhile(tokenizer.eod.__ne__, (token for (token,) in tokens)))
    else:
        _print_all(generate_text(model, tokenizer, options.prompt, options.max_new_tokens, sampling, options.seed))


def _speculative(model, tokenizer, options: argparse.Namespace, sampling) -> None:
    """Prompt by prompt, several tokens a step; what became of the drafts goes to stderr."""
    from nemohybrid.generate.engine import encode_prompt
    from nemohybrid.generate.speculative import SpeculativeDecoder

    decoder = SpeculativeDecoder(model, sampling, options.speculative or None, options.seed)
    if _streams(options):
        prompt = encode_prompt(tokenizer, options.prompt[0])
        _print_stream(options.prompt[0], tokenizer, decoder.stream(prompt, options.max_new_tokens, tokenizer.eod))
    else:
        _print_all(decoder.texts(tokenizer, options.prompt, options.max_new_tokens))
    print(f"speculative decoding: {decoder.acceptance}", file=sys.stderr)


def _streams(options: argparse.Namespace) -> bool:
    return len(options.prompt) == 1 and not options.no_stream


def _print_all(texts: list[str]) -> None:
    for number, text in enumerate(texts, 1):
        print(f"----- {number} -----\n{text}" if len(texts) > 1 else text)


def _print_stream(prompt: str, tokenizer, tokens: Iterator[int]) -> None:
    """Print each character as soon as its bytes are complete."""
    from nemohybrid.data.tokenizer import StreamingDecoder

    print(prompt, end="", flush=True)
    decoder = StreamingDecoder(tokenizer)
    for token in tokens:
        sys.stdout.write(decoder.push(token))
        sys.stdout.flush()
    print(decoder.finish())
