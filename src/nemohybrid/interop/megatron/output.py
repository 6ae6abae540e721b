"""A translation as text: a command line to paste, or an experiment file; remarks as comments below."""

import math
import re
import shlex
import textwrap
from collections.abc import Sequence
from typing import Any

from omegaconf import OmegaConf

from nemohybrid.config.run_config import RunConfig
from nemohybrid.config.section import leaves
from nemohybrid.interop.megatron.arguments import KINDS, Remark
from nemohybrid.interop.megatron.translation import Translation

WIDTH = 118
GPUS_OF_A_NODE = 8
_PLAIN = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_KEYWORDS = ("null", "true", "false", "nan", "inf")


def in_our_order(now: Translation) -> dict[str, Any]:
    """The overrides in the order of the keys of a run."""
    order = [path for path, _, _ in leaves(RunConfig())]
    return {key: now.overrides[key] for key in order if key in now.overrides}


def override_words(now: Translation) -> list[str]:
    """`key=value` in Hydra's grammar, a word each, as `load_config` takes them."""
    return [f"{key}={hydra_value(value)}" for key, value in in_our_order(now).items()]


def hydra_value(value: Any) -> str:
    """A value as Hydra reads it back: text quoted unless it is a plain word, mappings and lists in brackets."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return f"{value:.12g}" if isinstance(value, float) else str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(key)}: {hydra_value(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(hydra_value, value)) + "]"
    return value if _PLAIN.fullmatch(value) and value.lower() not in _KEYWORDS else _quoted(value)


def _quoted(text: str) -> str:
    """In Hydra's quotes a backslash means something only before a quote."""
    return '"' + re.sub(r'(\\+)(?="|\Z)', r"\1\1", text).replace('"', '\\"') + '"'


def _key(text: str) -> str:
    """Keys of mappings cannot be quoted in Hydra's grammar, so that what means something in it is escaped."""
    return re.sub(r"([\\()\[\]{}:=,\s])", r"\\\1", text)


def as_command(now: Translation) -> str:
    """`nemohybrid train key=value ...`, under torchrun where ranks share the model, then the remarks."""
    words = [_program(_fewest_ranks(now)), *map(shlex.quote, override_words(now))]
    return " \\\n    ".join(words) + "\n" + remarks_text(now.remarks)


def _fewest_ranks(now: Translation) -> int:
    """That hold the model once."""
    tensor, expert = (now.overrides.get(f"parallel.{axis}", 1) for axis in ("tensor", "expert"))
    width = now.overrides.get("parallel.expert_tensor", 1 if expert > 1 else tensor)
    return math.lcm(tensor, expert * width) * now.overrides.get("parallel.pipeline", 1)


def _program(ranks: int) -> str:
    if ranks == 1:
        return "nemohybrid train"
    nodes = ranks // GPUS_OF_A_NODE if ranks % GPUS_OF_A_NODE == 0 else 1
    several = f"--nnodes {nodes} " if nodes > 1 else ""
    return f"torchrun {several}--nproc-per-node {ranks // nodes} -m nemohybrid train"


def as_experiment(now: Translation, source: str) -> str:
    """A file for `configs/experiment/`, then the remarks."""
    nested: dict[str, Any] = {}
    for key, value in in_our_order(now).items():
        *parents, name = key.split(".")
        section = nested
        for parent in parents:
            section = section.setdefault(parent, {})
        section[name] = value
    head = f"# @package _global_\n# From {source!r}, by `nemohybrid from-megatron`.\n"
    return head + OmegaConf.to_yaml(OmegaConf.create(nested)) + remarks_text(now.remarks)


def remarks_text(remarks: Sequence[Remark]) -> str:
    """As comments, a paragraph a kind, arguments with the same reason together."""
    lines: list[str] = []
    for kind in KINDS:
        reasons: dict[str, list[str]] = {}
        for remark in remarks:
            if remark.kind == kind:
                reasons.setdefault(remark.reason, []).append(remark.subject)
        if reasons:
            lines += ["#", f"# {kind}:"]
        for reason, subjects in reasons.items():
            text = _printable(" ".join(f"{', '.join(subjects)}: {reason}".split()))
            lines += textwrap.wrap(
                text, WIDTH, initial_indent="#   ", subsequent_indent="#     ", break_on_hyphens=False
            )
    return "\n".join(lines) + "\n" if lines else ""


def _printable(text: str) -> str:
    """What a terminal, or YAML, would not take as a character is spelled out."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
