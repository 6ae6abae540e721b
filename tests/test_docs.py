"""What README and docs say is there: commands, links, pictures, keys, metrics."""

import re
import runpy
import shlex
from argparse import ArgumentParser
from functools import cache
from pathlib import Path

import pytest

from nemohybrid.__main__ import COMMANDS
from nemohybrid.cli import data, export_hf, from_megatron, generate, import_hf, launch_options, parity, plan, sweep_lr
from nemohybrid.cli.train import HYDRA_FLAGS, SWEEP_FLAGS
from nemohybrid.config.check import find_field
from nemohybrid.config.overrides import usable_overrides
from nemohybrid.config.run_config import RunConfig
from nemohybrid.config.section import leaves
from nemohybrid.config.violation import Violation

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    + [page for page in (ROOT / "docs").rglob("*.md") if not {"_build", "_generated"} & set(page.parts)]
)
SHELL_BLOCK = re.compile(r"^```bash\n(.*?)^```", re.DOTALL | re.MULTILINE)
INLINE_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
FENCE = re.compile(r"^(```|~~~).*?^\1", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
TABLE_KEY = re.compile(r"^\| ((?:`[^`]+`(?:, )?)+)", re.MULTILINE)
FLAGS_WITH_A_WORD = ("--cfg", "-c", "--info", "-i", "--package", "-p")
PARSERS = {
    "generate": generate.parser,
    "data": data.build_parser,
    "from-megatron": from_megatron.build_parser,
    "import-hf": import_hf.parser,
    "export-hf": export_hf.parser,
    "sweep-lr": sweep_lr.parser,
    "parity": parity.parser,
    "plan": plan.build_parser,
    "launch": launch_options.parser,
}


def name_of(page: Path) -> str:
    """For test ids and messages."""
    return page.relative_to(ROOT).as_posix()


@cache
def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def quoted_lines(page: Path) -> list[str]:
    """Lines of shell blocks, continued ones joined, and inline code."""
    blocks = [line for block in SHELL_BLOCK.findall(read(page)) for line in block.replace("\\\n", " ").splitlines()]
    return blocks + INLINE_CODE.findall(FENCE.sub("", read(page)))


def nemohybrid_commands(page: Path) -> list[list[str]]:
    """Every `nemohybrid COMMAND ...` that the page shows with arguments, as words."""
    found = []
    for line in quoted_lines(page):
        if not re.search(r"\bnemohybrid (-h|--help|[a-z]+)", line):
            continue
        words = shlex.split(line, comments=True)
        starts = [i for i, word in enumerate(words[:-1]) if word == "nemohybrid" and words[i + 1] in COMMANDS]
        if starts and "..." not in words:
            found.append(words[starts[-1] + 1 :])
    return found


def complaint_of(command: str, words: list[str]) -> str:
    """Why the command line would be refused, or an empty string."""
    if "--help" in words:
        return ""
    if command in PARSERS:
        return parser_complaint(PARSERS[command](), words)
    return override_complaint(words)


def parser_complaint(parser: ArgumentParser, words: list[str]) -> str:
    """The argparse commands; a prose mention such as `nemohybrid data prepare` has no options to check."""
    if not any(word.startswith("-") for word in words):
        return ""
    try:
        parser.parse_args(words)
    except SystemExit:
        return "argparse refuses it"
    return ""


def override_complaint(words: list[str]) -> str:
    """Hydra's flags, and overrides as `nemohybrid train` checks them before it composes."""
    overrides, flags = [], []
    for previous, word in zip(["", *words], words, strict=False):
        if previous not in FLAGS_WITH_A_WORD:
            (flags if word.startswith("-") else overrides).append(word)
    if unknown := [flag for flag in flags if flag not in HYDRA_FLAGS + SWEEP_FLAGS]:
        return f"unknown flag {unknown[0]}"
    violations: list[Violation] = []
    usable_overrides(overrides, violations)
    return "; ".join(map(str, violations))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_quoted_command_parses(page: Path) -> None:
    for command, *words in nemohybrid_commands(page):
        complaint = complaint_of(command, words)
        assert not complaint, f"{name_of(page)}: nemohybrid {command} {shlex.join(words)}: {complaint}"


def test_a_wrong_command_would_be_noticed() -> None:
    for command, words in {
        "train": ["optim.lrr=1"],
        "params": ["model=tinny"],
        "generate": ["--promt", "a"],
        "data": ["prepare", "--inputs", "a"],
    }.items():
        assert complaint_of(command, words), f"nemohybrid {command} {words} was accepted"


def test_the_readme_shows_every_command() -> None:
    shown = {command for command, *_ in nemohybrid_commands(ROOT / "README.md")}
    assert shown == set(COMMANDS), f"README shows {sorted(shown)}, there are {sorted(COMMANDS)}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_script_that_is_named_exists(page: Path) -> None:
    for line in quoted_lines(page):
        for script in re.findall(r"\bscripts/[\w./]+", line):
            assert (ROOT / script).is_file(), f"{name_of(page)} names {script}"


def test_the_two_commands_of_the_readme_are_those_of_the_house() -> None:
    commands = [" ".join(shlex.split(line, comments=True)) for line in quoted_lines(ROOT / "README.md")]
    for script, runs in {"scripts/quickstart.sh": "experiment=quickstart", "scripts/test.sh": "pytest"}.items():
        assert f"bash {script}" in commands, f"README does not say `bash {script}`"
        assert runs in read(ROOT / script), f"{script} no longer runs {runs}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_and_picture_exists(page: Path) -> None:
    for target in LINK.findall(FENCE.sub("", read(page))):
        path, _, anchor = target.partition("#")
        if "://" in target or target.startswith("mailto:"):
            continue
        file = (page.parent / path) if path else page
        assert file.exists(), f"{name_of(page)} links to {target}"
        if anchor and file != ROOT / "docs" / "contributing.md":  # that page includes the one that has the heading
            assert anchor in anchors(file), (
                f"{name_of(page)} links to {target}; {file.name} has {sorted(anchors(file))}"
            )


@cache
def anchors(page: Path) -> set[str]:
    """Headings as links name them, on GitHub and in the documentation."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", read(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_key_in_a_table_exists(page: Path) -> None:
    sections = {path.split(".")[0] for path, _, _ in leaves(RunConfig())}
    for cell in TABLE_KEY.findall(read(page)):
        for code in INLINE_CODE.findall(cell):
            key = code.partition("=")[0]
            if re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", key) and key.split(".")[0] in sections:
                complaint = find_field(RunConfig, key)[2]
                assert not complaint, f"{name_of(page)}: {complaint}"


def test_the_metrics_table_lists_what_is_written() -> None:
    section = read(ROOT / "docs" / "training.md").partition("## metrics.jsonl")[2].partition("\n## ")[0]
    listed = set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE))
    source = "".join(file.read_text() for file in (ROOT / "src/nemohybrid/train").rglob("*.py"))
    written = set(re.findall(r'metrics\["(\w+)"\]', source)) | set(re.findall(r'^ {12}"(\w+)": ', source, re.MULTILINE))
    unknown = {key for key in listed if not re.search(rf"\b{key}\b", source)}
    assert written, "no metric was found in the source: this test looks for them in the wrong way"
    assert not unknown, f"the table lists {sorted(unknown)}, which no code of train/ knows"
    assert written <= listed, f"the table lacks {sorted(written - listed)}"


def test_the_tables_of_the_documentation_hold_every_key() -> None:
    settings = runpy.run_path(str(ROOT / "docs" / "conf.py"))
    table = settings["options_page"]()
    missing = [path for path, _, _ in leaves(RunConfig()) if f"| `{path}` |" not in table]
    assert not missing, f"docs/_generated/options.md would lack {missing}"
