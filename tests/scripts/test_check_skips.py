"""scripts/check_skips.py, on reports that pytest itself writes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/check_skips.py"

SUITE = """
import pytest

def test_runs():
    pass

@pytest.mark.parametrize("case", ["a/b", "x[1]"])
class TestInside:
    def test_skips(self, case):
        pytest.skip("needs a CUDA device")

@pytest.mark.xfail(reason="known fault")
def test_xfails():
    raise ValueError
"""
ALLOWED = """
# comment
sub/test_suite.py::TestInside::test_skips* | needs a CUDA*
sub/test_suite.py::test_xfails | known fault
sub/test_module.py* | *
"""


def count_skips(folder: Path, allowed: str, **suite: str) -> tuple[int, list[str]]:
    """Exit status and lines of the script after pytest ran `suite`, a mapping of module names to their source."""
    (folder / "sub").mkdir()
    (folder / "pytest.ini").touch()
    for name, source in suite.items():
        (folder / f"sub/{name}.py").write_text(source)
    (folder / "allowed.txt").write_text(allowed)
    subprocess.run(
        [sys.executable, "-m", "pytest", "--junit-xml=report.xml", "-o", "junit_family=xunit1", "sub"],
        cwd=folder,
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},  # the suite needs no plugin, and they take seconds
        capture_output=True,
        timeout=60,
    )
    done = subprocess.run(
        [sys.executable, SCRIPT, "report.xml", "allowed.txt"], cwd=folder, text=True, capture_output=True, timeout=60
    )
    return done.returncode, (done.stdout + done.stderr).splitlines()


def test_allowed_skips_are_listed_and_pass(tmp_path):
    module = "import pytest\npytest.skip('whole module', allow_module_level=True)\n"
    status, lines = count_skips(tmp_path, ALLOWED, test_suite=SUITE, test_module=module)
    assert lines[-1] == "1 passed, 0 failed, 4 skipped"
    assert "skipped sub/test_suite.py::TestInside::test_skips[a/b]: needs a CUDA device" in lines
    assert status == 0, lines


def test_a_skip_that_nobody_allowed_fails(tmp_path):
    status, lines = count_skips(tmp_path, "sub/*::test_xfails | *\n*::test_skips* | another reason\n", test_suite=SUITE)
    assert status == 1
    assert sum(line.startswith("NOT ALLOWED: skipped sub/test_suite.py::TestInside") for line in lines) == 2, lines


def test_a_run_without_tests_fails(tmp_path):
    assert count_skips(tmp_path, "") == (1, ["no test ran", "0 passed, 0 failed, 0 skipped"])


@pytest.mark.parametrize(
    "source",
    ["def test_fails(): assert False", "import no_such_module", "def test_errs(no_such_fixture): pass"],
    ids=["failure", "broken module", "broken fixture"],
)
def test_failures_and_errors_count_as_failed(tmp_path, source):
    status, lines = count_skips(tmp_path, "", test_suite=source)
    assert (status, lines[-1]) == (1, "0 passed, 1 failed, 0 skipped")


def test_a_line_that_is_no_rule_is_named(tmp_path):
    status, lines = count_skips(tmp_path, "tests/gpu/*\n", test_suite="def test_runs(): pass\n")
    assert status == 1
    assert "allowed.txt:1: expected `node id glob | reason glob`" in lines[0]
