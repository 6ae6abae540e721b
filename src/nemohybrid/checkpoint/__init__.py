"""Checkpoints: logical tensors and a JSON state on disk, whole or not there, readable under any layout.

    path = save_checkpoint(run_dir / "checkpoints", step, tensors, state)
    newest = newest_complete(run_dir / "checkpoints")
    state = load_checkpoint(newest.path, tensors, verify_files=False)

A folder holds safetensors shards, `metadata.json` (what each logical tensor is made of), `state.json`, extra files,
and `manifest.json` (size and sha256 of each file). Nothing in it is ever unpickled or executed.
"""

from nemohybrid.checkpoint.folders import find_checkpoints, step_of, sweep_leftovers
from nemohybrid.checkpoint.load import Newest, load_checkpoint, newest_complete, read_state
from nemohybrid.checkpoint.manifest import verify
from nemohybrid.checkpoint.metadata import TensorRecord, read_metadata
from nemohybrid.checkpoint.retention import prune
from nemohybrid.checkpoint.save import save_checkpoint
from nemohybrid.checkpoint.storage import SafetensorsReader, SafetensorsWriter

__all__ = [
    "Newest",
    "SafetensorsReader",
    "SafetensorsWriter",
    "TensorRecord",
    "find_checkpoints",
    "load_checkpoint",
    "newest_complete",
    "prune",
    "read_metadata",
    "read_state",
    "save_checkpoint",
    "step_of",
    "sweep_leftovers",
    "verify",
]
