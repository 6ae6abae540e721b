"""Rules about what must be there: corpora, libraries, checkpoints."""

import importlib.util
import os
from pathlib import Path

from nemohybrid.config.derive import BYTE_VOCABULARY, tokenizer_vocabulary
from nemohybrid.config.rules.rule import RUN_RULES, Situation, rule
from nemohybrid.config.violation import Violation


@rule(RUN_RULES)
def training_data_exists(now: Situation) -> Violation | None:
    """Some corpus is named, and its files are there."""
    data = now.config.data
    if data.bundled:
        return Violation("data.train", "give either data.bundled or data.train, not both") if data.train else None
    if data.train is None:
        return Violation(
            "data.train", "no training data. Prepare some with `nemohybrid data prepare`, or take data=shakespeare"
        )
    return _corpus_problem("data.train", data.train)


@rule(RUN_RULES)
def validation_data_exists(now: Situation) -> Violation | None:
    """The same for the validation corpus, where one is named."""
    valid = now.config.data.valid
    return _corpus_problem("data.valid", valid) if valid else None


def _corpus_problem(key: str, prefix: str) -> Violation | None:
    missing = [prefix + end for end in (".bin", ".idx") if not Path(prefix + end).is_file()]
    if not missing:
        return None
    folder = Path(prefix).parent
    there = sorted(str(p.with_suffix("")) for p in folder.glob("*.idx")) if folder.is_dir() else []
    return Violation(f"{key}={prefix}", f"{' and '.join(missing)} not found", {key: there} if there else {})


@rule(RUN_RULES)
def tokenizer_is_known(now: Situation) -> Violation | None:
    """byte, bpe:SIZE for the bundled text, or a file."""
    data = now.config.data
    spec = data.tokenizer or "byte"
    kind, _, size = spec.partition(":")
    if kind == "bpe":
        if not data.bundled:
            return Violation(
                f"data.tokenizer={spec}", "is trained by `data prepare`; a prepared corpus has its tokenizer"
            )
        legal = size.isdecimal() and int(size) >= BYTE_VOCABULARY
        return (
            None
            if legal
            else Violation(f"data.tokenizer={spec}", "needs a size", {"data.tokenizer": "bpe:257 or more"})
        )
    if spec == "byte" or Path(spec).exists():
        return None
    return Violation(
        f"data.tokenizer={spec}", "no such file", {"data.tokenizer": "byte, bpe:SIZE, or a tokenizer.json"}
    )


@rule(RUN_RULES)
def vocabulary_holds_the_tokenizer(now: Situation) -> Violation | None:
    """Every token id needs a row of the embedding."""
    ids, rows = tokenizer_vocabulary(now.config.data), now.config.model.vocab_size or 0
    if ids is None or ids <= rows:
        return None
    legal = {"model.vocab_size": f"{ids} or more, or null"}
    return Violation(f"model.vocab_size={rows}", f"the tokenizer has {ids} ids", legal)


@rule(RUN_RULES)
def run_has_a_folder(now: Situation) -> Violation | None:
    """An empty name would be the working directory."""
    return None if now.config.run.dir.strip() else Violation("run.dir=", "is empty", {"run.dir": "a folder"})


@rule(RUN_RULES)
def evaluation_needs_data(now: Situation) -> Violation | None:
    """Asking for evaluation without validation data would never evaluate."""
    config = now.config
    if config.train.evaluate_every and not (config.data.valid or config.data.bundled):
        return Violation(
            "train.evaluate_every",
            "there is no validation data",
            {"data.valid": "a corpus prefix", "train.evaluate_every": "0"},
        )
    return None


@rule(RUN_RULES)
def overlap_in_window(now: Situation) -> Violation | None:
    """A validation window must score something."""
    overlap, length = now.config.data.valid_overlap, now.config.data.sequence_length
    if 0 <= overlap < length:
        return None
    return Violation(
        f"data.valid_overlap={overlap}",
        f"leaves nothing of a window of {length}",
        {"data.valid_overlap": f"0 to {length - 1}"},
    )


@rule(RUN_RULES)
def optimizer_is_installed(now: Situation) -> Violation | None:
    """The fused optimizers live in libraries of their own."""
    name = now.config.optim.name
    homes = {"apex_adamw": ("apex", IN_NGC), "te_adamw": ("transformer_engine", "pip install 'nemohybrid[te]'")}
    return _not_installed(f"optim.name={name}", *homes[name]) if name in homes else None


@rule(RUN_RULES)
def wandb_is_installed(now: Situation) -> Violation | None:
    """Weights & Biases is an extra."""
    asked = now.config.logging.wandb
    return _not_installed("logging.wandb=true", "wandb", "pip install 'nemohybrid[wandb]'") if asked else None


@rule(RUN_RULES)
def tensorboard_is_installed(now: Situation) -> Violation | None:
    """TensorBoard is an extra."""
    asked, cure = now.config.logging.tensorboard, "pip install 'nemohybrid[tensorboard]'"
    return _not_installed("logging.tensorboard=true", "tensorboard", cure) if asked else None


IN_NGC = "it comes with NGC containers and is not on PyPI (the package of that name there is another)"


def _not_installed(where: str, package: str, cure: str) -> Violation | None:
    if importlib.util.find_spec(package) is not None:
        return None
    return Violation(where, f"the package {package} is not installed: {cure}")


@rule(RUN_RULES)
def resume_exists(now: Situation) -> Violation | None:
    """`resume` is a word or a folder."""
    resume = now.config.resume
    if resume in ("auto", "never") or os.path.isdir(resume):  # noqa: PTH112 - a plain string
        return None
    return Violation(f"resume={resume}", "is neither auto, never, nor a checkpoint folder")
