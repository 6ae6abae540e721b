"""Rules about what must be there: corpora, libraries, checkpoints."""

import importlib.util
import math
import os
from collections.abc import Iterable
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
    if not data.corpora:
        return Violation(
            "data.train", "no training data. Prepare some with `nemohybrid data prepare`, or take data=shakespeare"
        )
    return _corpora_problem(now, "data.train", list(data.corpora))


@rule(RUN_RULES)
def validation_data_exists(now: Situation) -> Violation | None:
    """The same for the validation corpora, where some are named."""
    return _corpora_problem(now, "data.valid", list(now.config.data.valid_sets.values()))


def _corpora_problem(now: Situation, key: str, prefixes: list[str]) -> Violation | None:
    """All files that are absent, and corpora named twice under two spellings of their path."""
    files = [prefix + end for prefix in prefixes for end in (".bin", ".idx")]
    missing = [name for name in files if "files" not in now.unseen and not Path(name).is_file()]
    places: dict[Path, list[str]] = {}
    for prefix in prefixes:
        places.setdefault(Path(prefix).resolve(), []).append(prefix)
    faults = [f"{' and '.join(missing)} not found"] if missing else []
    faults += [f"{' and '.join(same)} are the same corpus" for same in places.values() if len(same) > 1]
    there = _corpora_in({Path(name).parent for name in missing})
    return (
        Violation(f"{key}={', '.join(prefixes)}", "; ".join(faults), {key: there} if there else {}) if faults else None
    )


def _corpora_in(folders: Iterable[Path]) -> list[str]:
    return sorted(str(file.with_suffix("")) for folder in folders if folder.is_dir() for file in folder.glob("*.idx"))


@rule(RUN_RULES)
def split_is_possible(now: Situation) -> Violation | None:
    """Up to three shares of what is trained on, instead of validation corpora."""
    data, where = now.config.data, f"data.split=[{', '.join(f'{share:g}' for share in now.config.data.split)}]"
    if not data.split:
        return None
    legal = {"data.split": "one to three numbers for train, valid, test: the first above 0, none below, e.g. [98,1,1]"}
    if len(data.split) > 3 or not all(0 <= share < math.inf for share in data.split) or data.split[0] == 0:
        return Violation(where, "is no split", legal)
    if data.bundled:
        return Violation(where, "the bundled text has its own held-out play", {"data.split": "[]"})
    if data.valid:
        return Violation(where, "give either data.split or data.valid, not both", {"data.valid": "null"})
    return None


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
    there = spec.endswith((".json", ".model")) or "/" in spec if "files" in now.unseen else Path(spec).exists()
    if spec == "byte" or there:
        return None
    return Violation(
        f"data.tokenizer={spec}",
        "no such file",
        {"data.tokenizer": "byte, bpe:SIZE, a tokenizer.json, or a tokenizer.model"},
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
    if config.train.evaluate_every and not config.data.has_validation:
        return Violation(
            "train.evaluate_every",
            "there is no validation data",
            {"data.valid": "a corpus prefix", "data.split": "[98,2]", "train.evaluate_every": "0"},
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
def overlap_of_a_stream(now: Situation) -> Violation | None:
    """Windows of single documents are placed as another program places them."""
    data = now.config.data
    if data.valid_windows == "stream" or not data.valid_overlap:
        return None
    where = f"data.valid_overlap={data.valid_overlap}"
    return Violation(where, "has no meaning with data.valid_windows=documents", {"data.valid_overlap": "0"})


@rule(RUN_RULES)
def optimizer_is_installed(now: Situation) -> Violation | None:
    """The fused optimizers live in libraries of their own."""
    name = now.config.optim.name
    homes = {"apex_adamw": ("apex", IN_NGC), "te_adamw": ("transformer_engine", "pip install 'nemohybrid[te]'")}
    return _not_installed(now, f"optim.name={name}", *homes[name]) if name in homes else None


@rule(RUN_RULES)
def wandb_is_installed(now: Situation) -> Violation | None:
    """Weights & Biases is an extra."""
    asked = now.config.logging.wandb
    return _not_installed(now, "logging.wandb=true", "wandb", "pip install 'nemohybrid[wandb]'") if asked else None


@rule(RUN_RULES)
def tensorboard_is_installed(now: Situation) -> Violation | None:
    """TensorBoard is an extra."""
    asked, cure = now.config.logging.tensorboard, "pip install 'nemohybrid[tensorboard]'"
    return _not_installed(now, "logging.tensorboard=true", "tensorboard", cure) if asked else None


IN_NGC = "it comes with NGC containers and is not on PyPI (the package of that name there is another)"


def _not_installed(now: Situation, where: str, package: str, cure: str) -> Violation | None:
    if "packages" in now.unseen or importlib.util.find_spec(package) is not None:
        return None
    return Violation(where, f"the package {package} is not installed: {cure}")


@rule(RUN_RULES)
def initial_weights_exist(now: Situation) -> Violation | None:
    """`init_from` is a folder, until the run has a checkpoint of its own."""
    folder, begun = now.config.init_from, Path(now.config.run.dir) / "checkpoints"
    if folder is None or "files" in now.unseen:
        return None
    if os.path.isdir(folder) or any(begun.glob("step_*")):  # noqa: PTH112 - a plain string
        return None
    return Violation(f"init_from={folder}", "no such folder; give a checkpoint or a run folder")


@rule(RUN_RULES)
def resume_exists(now: Situation) -> Violation | None:
    """`resume` is a word or a folder."""
    resume = now.config.resume
    there = "/" in resume if "files" in now.unseen else os.path.isdir(resume)  # noqa: PTH112 - a plain string
    if resume in ("auto", "never") or there:
        return None
    legal = {"resume": "auto, never or FOLDER/step_..."}
    return Violation(f"resume={resume}", "is neither auto, never, nor a checkpoint folder", legal)
