"""The loss of a language model, token by token."""

from nemohybrid_kernels.cross_entropy.columns import cross_entropy_of_columns
from nemohybrid_kernels.cross_entropy.reference import cross_entropy

__all__ = ["cross_entropy", "cross_entropy_of_columns"]
