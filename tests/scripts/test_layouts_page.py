"""The page of layouts: every one is legal, and the page has a row for each."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def page():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts" / "bench"))
        yield importlib.import_module("layouts_page")


def test_the_page_has_a_row_for_every_layout(page):
    rows = [line for line in page.PAGE.read_text().splitlines() if line.startswith("| `nemotron")]
    assert [line.split("|")[1:3] for line in rows] == [[f" `{one.model}` ", f" {one.gpus} "] for one in page.LAYOUTS]


@pytest.mark.parametrize("number", [4, 9, 12, 15])
def test_rules_accept_layouts_of_long_rows(page, number):
    """Of the others the script says it: `--check`."""
    config = page.LAYOUTS[number].config()
    assert config.parallel.context > 1
    assert config.data.sequence_length >= 524288
