"""Secrets of the environment: which variables are some, and configurations that would hold the value of one."""

import re
from typing import Any

from nemohybrid.config.violation import Violation

WORDS = r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|JWT)S?|(?:^|_)(PAT|PASS)"
SECRET = re.compile(rf"({WORDS})(_|\d*$)", re.IGNORECASE)
PLACE = re.compile(r"_(PATH|FILE|DIR|FOLDER)$", re.IGNORECASE)
LOOK_UP = re.compile(r"\$\{\s*oc\.env\s*:\s*(?P<name>[^,}]*)")
"""OmegaConf's `${oc.env:NAME}` and `${oc.env:NAME,default}`."""


def is_secret(variable: str) -> bool:
    """Whether a variable of the environment is named as secrets are: HF_TOKEN, wandb_api_key, GITHUB_PAT, HF_TOKEN_WRITE."""
    return bool(SECRET.search(variable)) and not PLACE.search(variable)


def secrets_looked_up(values: Any, key: str = "") -> list[Violation]:
    """One for each `${oc.env:NAME}` in unresolved `values` whose variable is a secret, or may be: a run saves its values."""
    if isinstance(values, dict):
        return [
            v for name, value in values.items() for v in secrets_looked_up(value, f"{key}.{name}" if key else str(name))
        ]
    if isinstance(values, list):
        return [v for value in values for v in secrets_looked_up(value, key)]
    names = (
        (found["name"].strip().strip("'\"") for found in LOOK_UP.finditer(values)) if isinstance(values, str) else ()
    )
    return [
        Violation(f"{key}=${{oc.env:{name}}}", _why(name))
        for name in names
        if is_secret(name) or not name.isidentifier()
    ]


def _why(name: str) -> str:
    if not name.isidentifier():
        return "the name of the variable must be written out, as it may be that of a secret"
    return f"would be saved with the run, for everybody to read. Leave it out: what needs {name} takes it from the environment"
