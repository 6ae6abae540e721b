"""`run`, `train`, `optim` and `schedule`: how a model is trained."""

from dataclasses import dataclass, field

from nemohybrid.config.section import Section, option


@dataclass
class RunSection(Section):
    """Where a run lives and what makes it repeatable."""

    name: str = option("run", "for logs, W&B, and the default folder")
    dir: str = option("runs/${run.name}", "the run folder. The same folder resumes the same run")
    seed: int = option(1234, "initial weights, data order and sampling follow from it", minimum=0)
    device: str = option("auto", "auto takes a GPU where there is one", choices=("auto", "cpu", "cuda"))


@dataclass
class BatchRampConfig(Section):
    """Grow the global batch linearly from `start` in steps of `increment` over the first `samples` sequences."""

    start: int | None = option(None, "sequences in the first batch; empty: no ramp", minimum=1)
    increment: int = option(1, "sequences added at a time", minimum=1)
    samples: int = option(0, "sequences over which the ramp is spread", minimum=0)


@dataclass
class TrainSection(Section):
    """The loop."""

    steps: int = option(1000, "optimizer steps of the whole run", minimum=1)
    stop_at: int | None = option(
        None, "end with a checkpoint after this step; the schedule stays that of `steps`", minimum=0
    )
    global_batch: int = option(8, "sequences in one optimizer step, over all ranks", minimum=1)
    microbatch: int | None = option(
        None, "sequences a rank computes at a time; empty: its whole share, in a pipeline 1", minimum=1
    )
    batch_ramp: BatchRampConfig = field(default_factory=BatchRampConfig)
    recompute: str = option(
        "none",
        "layer: keep only layer inputs and compute the rest again in the backward pass",
        choices=("none", "layer"),
    )
    evaluate_every: int = option(0, "validate every so many steps, and after the last; 0: never", minimum=0)
    evaluate_positions: bool = option(
        False, "also score by the position of a token in its document, and draw position_loss.png"
    )
    threads: int | None = option(None, "CPU threads of a process; empty: what the machine has", minimum=1)


@dataclass
class OptimSection(Section):
    """AdamW with fp32 master weights."""

    name: str = option(
        "adamw",
        "apex_adamw and te_adamw need NVIDIA apex / Transformer Engine",
        choices=("adamw", "apex_adamw", "te_adamw"),
    )
    lr: float = option(3e-4, "peak learning rate", minimum=0.0)
    beta1: float = option(0.9, "decay of the first moment", minimum=0.0, maximum=1.0)
    beta2: float = option(0.95, "decay of the second moment", minimum=0.0, maximum=1.0)
    eps: float = option(1e-8, "added to the root of the second moment", minimum=0.0)
    weight_decay: float = option(0.1, "of matrices; vectors (norms, biases, A, D, dt) are never decayed", minimum=0.0)
    clip_grad_norm: float | None = option(1.0, "scale gradients down to this global L2 norm; empty: never", minimum=0.0)


@dataclass
class ScheduleSection(Section):
    """The learning rate over time. `warmup`, `decay` and `total` are counted in `unit`."""

    name: str = option("wsd", "wsd: warmup, stable, decay", choices=("wsd", "cosine", "constant"))
    unit: str = option("steps", "what warmup, decay and total count", choices=("steps", "samples", "tokens"))
    warmup: float = option(0.0, "linear from zero to the peak; below 1: a share of `total`", minimum=0)
    decay: float = option(0.0, "length of the wsd decay, which ends at `total`; below 1: a share of it", minimum=0)
    decay_style: str = option(
        "linear", "shape of the wsd decay", choices=("linear", "cosine", "exponential", "minus_sqrt")
    )
    total: int | None = option(None, "where the schedule ends; empty: with `train.steps`", minimum=1)
    min_lr_ratio: float = option(0.01, "final learning rate as a share of the peak", minimum=0.0, maximum=1.0)

    def spans(self, total: float) -> tuple[float, float]:
        """Warmup and decay of a schedule that ends at `total`, in `unit`."""
        warmup, decay = (value * total if value < 1 else value for value in (self.warmup, self.decay))
        return warmup, decay if self.name == "wsd" else 0.0
