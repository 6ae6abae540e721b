"""Templates of scripts, and words as a shell reads them."""

import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path

TEMPLATES = Path(__file__).parent / "templates"
NAME = re.compile(r"\{\{(\w+)\}\}")


def fill(template: str, values: Mapping[str, str]) -> str:
    """The file `template` with a value in place of each `{{name}}`. A line that only names empty values is left out."""
    text = (TEMPLATES / template).read_text(encoding="utf-8")
    assert set(NAME.findall(text)) == set(values), f"{template} names {sorted(set(NAME.findall(text)) ^ set(values))}"
    return "".join(_filled(line, values) for line in text.splitlines(keepends=True))


def _filled(line: str, values: Mapping[str, str]) -> str:
    names = NAME.findall(line)
    if names and not NAME.sub("", line).strip() and not any(values[name] for name in names):
        return ""
    return NAME.sub(lambda found: values[found[1]], line)  # once: what a value holds is never a name


def words(items: Iterable[str], indent: str = "    ") -> str:
    """Words of a bash array, a line each, quoted where a shell would read anything into them."""
    return "\n".join(f"{indent}{shlex.quote(item)}" for item in items)
