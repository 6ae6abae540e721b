"""What a run does beside training: one concern a file. `standard` puts together what a configuration asks for."""

from nemohybrid.train.callbacks.base import Callback
from nemohybrid.train.callbacks.standard import standard

__all__ = ["Callback", "standard"]
