"""Secrets of the environment appear in no file and no output, whatever the commands do and however they end."""

import os
import signal
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from forked import fork, wait

from nemohybrid.train.trainer import Trainer

CANARY = "canary-5f1c"
SECRETS = ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "SLURM_JWT", "GITHUB_TOKEN", "MY_PASSWORD")


@pytest.fixture(autouse=True)
def environment(monkeypatch) -> list[str]:
    """Secrets in the environment, and a stand-in for wandb; what it is told is collected."""
    told: list[str] = []
    run = types.SimpleNamespace(
        define_metric=lambda *a, **k: None, log=lambda values: told.append(repr(values)), finish=lambda: None
    )
    module = types.ModuleType("wandb")
    module.__spec__ = ModuleSpec("wandb", None)
    module.init = lambda **settings: told.append(repr(settings)) or run  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in SECRETS:
        monkeypatch.setenv(name, f"{CANARY}-{name}")
    return told


@pytest.fixture
def whole(small) -> list[str]:
    """A run that writes everything a run can write but TensorBoard's events, whose import takes seconds."""
    loud = ["logging.wandb=true", "logging.picture=true", "logging.console=lines"]
    return [*small, *loud, "checkpoint.every=1", "sample.prompts=[A]", "run.dir=run"]


def assert_no_canary(folder: Path, *texts: str) -> None:
    for file in (path for path in folder.rglob("*") if path.is_file()):
        assert CANARY.encode() not in file.read_bytes(), f"a secret is in {file}"
    for text in texts:
        assert CANARY not in text, f"a secret was told: {text}"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside tensorboard
def test_no_command_tells_a_secret(nemohybrid, whole, empty_folder, environment):
    (empty_folder / "text.txt").write_text("To be, or not to be")
    commands = {
        "train": [*whole, "logging.tensorboard=true"],
        "generate": ["--checkpoint", "run", "--prompt", "A", "--max-new-tokens", "2"],
        "params": ["model=tiny"],
        "data": ["prepare", "--input", "text.txt", "--output", "corpus", "--tokenizer", "byte"],
    }
    for command, words in commands.items():
        code, out, err = nemohybrid(command, *words)
        assert code == 0, err
        assert_no_canary(empty_folder, out, err)
    assert (empty_folder / "run" / "tensorboard").is_dir()
    assert len(environment) > 2, "wandb was told nothing"
    assert_no_canary(empty_folder, *environment)


@pytest.mark.parametrize("end", ["refused", "failed", "stopped", "killed", "broken"])
def test_no_end_of_a_run_tells_a_secret(nemohybrid, whole, empty_folder, monkeypatch, environment, end):
    real = Trainer.train_step

    def ends(trainer: Trainer):
        if trainer.step == 1:
            if end == "failed":
                trainer.model.output.weight.data.fill_(float("nan"))
            if end in ("stopped", "killed"):
                os.kill(os.getpid(), signal.SIGTERM if end == "stopped" else signal.SIGKILL)
            if end == "broken":
                raise ArithmeticError("a mistake of ours, with a traceback")
        return real(trainer)

    monkeypatch.setattr(Trainer, "train_step", ends)
    words = [*whole, "train.steps=3", *(["optim.lrr=1"] if end == "refused" else [])]
    said = empty_folder / "said"

    def command() -> None:
        code, out, err = nemohybrid("train", *words)
        said.write_text(out + err)
        os._exit(code)

    code = wait(fork(command, empty_folder / "traceback"))
    assert code == {"stopped": 75, "killed": -signal.SIGKILL}.get(end, 1)
    assert said.exists() == (end not in ("killed", "broken"))
    assert (empty_folder / "traceback").exists() == (end == "broken")
    assert_no_canary(empty_folder)
