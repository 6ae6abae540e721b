"""Pruning keeps what was asked for, and never removes the last sound checkpoint."""

import itertools
import os
import shutil
from pathlib import Path

import pytest

from nemohybrid.checkpoint import find_checkpoints, newest_complete, prune, save_checkpoint
from nemohybrid.errors import CheckpointError

SOUND, FLIPPED, SHORT = "sound", "flipped", "short"
STEPS = (40, 30, 20, 10)


@pytest.fixture(scope="module")
def healths(tmp_path_factory) -> Path:
    """`sound/step_...`, `flipped/step_...` and `short/step_...` of every step, to be linked from."""
    folder = tmp_path_factory.mktemp("healths")
    for step in STEPS:
        sound = save_checkpoint(folder / SOUND, step, {}, {"step": step})
        for health in (FLIPPED, SHORT):
            state = shutil.copytree(sound, folder / health / sound.name) / "state.json"
            text = state.read_text()
            state.write_text(text.replace(str(step), str(step + 1)) if health == FLIPPED else text[:-1])
    return folder


def survivors(health_of: tuple[str, ...], keep: int) -> list[int]:
    """The rule in other words than the code's: newest first, which steps must still be there."""
    if SOUND not in health_of:
        return list(STEPS)
    complete = [position for position, health in enumerate(health_of) if health != SHORT]
    last = complete[keep - 1] if len(complete) >= keep else len(STEPS)
    return [step for i, step in enumerate(STEPS) if i <= last or i == health_of.index(SOUND)]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_every_mixture_of_sound_and_damaged_keeps_its_newest_sound_one(keep, healths, tmp_path):
    for case, health_of in enumerate(itertools.product((SOUND, FLIPPED, SHORT), repeat=len(STEPS))):
        root = tmp_path / str(case)
        for step, health in zip(STEPS, health_of, strict=True):
            name = f"step_{step:08d}"
            shutil.copytree(healths / health / name, root / name, copy_function=os.link)
        before = newest_complete(root) if SOUND in health_of else None
        deleted = prune(root, keep)
        left = [int(path.name.removeprefix("step_")) for path in find_checkpoints(root)]
        assert left == survivors(health_of, keep), f"keep {keep} of {dict(zip(STEPS, health_of, strict=True))}"
        assert len(left) + len(deleted) == len(STEPS)
        after = newest_complete(root) if before else None
        assert (before and before.path) == (after and after.path)


def test_only_checkpoints_are_deleted(tmp_path):
    for step in STEPS:
        save_checkpoint(tmp_path, step, {}, {})
    (tmp_path / "best").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    assert [path.name for path in prune(tmp_path, 1)] == ["step_00000030", "step_00000020", "step_00000010"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "notes.txt", "step_00000040"]


@pytest.mark.parametrize("keep", [0, -1])
def test_keeping_none_is_refused(keep, tmp_path):
    with pytest.raises(CheckpointError, match="at least 1"):
        prune(tmp_path, keep)
