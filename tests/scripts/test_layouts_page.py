"""The page of layouts: every one is legal, every published model has a small and a large one, and numbers are what is counted."""

import importlib
from pathlib import Path

import pytest

from nemohybrid.config.groups import groups

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def page():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts" / "bench"))
        yield importlib.import_module("layouts_page")


@pytest.fixture(scope="module")
def rows(page) -> list[str]:
    return [line for line in page.PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `nemotron")]


def test_rules_accept_every_layout_and_the_page_has_it(page, rows):
    assert len(rows) == len(page.LAYOUTS), "python scripts/bench/layouts_page.py writes the page anew"
    for layout, row in zip(page.LAYOUTS, rows, strict=True):
        config = layout.config()
        batch = f"{config.train.global_batch} x {config.data.sequence_length:,}"
        layout_words = f"`{' '.join(page.words(config.parallel))}`"
        assert row.startswith(f"| `{layout.name}` | {layout.gpus} | {layout_words} | {batch} |"), row


def test_every_published_model_has_a_small_and_a_large_layout(page):
    sizes = {name: [one.gpus for one in page.LAYOUTS if one.name == name] for name in groups()["model"]}
    published = {name: own for name, own in sizes.items() if name.startswith("nemotron")}
    assert len(published) == 11
    for name, own in published.items():
        assert 8 <= min(own) <= 256 <= max(own) <= 1024, f"{name} has {own}"
    assert min(min(own) for own in published.values()) == 8
    assert max(max(own) for own in published.values()) == 1024


@pytest.mark.parametrize("number", [4, pytest.param(28, marks=pytest.mark.slow)])
def test_a_row_is_what_is_counted(page, rows, number):
    layout = page.LAYOUTS[number]
    assert page.row(layout, layout.config()) == rows[number]


def test_all_long_context_experiments_are_on_the_page(page):
    long = {name for name in groups()["experiment"] if "_long" in name}
    assert long == {layout.name for layout in page.LAYOUTS if layout.long}
