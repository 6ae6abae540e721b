"""scripts/wheelhouse.py, with a stand-in for pip that needs no network."""

import importlib
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOWNLOADED = [
    "numpy-2.5.5-cp312-cp312-manylinux_2_28_x86_64.whl",
    "hydra_core-1.3.8-py3-none-any.whl",
    "torch-2.11.0+placeholder-py3-none-any.whl",
    "huggingface_hub-1.0+placeholder-py3-none-any.whl",
    "typing_extensions-4.16.0-py3-none-any.whl",
    "filelock-4.2.11-py3-none-any.whl",
]


@pytest.fixture
def wheelhouse(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("wheelhouse")


@pytest.fixture
def calls() -> list[tuple[str, ...]]:
    """The arguments of every call of pip, in order."""
    return []


@pytest.fixture
def collect(calls, wheelhouse, monkeypatch, tmp_path, capsys):
    """`collect("3.12") -> (exit status, output)` into <tmp_path>/wheels."""

    def pip(*arguments: str) -> None:
        calls.append(arguments)
        folder = Path(arguments[arguments.index("--wheel-dir" if arguments[0] == "wheel" else "--dest") + 1])
        folder.mkdir()
        for name in DOWNLOADED if arguments[0] == "download" else []:
            (folder / name).write_bytes(b"wheel " * 100)

    def run(python: str = "3.12") -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["wheelhouse", str(tmp_path / "wheels"), "--python", python])
        status = wheelhouse.main()
        return status, "".join(capsys.readouterr())

    monkeypatch.setattr(wheelhouse, "_pip", pip)
    return run


def test_what_is_wanted_is_the_core_of_pyproject_and_the_test_tools(wheelhouse):
    wanted = {line.split(">")[0].split("=")[0] for line in wheelhouse.requirements(ROOT / "pyproject.toml")}
    assert {"numpy", "hydra-core", "megatron-core", "tokenizers", "pytest", "pytest-timeout", "hypothesis"} <= wanted
    assert not wanted & {"torch", "triton", "filelock", "pyarrow", "ruff"}, "these come with the machine, or are extras"


def test_torch_and_what_comes_with_it_stay_out(collect, tmp_path):
    status, output = collect()
    assert status == 0, output
    assert {wheel.name for wheel in (tmp_path / "wheels").glob("*.whl")} == set(DOWNLOADED[:2])
    assert "2 wheels, at most 60 MiB" in output


def test_pip_can_only_satisfy_torch_by_the_placeholder(collect, calls):
    collect()
    download = next(call for call in calls if call[0] == "download")
    assert "torch==2.11.0+placeholder" in download
    assert "--only-binary=:all:" in download
    assert "--python-version=3.12" in download


def test_a_second_run_downloads_nothing(collect, calls):
    collect()
    before = len(calls)
    status, output = collect()
    assert (status, len(calls)) == (0, before)
    assert "nothing to download" in output


def test_another_python_or_a_lost_wheel_collects_again(collect, calls, tmp_path):
    collect()
    (tmp_path / "wheels" / "stale-1.0-py3-none-any.whl").touch()
    for change in ("3.11", "3.12"):
        before = len(calls)
        collect(change)
        assert len(calls) > before, change
    assert not (tmp_path / "wheels" / "stale-1.0-py3-none-any.whl").exists()
    (tmp_path / "wheels" / DOWNLOADED[0]).unlink()
    before = len(calls)
    collect()
    assert len(calls) > before, "a missing wheel"


def test_too_much_to_carry_fails_with_the_table(collect, wheelhouse, monkeypatch):
    monkeypatch.setattr(wheelhouse, "LIMIT", 1000)
    for attempt in ("first", "second"):  # complete is not the same as light enough
        status, output = collect()
        assert status == 1, attempt
        assert DOWNLOADED[0] in output
        assert "over 0 MiB" in output


def test_a_failure_of_pip_fails_and_is_tried_again(collect, wheelhouse, monkeypatch, tmp_path):
    def offline(*arguments: str) -> None:
        raise subprocess.CalledProcessError(1, ["python", "-m", "pip", "--disable-pip-version-check", *arguments])

    working = wheelhouse._pip
    monkeypatch.setattr(wheelhouse, "_pip", offline)
    status, output = collect()
    assert status == 1
    assert "pip wheel failed" in output
    monkeypatch.setattr(wheelhouse, "_pip", working)
    assert collect()[0] == 0
