"""`data`, `parallel`, `checkpoint`, `logging`, `sample` and `cluster`: what surrounds the model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemohybrid.config.corpora import lengths_problem, names_problem, weights_problem
from nemohybrid.config.section import Section, option


@dataclass
class DataSection(Section):
    """Where tokens come from: prepared corpora (`.bin/.idx`), or the text that ships with the package."""

    bundled: str | None = option(None, "a text inside the package, prepared on first use", choices=("shakespeare",))
    cache: str | None = option(None, "where prepared and indexed files go; empty: <run.dir>/data")
    train: Any = option(
        None,
        "prefix of the training corpus (PREFIX.bin, PREFIX.idx); or {prefix: weight, ...}, a blend",
        problem=weights_problem,
    )
    valid: Any = option(
        None, "prefix of the validation corpus; or {name: prefix, ...}, each scored by itself", problem=names_problem
    )
    split: list[float] = option(
        [],
        "shares of each training corpus to train on, validate on and leave out, e.g. [98,1,1]; empty: all to train on",
    )
    tokenizer: str | None = option(
        None, "byte, bpe:SIZE (bundled text only), a tokenizer.json or a tokenizer.model; empty: the corpus says"
    )
    sequence_length: int = option(256, "tokens of a training sample", minimum=1)
    lengths: Any = option(
        None,
        "{tokens: share, ...}: sequence lengths that take turns, one a step, by shares of the steps and so of the tokens; a step "
        "of shorter sequences reads more of them. The longest is `sequence_length`. Empty: that one alone",
        problem=lengths_problem,
    )
    reset_documents: bool = option(True, "state and attention stop at document boundaries inside a sample")
    valid_windows: str = option(
        "stream",
        "stream: documents in one line, as in training; documents: each alone after an eod, as lm-evaluation-harness scores",
        choices=("stream", "documents"),
    )
    valid_overlap: int = option(0, "context tokens of a validation window that were scored before", minimum=0)

    @property
    def corpora(self) -> Mapping[str, float]:
        """Prefix -> weight of what `train` names; empty for the bundled text."""
        return {self.train: 1.0} if isinstance(self.train, str) else self.train or {}

    @property
    def valid_sets(self) -> Mapping[str, str]:
        """Name -> prefix of what `valid` names; a single corpus has the name ""."""
        return {"": self.valid} if isinstance(self.valid, str) else self.valid or {}

    @property
    def has_validation(self) -> bool:
        """Whether anything is held out: a corpus, the bundled play, or a share of `split`."""
        return bool(self.bundled or self.valid or any(self.split[1:2]))


@dataclass
class ParallelSection(Section):
    """How the world of ranks is divided: data x context x tensor x pipeline; experts live inside data x context."""

    data: str = option("auto", "data-parallel ranks; auto: what the others leave of the world")
    tensor: int = option(1, "ranks that share every matrix", minimum=1)
    sequence: bool = option(True, "tensor ranks also share the tokens of the residual stream (sequence parallelism)")
    pipeline: int = option(
        1, "ranks that share the layers: cut at `|` of the pattern, or by their modelled cost", minimum=1
    )
    virtual_pipeline: int | None = option(
        None, "stages of a pipeline rank; empty: as many as the `|` of the pattern make, or 1", minimum=1
    )
    schedule: str = option(
        "auto",
        "the order of a pipeline's passes; auto: 1f1b, interleaved where a rank has several stages",
        choices=("auto", "gpipe", "1f1b", "interleaved"),
    )
    context: int = option(1, "ranks that share a sequence", minimum=1)
    context_method: str = option(
        "auto",
        "how they do, in attention + Mamba-2. all_to_all: every rank takes all tokens of some heads; ring: keys and values go "
        "round; states: a rank passes on what its tokens leave. auto: what sends least of what the heads allow",
        choices=("auto", "all_to_all", "ring+states", "all_to_all+states", "ring+all_to_all"),
    )
    expert: int = option(1, "ranks that share the experts, of the data and tensor ranks of a stage", minimum=1)
    expert_tensor: int | None = option(
        None, "ranks that share the width of an expert; empty: 1 with expert > 1, else as tensor", minimum=1
    )
    dispatcher: str = option(
        "auto",
        "what takes tokens to folded experts; auto: deepep on GPUs where it is installed, else all_to_all",
        choices=("auto", "all_to_all", "deepep"),
    )
    expert_room: float | None = option(
        None,
        "rows an all_to_all may take from rank to rank, as a multiple of the mean; a step that needs more is computed again "
        "with twice the room. 0: as many as there are, for which the host must wait. Empty: 2 on GPUs, 0 elsewhere. "
        "DeepEP needs none",
        minimum=0.0,
    )
    data_mode: str = option(
        "auto",
        "what data ranks share: full_shard weights, gradients and optimizer state; shard_grad the last two; "
        "hybrid: full_shard within data_shard ranks, copies over the others; replicate: nothing. "
        "auto: full_shard, and shard_grad with pipeline > 1",
        choices=("auto", "full_shard", "shard_grad", "hybrid", "replicate"),
    )
    data_shard: int | None = option(
        None, "with data_mode=hybrid, data ranks over which weights are cut; empty: those of one node", minimum=1
    )
    reduce_every_microbatch: bool = option(
        False, "sum gradients over data ranks after every microbatch: keeps no whole gradient, sends more"
    )


@dataclass
class CheckpointSection(Section):
    """What survives a crash."""

    every: int = option(0, "save every so many steps; 0: only at the end", minimum=0)
    keep: int = option(2, "newest checkpoints that stay", minimum=1)


@dataclass
class LoggingSection(Section):
    """What a person sees. `metrics.jsonl` is always written, a line a step."""

    console: str = option(
        "auto", "auto: a bar on a terminal, lines elsewhere", choices=("auto", "bar", "lines", "quiet")
    )
    every: int = option(10, "steps between two plain lines", minimum=1)
    picture: bool = option(True, "draw loss.png when the run ends")
    expert_map_every: int = option(0, "steps between two pictures of the expert loads; 0: none", minimum=0)
    output_norms: int = option(0, "measure the outputs of all projections every so many steps; 0: never", minimum=0)
    precision_every: int = option(
        0, "look at what quantizing loses every so many steps, on rank 0; 0: never", minimum=0
    )
    tensorboard: bool = option(False, "also write TensorBoard events")
    wandb: bool = option(False, "also log to Weights & Biases; offline without WANDB_API_KEY")
    wandb_project: str = option("nemohybrid", "W&B project")


@dataclass
class SampleSection(Section):
    """Text the model writes when the run ends."""

    prompts: list[str] = option([], "one sample each; none: no samples")
    max_new_tokens: int = option(200, "length of a sample", minimum=1)
    temperature: float = option(0.8, "0: always the most likely token", minimum=0.0)
    top_k: int = option(0, "sample among this many tokens; 0: all", minimum=0)
    top_p: float = option(
        0.95, "sample among the most likely tokens that hold this much probability", minimum=0.0, maximum=1.0
    )


@dataclass
class ClusterSection(Section):
    """The machine."""

    backend: str = option("auto", "collectives: nccl on GPUs, gloo on CPUs", choices=("auto", "nccl", "gloo"))
    timeout_minutes: float = option(10.0, "a collective that takes longer ends the run", minimum=0.01)
    hang_seconds: float | None = option(
        None,
        "a job of which a rank has not moved for so long in a step ends with a report of who holds it up; empty: 0.4 of "
        "timeout_minutes. First steps, evaluations and saves have 0.8 of timeout_minutes. 0: nobody watches",
        minimum=0.0,
    )
    peak_tflops: float | None = option(None, "dense peak of one device for MFU; empty: from its name", minimum=0.0)
