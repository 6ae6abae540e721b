"""Where a run is: what random bits and quantized weights depend on, besides their layer."""

from dataclasses import dataclass

from nemohybrid.precision.health import Health


@dataclass
class Clock:
    """One for all layers of a model. Who trains it sets `step`, `stage` and `microbatch`, and says when weights have changed.

    seed: of the run; rank: this rank's number among those that draw.
    """

    seed: int = 0
    rank: int = 0
    step: int = 0
    stage: int = 0  # of a pipeline, that was last begun
    microbatch: int = 0
    weights: int = 0  # how often they have changed
    watch: Health | None = None  # looks at what is quantized, in the steps that are sampled

    @property
    def place(self) -> tuple[int, int, int]:
        """What the counter of random bits begins with."""
        return self.step, self.microbatch, self.rank

    def weights_changed(self) -> None:
        """After a step of the optimizer, and after weights were loaded. What was quantized of them is made anew."""
        self.weights += 1
