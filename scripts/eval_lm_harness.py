"""Score a checkpoint with lm-evaluation-harness on local text, and with our own evaluator on the same documents.

Both see each document after an eod, in windows of the training's sequence length (`data.valid_windows=documents`). Run it
by `scripts/eval_lm_harness.sh`, which forbids every library to look for anything outside this machine.
"""

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nemohybrid.checkpoint import verify
from nemohybrid.config.run_config import RunConfig
from nemohybrid.config.yaml import read_config_yaml
from nemohybrid.data.document_windows import CorpusDocuments, DocumentWindows
from nemohybrid.data.tokenizer import Tokenizer
from nemohybrid.errors import ConfigError, DataError, NemohybridError
from nemohybrid.generate.load import find_checkpoint, load_for_inference
from nemohybrid.interop.hf.checkpoints import export_checkpoint
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.parallel.world import choose_device
from nemohybrid.train.batch import Batch
from nemohybrid.train.data import find_sources
from nemohybrid.train.evaluation import evaluate

TOLERANCE = 1e-6
TASK = "nemohybrid_text"


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = argparse.ArgumentParser("eval_lm_harness.sh", description=__doc__)
    p.add_argument("run", type=Path, help="a checkpoint, or a run folder (its newest sound one)")
    data = "jsonl with a field `text` (default: the validation text of the run)"
    p.add_argument("--data", type=Path, action="append", metavar="FILE", help=data)
    p.add_argument("--output", type=Path, metavar="DIR", help="must be absent or empty (default: RUN-lm-eval)")
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Export, score twice, compare."""
    options = parser().parse_args(argv)
    if importlib.util.find_spec("lm_eval") is None:  # before anything is written
        raise ConfigError("lm-evaluation-harness is not installed: pip install 'nemohybrid[eval]'")
    checkpoint = find_checkpoint(options.run)
    if checkpoint == options.run:
        verify(checkpoint)
    device = choose_device(options.device, 0)
    config = read_config_yaml(checkpoint / "config.yaml")
    model, tokenizer = load_for_inference(checkpoint, device, "float32")
    output = options.output or options.run.with_name(options.run.name + "-lm-eval")
    texts = list(texts_of_files(options.data) if options.data else texts_of_run(config, output / "data", tokenizer))
    documents = [encode_exactly(text, tokenizer) for text in texts]
    export_checkpoint(checkpoint, output / "model")

    theirs = harness_score(texts, output, config.data.sequence_length, tokenizer.eod, options.batch_size, str(device))
    windows = DocumentWindows(documents, config.data.sequence_length, tokenizer)
    ours = our_score(model, windows, ParallelContext.single(device), options.batch_size)
    results = {"checkpoint": str(checkpoint), "documents": len(texts), "lm_eval": theirs, "nemohybrid": ours}
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"bits per byte of {len(texts)} documents: lm-evaluation-harness {theirs:.9f}, nemohybrid {ours:.9f}")
    if abs(theirs - ours) <= TOLERANCE:
        return 0
    print(f"they differ by {abs(theirs - ours):.1e}, more than {TOLERANCE:.0e}", file=sys.stderr)
    return 1


def texts_of_files(files: Sequence[Path]) -> Iterator[str]:
    """The documents of jsonl files. Lines end with a newline alone: a JSON text may hold other separators as they are."""
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
            if line.strip():
                yield _text_of(line, f"{file}, line {number}")


def _text_of(line: str, where: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{where}: no JSON object with a field 'text' ({error!r})") from None
    if not isinstance(text, str):
        raise DataError(f"{where}: the field 'text' is {text!r}, no text")
    return text


def texts_of_run(config: RunConfig, cache: Path, tokenizer: Tokenizer) -> Iterator[str]:
    """The documents of all validation corpora of a run."""
    sources = find_sources(config, Path(config.data.cache) if config.data.cache else cache)
    if not sources.valid:
        raise DataError("the run has no validation text; give --data FILE.jsonl")
    for corpus in sources.valid.values():
        yield from (tokenizer.decode(ids.tolist()) for ids in CorpusDocuments(corpus, tokenizer.eod) if len(ids))


def encode_exactly(text: str, tokenizer: Tokenizer) -> Any:
    """The ids of a text; DataError where the harness would score another text than we do."""
    import numpy as np

    ids = tokenizer.encode(text)
    if tokenizer.decode(ids) != text:
        raise DataError(f"the tokenizer does not give this document back: {text[:60]!r}...")
    return np.array(ids, dtype=np.int64)


def our_score(model: Any, windows: DocumentWindows, context: ParallelContext, batch_size: int) -> float:
    """Bits per byte by the evaluator of training runs."""

    def batches(_name: str, size: int) -> Iterator[tuple[Batch, int]]:
        for tokens, labels, mask, scored_bytes in windows.batches(size):
            yield Batch(tokens, labels, mask, None).to(context.device), scored_bytes

    data: Any = SimpleNamespace(valid=[""], validation_batches=batches, context=context)
    evaluation = evaluate(model, data, batch_size, step=0)
    assert evaluation is not None, "nothing stops it"
    return evaluation.val_bits_per_byte


def harness_score(texts: Sequence[str], output: Path, length: int, eod: int, batch_size: int, device: str) -> float:
    """Bits per byte by lm-evaluation-harness, of the exported model on a task over a local file."""
    os.environ["HF_DATASETS_CACHE"] = str(output / "cache")  # read when datasets is imported
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    write_task(texts, output)
    settings = {
        "pretrained": str(output / "model"),
        "dtype": "float32",
        "max_length": length,
        "prefix_token_id": eod,
        "trust_remote_code": False,
    }
    results = simple_evaluate(
        model="hf",
        model_args=settings,
        tasks=[TASK],
        task_manager=TaskManager(include_path=str(output / "task"), include_defaults=False),
        batch_size=batch_size,
        device=device,
        bootstrap_iters=0,
    )
    assert results is not None, "rank 0 has them"
    return float(results["results"][TASK]["bits_per_byte,none"])


def write_task(texts: Sequence[str], output: Path) -> None:
    """`task/`: the documents, and the task that scores every token of them. YAML reads JSON."""
    folder = output / "task"
    folder.mkdir(parents=True)
    file = folder / "documents.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    task = {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file.resolve())}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [{"metric": "bits_per_byte"}],
        "metadata": {"version": 1.0},
    }
    (folder / f"{TASK}.yaml").write_text(json.dumps(task, indent=2), encoding="utf-8")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except NemohybridError as error:
        sys.exit(f"eval_lm_harness: {error}")
