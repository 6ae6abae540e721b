"""The model: mixers, layers, and the hybrid assembled from a pattern."""

from nemohybrid.model.hybrid import HybridModel
from nemohybrid.model.mixer import Mixer, mixer
from nemohybrid.model.sequence import DecodeCache, SequenceContext

__all__ = ["DecodeCache", "HybridModel", "Mixer", "SequenceContext", "mixer"]
