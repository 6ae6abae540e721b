"""A run may be killed, or its disk fail, at any moment: what was acknowledged is still there, whole."""

import errno
import itertools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import pytest
import torch

from nemohybrid.checkpoint import find_checkpoints, load_checkpoint, newest_complete, prune, save_checkpoint, verify
from nemohybrid.errors import CheckpointError

LIFE = ((10, 1), (20, 2), (20, 3))  # (step, version): step 20 is written a second time after a resume
CALLS = ("os.replace", "os.mkdir", "os.unlink", "os.rmdir", "os.fsync")


class Watched:
    """A file being written, whose every write is a fault point; a fault leaves half of the bytes."""

    def __init__(self, stream: IO[bytes], fault: Callable[[str, Callable[[], Any]], Any]):
        self.stream, self.fault = stream, fault

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.stream.close()

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, piece: Any) -> int:
        half = bytes(piece)[: len(piece) // 2]
        self.fault("write", lambda: (self.stream.write(half), self.stream.flush()))
        return self.stream.write(piece)


def watch(patch: pytest.MonkeyPatch, fault: Callable[[str, Callable[[], Any]], Any]) -> None:
    """Call `fault(what, spoil)` before every operation that changes the disk; `spoil` does it by half."""

    def wrap(name: str, original: Callable) -> Callable:
        def wrapped(*args, **kwargs):
            fault(name, lambda: None)
            return original(*args, **kwargs)

        return wrapped

    for name in CALLS:
        patch.setattr(name, wrap(name, getattr(os, name.removeprefix("os."))))
    plain_open = Path.open

    def watched_open(self: Path, mode: str = "r", *args, **kwargs):
        stream = plain_open(self, mode, *args, **kwargs)
        return Watched(stream, fault) if mode == "xb" else stream

    patch.setattr(Path, "open", watched_open)


class FailAt:
    """A fault that raises OSError(error) at the `point`-th of `calls`, once."""

    def __init__(self, point: int, error: int, calls: tuple[str, ...]):
        self.countdown, self.error, self.calls = point, error, calls
        self.happened = False

    def __call__(self, what: str, spoil: Callable[[], Any]) -> None:
        if what not in self.calls:
            return
        self.countdown -= 1
        if self.countdown == -1:
            self.happened = True
            spoil()
            raise OSError(self.error, os.strerror(self.error))


def save_with_fault(root: Path, step: int, fault: FailAt, tensors: dict[str, torch.Tensor]) -> str:
    """Save version 2 on a disk with a fault; the text of the CheckpointError, empty when the save succeeded."""
    with pytest.MonkeyPatch.context() as patch:
        watch(patch, fault)
        try:
            save_checkpoint(root, step, tensors, {"version": 2}, {"config.yaml": "a: 1"})
        except CheckpointError as failure:
            return str(failure)
    return ""


class Report(NamedTuple):
    """What a run said before it ended: the last version it began to save, and the last that it was told is saved."""

    begun: int
    acknowledged: int


def live(root: Path, report: Path, tensors_of: Callable) -> None:
    """A run that saves, resumes and prunes, and reports (beside the checkpoints) what it was told."""
    for step, version in LIFE:
        report.write_text(f"{version} {version - 1}")
        save_checkpoint(root, step, tensors_of(version), {"version": version}, {"config.yaml": "a: 1"})
        report.write_text(f"{version} {version}")
        prune(root, keep=1)


def found_version(root: Path, tensors: dict[str, torch.Tensor]) -> int:
    """The version in the newest complete checkpoint, all of one piece; 0 where there is none."""
    newest = newest_complete(root)
    if newest is None:
        return 0
    assert not newest.skipped, f"a kill left a checkpoint that looks whole and is not: {newest.skipped}"
    version = load_checkpoint(newest.path, tensors)["version"]
    for name, tensor in tensors.items():
        assert bool((tensor == version).all()), f"{name} is not of version {version}"
    return version


def test_killed_at_any_moment_the_acknowledged_checkpoint_loads(tmp_path, run_child, tensors_of):
    for point in range(1000):
        root, report = tmp_path / f"run{point}", tmp_path / f"report{point}"
        report.write_text("0 0")

        def killed(point=point, root=root, report=report) -> None:
            countdown = itertools.count(point, -1)

            def fault(what: str, spoil: Callable) -> None:
                if next(countdown) == 0:
                    spoil()
                    os.kill(os.getpid(), signal.SIGKILL)

            with pytest.MonkeyPatch.context() as patch:
                watch(patch, fault)
                live(root, report, tensors_of)

        code = run_child(killed)
        told = Report(*map(int, report.read_text().split()))
        version = found_version(root, tensors_of(0))
        assert told.acknowledged <= version <= told.begun, f"kill at point {point}: version {version} of {told}"
        for path in find_checkpoints(root):
            verify(path)
        full = FailAt(0, errno.ENOSPC, ("write",))
        save_with_fault(root, 20, full, tensors_of(9))
        assert found_version(root, tensors_of(0)) == version, f"kill at point {point}: lost when the disk was full next"
        save_checkpoint(root, 40, tensors_of(9), {"version": 9})
        assert all(not path.name.startswith(".") for path in root.iterdir()), f"kill at point {point}: leftovers stay"
        if code == 0:
            assert point > 60, f"only {point} fault points: the life of a run is not watched"
            return
        assert code == -signal.SIGKILL
    raise AssertionError("the run never came to its end")


@pytest.mark.parametrize(
    "error, calls, advice",
    [
        (errno.ENOSPC, ("write",), "Free some space"),
        (errno.EDQUOT, ("write",), "Free some space"),
        (errno.EIO, ("os.fsync",), "Check the storage"),
        (errno.EROFS, ("os.mkdir", "os.replace"), "Check who may write"),
    ],
)
@pytest.mark.parametrize("step", [20, 30], ids=["same step again", "next step"])
def test_a_failing_disk_leaves_a_sound_checkpoint_and_no_litter(error, calls, advice, step, tmp_path, tensors_of):
    failures = 0
    for point in range(100):
        root, fault = tmp_path / str(point), FailAt(point, error, calls)
        save_checkpoint(root, 20, tensors_of(1), {"version": 1})
        message = save_with_fault(root, step, fault, tensors_of(2))
        assert found_version(root, tensors_of(0)) in ((1, 2) if message else (2,))
        assert not list(root.glob(".tmp-*")), f"failure {point} left its temporary folder"
        assert not message or (advice in message and os.strerror(error) in message)
        failures += bool(message)
        if not fault.happened:
            break
    assert failures >= 2, "the disk never failed"


def test_a_disk_that_fills_at_any_byte_leaves_the_older_checkpoint(tmp_path, tensors_of, monkeypatch):
    path = save_checkpoint(tmp_path, 10, tensors_of(1), {"version": 1})
    total = sum(file.stat().st_size for file in path.iterdir())
    room = 0

    def write(self: Watched, piece: Any) -> int:
        nonlocal room
        written = self.stream.write(bytes(piece)[:room])
        room -= written
        if written < len(piece):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return written

    watch(monkeypatch, lambda what, spoil: None)
    monkeypatch.setattr(Watched, "write", write)
    for size in range(0, total, 61):
        room = size
        with pytest.raises(CheckpointError, match="Free some space"):
            save_checkpoint(tmp_path, 20, tensors_of(2), {"version": 2})
        assert [entry.name for entry in tmp_path.iterdir()] == ["step_00000010"]
    room = total
    assert found_version(tmp_path, tensors_of(0)) == 1
    save_checkpoint(tmp_path, 20, tensors_of(2), {"version": 2})
    assert found_version(tmp_path, tensors_of(0)) == 2


def test_everything_is_on_the_disk_before_it_is_published_and_the_name_before_it_is_acknowledged(
    tmp_path, tensors_of, monkeypatch
):
    events: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        events.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        real_fsync(descriptor)

    def rename(source: Path, target: Path) -> None:
        events.append("published")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    path = save_checkpoint(tmp_path / "root", 1, tensors_of(1), {}, {"config.yaml": "a: 1"})
    before, after = events[: events.index("published")], events[events.index("published") + 1 :]
    assert sorted(before[:-1]) == sorted(file.name for file in path.iterdir()), "each file is forced to the disk once"
    assert before[-2:] == ["manifest.json", ".tmp-step_00000001"], "then the folder that names them"
    assert after == ["root"], "then the name"


def interrupted(*args: Any) -> Iterator[None]:
    raise KeyboardInterrupt


def test_an_interrupt_stays_an_interrupt_and_leaves_no_litter(tmp_path, tensors_of, monkeypatch):
    monkeypatch.setattr("nemohybrid.checkpoint.storage.shard_pieces", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 1, tensors_of(1), {})
    assert list(tmp_path.iterdir()) == []


def test_a_missing_extra_file_is_named_and_nothing_is_published(tmp_path, tensors_of):
    with pytest.raises(CheckpointError, match=r"absent\.yaml"):
        save_checkpoint(tmp_path / "run", 1, tensors_of(1), {}, {"config.yaml": tmp_path / "absent.yaml"})
    assert find_checkpoints(tmp_path / "run") == []
