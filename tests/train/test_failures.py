"""What else goes wrong in the first week: no memory, no space, an end before the beginning, a rank that is gone."""

import errno
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch

from nemohybrid.checkpoint import verify
from nemohybrid.errors import TrainingError
from nemohybrid.observe.metrics import MetricsWriter, read_metrics
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.train.callbacks import Callback
from nemohybrid.train.checkpointing import Checkpointer
from nemohybrid.train.plain_words import lost_a_peer
from nemohybrid.train.run import run
from nemohybrid.train.trainer import Trainer


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file but the lock: its bytes, and when it was written."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "lock")
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.mark.parametrize("key", ["steps", "stop_at"])
def test_an_end_before_the_checkpoint_is_refused_and_changes_nothing(command, tmp_path, capfd, key):
    command("train.steps=6")
    before = content(tmp_path / "run")
    more = [] if key == "steps" else ["train.steps=9"]
    assert command(f"train.{key}=4", *more) == 1
    error = capfd.readouterr().err
    assert f"is at step 6, but train.{key}=4. Legal: train.{key}=7 or more" in error
    assert content(tmp_path / "run") == before


@pytest.mark.parametrize("key", ["steps", "stop_at"])
def test_a_complete_run_says_so_and_changes_nothing(command, tmp_path, capfd, key):
    whole = [f"train.{key}=4", "logging.picture=true", "sample.prompts=[A]", "sample.max_new_tokens=2"]
    whole += [] if key == "steps" else ["train.steps=9"]
    assert command(*whole) == 0
    before = content(tmp_path / "run")
    assert command(*whole) == 0
    out = capfd.readouterr().out
    assert f"already complete: {tmp_path}/run/checkpoints/step_00000004 is at step 4 of" in out
    assert out.count("done: step 4") == 1, "only the first run trained"
    assert content(tmp_path / "run") == before


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ..."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: ..."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: not enough memory: you tried ..."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=["python", "cuda", "cpu", "cpu on windows", "cublas"],
)
@pytest.mark.parametrize("where", ["build_model", "compute_gradients"], ids=["building", "step"])
def test_running_out_of_memory_is_told_with_an_estimate_and_what_to_change(command, monkeypatch, capfd, where, error):
    def fails(*_):
        raise error

    monkeypatch.setattr(f"nemohybrid.train.trainer.{where}", fails)
    assert command() == 1
    told = capfd.readouterr().err
    assert told.startswith("nemohybrid train: out of memory on rank 0 (cpu)")
    for part in ("weights, fp32", "activations" if "activations" in told else "layers", "total", "train.microbatch=1"):
        assert part in told, told
    assert "train.recompute=layer" in told
    assert ("20.00 GiB more were wanted" in told) == ("20.00" in str(error))
    assert "Traceback" not in told


def test_an_allocation_that_the_system_refuses_is_told_the_same_way(command, run_child, tmp_path, capfd):
    """For real: a process that may take 100 MB more, and a model of 300 MB."""

    def starved() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        room = pages * resource.getpagesize() + 100 * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (room, room))
        os._exit(command("model.hidden_size=2048"))

    assert run_child(starved) == 1
    told = capfd.readouterr().err
    assert "out of memory on rank 0 (cpu)" in told, told
    assert "more were wanted" in told
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_model_that_cannot_fit_is_refused_before_it_is_built(command, monkeypatch, capfd, tmp_path):
    monkeypatch.setattr("nemohybrid.plan.memory.available_memory", lambda _: 1000)
    monkeypatch.setattr("nemohybrid.train.trainer.build_model", lambda *_: 1 / 0)
    assert command() == 1
    assert "the model does not fit" in capfd.readouterr().err
    assert names(tmp_path / "run") == ["lock"]


def test_a_run_whose_disk_is_full_keeps_its_older_checkpoint_and_resumes(command, run_child, tmp_path, capfd):
    """For real: a process whose files may have 40 KB."""
    assert command("train.stop_at=2") == 0

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
        os._exit(command("checkpoint.every=1"))

    assert run_child(limited) == 1
    error = capfd.readouterr().err
    assert "Free some space or keep fewer checkpoints" in error
    assert "Traceback" not in error
    assert names(tmp_path / "run" / "checkpoints") == ["step_00000002"], "the half of a checkpoint is still there"
    verify(tmp_path / "run" / "checkpoints" / "step_00000002")
    assert command() == 0


@pytest.mark.parametrize("full", [0, 1])
def test_a_disk_that_is_full_on_one_rank_ends_both(configure, start, run_ranks, tmp_path, monkeypatch, full):
    """As with a quota, or a disk of its own on each node."""
    config = configure("checkpoint.every=2", world_size=2)
    real = Checkpointer.save

    def save(self, step, *rest):
        if step == 4 and self.context.rank == full:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        return real(self, step, *rest)

    monkeypatch.setattr(Checkpointer, "save", save)
    for failure in run_ranks(lambda context: run(config, context)):
        assert "CheckpointError" in failure
        assert "Free some space" in failure
    assert names(tmp_path / "run" / "checkpoints") == ["step_00000002"]
    monkeypatch.undo()
    assert start("checkpoint.every=2").step == 4


def test_metrics_that_cannot_be_written_end_the_run_with_a_sentence(command, tmp_path, monkeypatch, capfd):
    """The number would be missing later, and nobody would know. What was saved before stays."""
    real = MetricsWriter.write

    def write(self, record):
        if record["step"] == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, "write", write)
        assert command("checkpoint.every=2") == 1
    error = capfd.readouterr().err
    assert f"step 3: MetricsFile cannot write in {tmp_path}/run: [Errno 28] No space left on device" in error
    assert "Free some space" in error
    assert command() == 0
    assert [record["step"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4]


def test_every_callback_is_closed_and_the_first_failure_is_told(configure):
    """A file on a full disk fails again when it is closed; W&B must hear of the end all the same."""
    closed = []

    class Full(Callback):
        def __init__(self, name: str) -> None:
            self.name = name

        def on_step_end(self, trainer, result) -> None:
            raise OSError(errno.ENOSPC, f"{self.name} is full")

        def on_close(self) -> None:
            closed.append(self.name)
            raise OSError(errno.ENOSPC, "cannot flush")

    trainer = Trainer(configure(), ParallelContext.single(), [Full("first"), Full("second")])
    with pytest.raises(TrainingError, match=r"step 1: Full cannot write in .* first is full"):
        trainer.fit()
    assert closed == ["first", "second"]


@pytest.mark.parametrize("every, kept, warned", [(0, 1, False), (1, 3, True)])
def test_too_little_space_for_the_checkpoints_is_a_warning(command, monkeypatch, capfd, every, kept, warned):
    """Weights and two moments of 40,742 parameters are half a megabyte."""
    usage = shutil.disk_usage("/")._replace(free=10**6)
    monkeypatch.setattr("nemohybrid.train.checkpointing.shutil.disk_usage", lambda _: usage)
    assert command(f"checkpoint.every={every}", f"checkpoint.keep={kept}") == 0
    assert ("warning: a checkpoint takes" in capfd.readouterr().out) == warned


def test_the_ranks_left_by_one_that_died_say_so(configure, run_ranks, monkeypatch):
    real = Trainer.train_step

    def dies(trainer: Trainer):
        if trainer.context.rank == 1 and trainer.step == 1:
            raise ArithmeticError("a fault of this rank alone")
        return real(trainer)

    monkeypatch.setattr(Trainer, "train_step", dies)
    config = configure(world_size=2)
    left, died = run_ranks(lambda context: run(config, context))
    assert "ArithmeticError: a fault of this rank alone" in died
    assert "TrainingError: rank 0 lost its peers" in left
    assert "The rank that failed first says why" in left


def test_a_world_of_one_has_no_peers_to_lose(start, monkeypatch):
    """A RuntimeError of another kind is a mistake of ours, and keeps its traceback."""

    def fails(*_):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr("nemohybrid.train.trainer.compute_gradients", fails)
    with pytest.raises(RuntimeError, match="shapes"):
        start()


@pytest.mark.parametrize(
    "text, lost",
    [
        ("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1", True),
        ("NCCL error: remote process exited or there was a network error, NCCL version 2.28.9", True),
        ("NCCL error: invalid usage, Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 1000", False),
        ("ProcessGroupNCCL is only supported with GPUs, no GPUs found!", False),
    ],
)
def test_a_set_up_that_never_worked_is_not_told_as_lost_peers(text, lost, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert lost_a_peer(RuntimeError(text)) == lost
