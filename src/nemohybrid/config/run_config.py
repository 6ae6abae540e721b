"""`RunConfig`: one run, complete. The root of the schema that Hydra composes."""

import hashlib
import json
from dataclasses import dataclass, field

from nemohybrid.config.environment import (
    CheckpointSection,
    ClusterSection,
    DataSection,
    LoggingSection,
    ParallelSection,
    SampleSection,
)
from nemohybrid.config.kernels import KernelsSection
from nemohybrid.config.model import ModelConfig
from nemohybrid.config.precision import PrecisionSection
from nemohybrid.config.section import Section, option
from nemohybrid.config.training import OptimSection, RunSection, ScheduleSection, TrainSection


@dataclass
class RunConfig(Section):
    """Everything that decides what a run does. Frozen once checked; its hash must agree on all ranks."""

    run: RunSection = field(default_factory=RunSection)
    resume: str = option(
        "auto", "auto: go on from the newest complete checkpoint of run.dir; never; or a checkpoint folder"
    )
    init_from: str | None = option(
        None, "a checkpoint or run folder whose weights a new run starts from, with a new optimizer at step 0"
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataSection = field(default_factory=DataSection)
    train: TrainSection = field(default_factory=TrainSection)
    optim: OptimSection = field(default_factory=OptimSection)
    schedule: ScheduleSection = field(default_factory=ScheduleSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    precision: PrecisionSection = field(default_factory=PrecisionSection)
    kernels: KernelsSection = field(default_factory=KernelsSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    logging: LoggingSection = field(default_factory=LoggingSection)
    sample: SampleSection = field(default_factory=SampleSection)
    cluster: ClusterSection = field(default_factory=ClusterSection)

    def digest(self) -> str:
        """SHA-256 of the resolved configuration, the same on every rank of a healthy job. The order of corpora counts."""
        return hashlib.sha256(json.dumps(self.as_dict()).encode()).hexdigest()
