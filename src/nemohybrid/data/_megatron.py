"""The door to megatron-core: imported on first use, since it takes seconds, and without its warnings."""

import functools
import importlib
import types
import warnings


@functools.cache
def megatron(module: str) -> types.ModuleType:
    """The module `megatron.core.datasets.<module>`.

    The warnings kept away are about accelerators that are optional and that reading a corpus never uses.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"megatron.core.datasets.{module}")
