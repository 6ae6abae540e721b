"""Compiles what an autotuner of Triton is going to try on all processors, instead of one after the other.

mamba-ssm tries 110 configurations for every length of chunks and size of the state. Compiling them takes a core minutes before
the first launch; which of them is taken is decided as ever, by their times.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from typing import Any


def compile_together() -> bool:
    """For all autotuners of this process; compiling leaves Python's lock to others. False where this Triton cannot."""
    try:
        from triton.runtime import Autotuner
        from triton.runtime._async_compile import AsyncCompileMode
    except ImportError:
        return False
    if hasattr(Autotuner.prune_configs, "__wrapped__"):
        return True
    Autotuner.prune_configs = _compiling(Autotuner.prune_configs, AsyncCompileMode)
    return True


def _compiling(prune_configs: Callable[..., Any], mode: Callable[..., Any]) -> Callable[..., Any]:
    """`prune_configs` is asked once for every key, for what will be tried."""

    @wraps(prune_configs)
    def prune_and_compile(tuner: Any, kwargs: dict[str, Any]) -> Any:
        tried = prune_configs(tuner, kwargs)
        if len(tried) > 1:
            with ThreadPoolExecutor(os.cpu_count()) as pool, mode(pool, ignore_errors=True):
                for config in tried:
                    tuner.fn.run(*tuner.nargs.values(), **{**kwargs, **config.all_kwargs(), "warmup": True})
        return tried

    return prune_and_compile
