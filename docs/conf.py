"""Sphinx settings. `sphinx-build -W -b html docs docs/_build/html`; scripts/test.sh does it with every test run."""

from pathlib import Path
from typing import Any

from nemohybrid import __version__
from nemohybrid.config.check import find_field
from nemohybrid.config.groups import groups
from nemohybrid.config.run_config import RunConfig
from nemohybrid.config.section import leaves

project = "nemohybrid"
author = "the nemohybrid authors"
copyright = "2026, the nemohybrid authors"
release = version = __version__

extensions = ["myst_parser"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3  # so that pages can link to each other's headings, checked by -W

html_theme = "furo"
html_title = f"nemohybrid {version}"
exclude_patterns = ["_build", "_generated"]

KINDS = {int: "whole number", float: "number", bool: "true, false", str: "text", Any: "text, or a mapping"}


def options_page() -> str:
    """Every key of a run as Markdown tables, a section each, from the dataclasses themselves."""
    sections: dict[str, list[str]] = {}
    for path, field, _ in leaves(RunConfig()):
        section = path.partition(".")[0] if "." in path else "top"
        sections.setdefault(section, []).append(_row(path, field))
    head = "| key | default | values | meaning |\n|---|---|---|---|\n"
    titles = {name: f"### `{name}`" if name != "top" else "### At the top" for name in sections}
    return "\n\n".join(f"{titles[name]}\n\n{head}" + "\n".join(rows) for name, rows in sections.items()) + "\n"


def groups_page() -> str:
    """The config groups and what can be chosen in each."""
    rows = [f"| `{name}` | {', '.join(f'`{option}`' for option in options)} |" for name, options in groups().items()]
    return "\n".join(["| group | choices |", "|---|---|", *rows]) + "\n"


def _row(path: str, field: Any) -> str:
    value = _default(path)
    default = "empty" if value is None else f"`{value}`".lower() if isinstance(value, bool) else f"`{value}`"
    return f"| `{path}` | {default} | {_values(path, field)} | {_text(field.metadata['help'])} |"


def _text(sentence: str) -> str:
    """A plain sentence, with what Markdown or HTML would take for markup marked as text."""
    return "".join(f"\\{char}" if char in "*_<>|[]$`" else char for char in sentence)


def _default(path: str) -> Any:
    value: Any = RunConfig()
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _values(path: str, field: Any) -> str:
    """Choices, or kind and bounds."""
    choices, low, high = (field.metadata[name] for name in ("choices", "minimum", "maximum"))
    if choices:
        return ", ".join(f"`{choice}`" for choice in choices)
    annotation = find_field(RunConfig, path)[1]
    kind = next((text for kind, text in KINDS.items() if annotation in (kind, kind | None)), "list")
    bounds = [f"{sign} {bound:g}" for sign, bound in (("≥", low), ("≤", high)) if bound is not None]
    return " ".join([kind, ", ".join(bounds)]).strip()


def setup(app: Any) -> None:
    """Write the generated parts before Sphinx reads the pages that include them."""
    folder = Path(__file__).parent / "_generated"
    folder.mkdir(exist_ok=True)
    for name, content in (("options.md", options_page()), ("groups.md", groups_page())):
        (folder / name).write_text(content, encoding="utf-8")
