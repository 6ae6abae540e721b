"""What `cpu_peer.py` compares: the same model trained on the same tokens by nemohybrid and by transformers.

Every function here runs in a process of its own, which holds one side and waits for its turns.
"""

import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

if TYPE_CHECKING:
    from nemohybrid.config.run_config import RunConfig

LEARNING_RATE, WEIGHT_DECAY, BETAS, EPS, CLIP = 1e-3, 0.1, (0.9, 0.95), 1e-8, 1.0
OVERRIDES = (
    "experiment=quickstart",
    "model.tie_embeddings=false",  # transformers ignores tie_word_embeddings in this model
    "data.reset_documents=false",  # and has no document borders
    "schedule=constant",
    "schedule.warmup=0",
    f"optim.lr={LEARNING_RATE}",
    f"optim.weight_decay={WEIGHT_DECAY}",
)
"""The quickstart, less what only one side can do."""


class Side(Protocol):
    """A model in training, built by its constructor."""

    model: torch.nn.Module

    def step(self) -> tuple[float, float]:
        """The next optimizer step -> mean loss in nats, gradient norm before clipping."""
        ...


@dataclass(frozen=True)
class Opened:
    """A side before its first step. Memory in bytes."""

    parameters: int
    baseline: int  # resident after the imports, before data and model


@dataclass(frozen=True)
class Turn:
    """Some steps in a row. `cpu` is the processor time of all threads."""

    seconds: list[float]
    cpu: float
    losses: list[float]
    gradient_norms: list[float]


# --- nemohybrid ------------------------------------------------------------------------------------------------------


def our_config(folder: str, overrides: Sequence[str] = ()) -> "RunConfig":
    """The quickstart of nemohybrid with `OVERRIDES`, and with `overrides` on top."""
    from nemohybrid.config.compose import load_config

    return load_config([*OVERRIDES, f"run.dir={folder}/run", *overrides])


def build_kernels() -> tuple[bool, str]:
    """Build the C++ kernels unless they are there. Whether they are now, and a word on it."""
    from nemohybrid_kernels.cpp import build

    try:
        build.build()
    except build.BuildError as error:
        return False, f"not built: {error}"
    return True, "built"


class Ours:
    """nemohybrid's `Trainer` as it runs in a training job, with its data, but without callbacks."""

    def __init__(self, folder: str, overrides: Sequence[str] = ()) -> None:
        from nemohybrid.parallel.context import ParallelContext
        from nemohybrid.train.process import keep_freed_memory
        from nemohybrid.train.trainer import Trainer

        keep_freed_memory()  # as every run does
        self.trainer = Trainer(our_config(folder, overrides), ParallelContext.single(), [])
        self.model = self.trainer.model

    def step(self) -> tuple[float, float]:
        """`Trainer.train_step`."""
        result = self.trainer.train_step()
        return result.loss, result.grad_norm


def prepare(folder: str, steps: int, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Write what the other side starts from: our initial weights as a NemotronH folder, and the tokens of all steps.

    Returns the sizes that the report names.
    """
    from nemohybrid.interop.hf import save_hf
    from nemohybrid.parallel.context import ParallelContext
    from nemohybrid.train.trainer import Trainer

    config = our_config(folder, overrides)
    trainer = Trainer(config, ParallelContext.single(), [])
    save_hf(trainer.model, Path(folder) / "hf")
    batches = (trainer.data.batch(step) for step in range(1, steps + 1))
    tokens = [torch.cat([b.tokens, b.labels[:, -1:]], dim=1).numpy() for b in batches]
    np.save(Path(folder) / "tokens.npy", np.stack(tokens))
    return {
        "pattern": config.model.pattern,
        "vocabulary": config.model.vocab_size,
        "hidden_size": config.model.hidden_size,
        "batch": config.train.global_batch,
        "sequence_length": config.data.sequence_length,
    }


# --- transformers ----------------------------------------------------------------------------------------------------


class Peer:
    """transformers' NemotronH as its users train it: its own loss, bf16 autocast, clipping, fused AdamW."""

    def __init__(self, folder: str, chunk_size: int, attention: str) -> None:
        from transformers import NemotronHForCausalLM

        self.model: Any = NemotronHForCausalLM.from_pretrained(
            Path(folder) / "hf",
            chunk_size=chunk_size,
            attn_implementation=attention,
            dtype=torch.float32,
            use_cache=False,
        ).train()
        self.optimizer = fused_adamw(self.model)
        self.batches: Iterator[np.ndarray] = iter(np.load(Path(folder) / "tokens.npy", mmap_mode="r"))

    def step(self) -> tuple[float, float]:
        """One step. `shift_labels` gives the loss all 256 targets of a row; by itself it would drop the last."""
        tokens = torch.from_numpy(next(self.batches).copy())
        inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.model(input_ids=inputs, labels=labels, shift_labels=labels, use_cache=False).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item(), norm.item()


def fused_adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW that decays matrices only."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPS, fused=True)


def tune_peer(folder: str, settings: Sequence[tuple[int, str]], rounds: int) -> list[float]:
    """Seconds of the fastest step under each (chunk size, attention): one step each, round after round.

    The fastest and not the median, since whatever disturbs a step makes it slower.
    """
    _quiet_transformers()
    peers = [Peer(folder, *setting) for setting in settings]
    seconds = [[_timed(peer)[0] for peer in peers] for _ in range(rounds + 1)][1:]  # the first one warms up
    return [min(column) for column in zip(*seconds, strict=True)]


# --- a process and its turns -----------------------------------------------------------------------------------------

_side: Side | None = None


def open_ours(folder: str, overrides: Sequence[str] = ()) -> Opened:
    """Make this process train with nemohybrid."""
    import nemohybrid.train.trainer  # noqa: F401 - imports count for the baseline

    return _open(lambda: Ours(folder, overrides))


def open_peer(folder: str, chunk_size: int, attention: str) -> Opened:
    """Make this process train with transformers."""
    from transformers import NemotronHForCausalLM  # noqa: F401 - imports count for the baseline

    _quiet_transformers()
    return _open(lambda: Peer(folder, chunk_size, attention))


def _quiet_transformers() -> None:
    """No bar while it loads, and no word about its PyTorch implementation, which is what it has on a CPU."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _open(build: Any) -> Opened:
    global _side
    gc.collect()
    baseline = memory("VmRSS")
    _side = build()
    assert _side is not None
    return Opened(sum(p.numel() for p in _side.model.parameters()), baseline)


def take_turn(steps: int) -> Turn:
    """Train for some steps."""
    assert _side is not None, "open a side first"
    cpu = time.process_time()
    seconds, results = zip(*(_timed(_side) for _ in range(steps)), strict=True)
    losses, norms = zip(*results, strict=True)
    return Turn(list(seconds), time.process_time() - cpu, list(losses), list(norms))


def _timed(side: Side) -> tuple[float, tuple[float, float]]:
    started = time.perf_counter()
    result = side.step()
    return time.perf_counter() - started, result


def memory(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at its highest.

    Not `ru_maxrss`, which a new process inherits from the one that started it.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
