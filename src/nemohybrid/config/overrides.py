"""The words of a command line: each is read and judged alone, so that all faults can be shown at once."""

from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from nemohybrid.config.check import alternatives, build, find_field, is_section, value_problem
from nemohybrid.config.groups import groups
from nemohybrid.config.run_config import RunConfig
from nemohybrid.config.violation import Violation
from nemohybrid.errors import did_you_mean


def usable_overrides(words: Sequence[str], violations: list[Violation]) -> list[Override]:
    """The words of a command line that can be composed; why the others cannot is appended to `violations`."""
    parser, usable = OverridesParser.create(), []
    for word in words:
        try:
            override = parser.parse_override(word)
        except HydraException:
            violations.append(Violation(word, "is no override. Write key=value; quote values with blanks, commas or ="))
            continue
        if problem := _problem(override):
            violations.append(Violation(word, problem))
        else:
            usable.append(override)
    return usable


def _problem(override: Override) -> str:
    key = override.key_or_group
    if key.split(".")[0] == "hydra" or key.startswith("hydra/"):
        return ""
    return _group_problem(override) if _is_group_choice(override) else _key_problem(override)


def _is_group_choice(override: Override) -> bool:
    return "/" in override.key_or_group or override.key_or_group.split("@")[0] in groups()


def _group_problem(override: Override) -> str:
    options = groups().get(override.key_or_group)
    if options is None:
        return f"unknown config group {override.key_or_group!r}" + did_you_mean(override.key_or_group, groups())
    if override.is_delete() or override.is_add():
        return f"every group is already chosen from. Write {override.key_or_group}=NAME, one of: {', '.join(options)}"
    if override.is_sweep_override():
        return ""
    name = str(override.value())
    if name in options or (override.value() is None and override.key_or_group == "experiment"):
        return ""
    return (
        f"there is no {override.key_or_group} {name!r}{did_you_mean(name, options) or '.'} Known: {', '.join(options)}"
    )


def _key_problem(override: Override) -> str:
    field, annotation, complaint = find_field(RunConfig, override.key_or_group)
    if complaint or field is None:
        return complaint
    if override.is_delete():
        return "a key cannot be deleted. Set it to null where it may be empty"
    if override.is_sweep_override():
        return ""
    value = override.value()
    if isinstance(value, str) and value.startswith("${"):
        return ""
    if is_section(annotation):
        if not isinstance(value, dict):
            return "is a section, not a value"
        inside: list[Violation] = []
        build(annotation, value, inside, f"{override.key_or_group}.")
        return "; ".join(f"{v.where}: {v.message}" for v in inside)
    if isinstance(value, int | float) and str in alternatives(annotation):
        value = str(value)  # as OmegaConf does: run.dir=2026
    problem = value_problem(field, annotation, value)
    return problem and problem[0].lower() + problem[1:]
