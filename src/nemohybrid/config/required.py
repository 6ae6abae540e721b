"""Values that only the person who starts the run can give: `lr: ${required:'not published'}` in a config file.

OmegaConf's own `???` is no help here: merged over a key that has a default, it leaves the default as it is. It is
understood where it is left standing.
"""

import re
from typing import Any, NoReturn

from omegaconf import DictConfig, OmegaConf

from nemohybrid.config.violation import Violation
from nemohybrid.errors import ConfigError

MISSING = "???"
_MARK = re.compile(r"\$\{required(?::\s*(?P<quote>['\"]?)(?P<reason>.*?)(?P=quote))?\s*\}", re.DOTALL)


def register_resolver() -> None:
    """Let OmegaConf read `${required:'why'}`; whoever resolves one is told what to give."""
    OmegaConf.register_new_resolver("required", _refuse, replace=True)


def _refuse(reason: str = "") -> NoReturn:
    raise ConfigError(f"a value is required here: {reason}")


def without_required(cfg: DictConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """The resolved values of `cfg` without those nobody has given, and these: dotted key -> why it is required.

    Raises OmegaConf's errors for other interpolations that cannot be resolved.
    """
    raw: Any = OmegaConf.to_container(cfg, resolve=False)
    absent = dict(_required(raw))
    filled = OmegaConf.create(cfg)
    for key in absent:
        OmegaConf.update(filled, key, MISSING)
    values: Any = OmegaConf.to_container(filled, resolve=True)
    for key in absent:
        *parents, name = key.split(".")
        section = values
        for parent in parents:
            section = section[parent]
        del section[name]
    return values, absent


def _required(values: Any, prefix: str = "") -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for name, value in values.items() if isinstance(values, dict) else ():
        mark = _MARK.fullmatch(value) if isinstance(value, str) else None
        if mark or value == MISSING:
            found.append((f"{prefix}{name}", mark["reason"] or "" if mark else ""))
        found += _required(value, f"{prefix}{name}.")
    return found


def as_violations(absent: dict[str, str]) -> list[Violation]:
    """One for each value that has to be given."""
    return [
        Violation(key, f"{reason}; give {key}=..." if reason else f"required; give {key}=...")
        for key, reason in absent.items()
    ]
