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
OF_PEERS = {
    "transformers": [
        "transformers-5.24.0-py3-none-any.whl",
        "huggingface_hub-2.4.0-py3-none-any.whl",
        DOWNLOADED[0],
        *DOWNLOADED[4:],
    ],
    "einops": ["einops-0.8.2-py3-none-any.whl"],
    "mamba-ssm": ["mamba_ssm-2.3.2.post1.tar.gz"],
}
"""What pip leaves when asked for them."""


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
        folder.mkdir(exist_ok=True)
        of_peer = next((names for peer, names in OF_PEERS.items() if arguments[-1].startswith(peer)), DOWNLOADED)
        for name in of_peer if arguments[0] == "download" else []:
            (folder / name).write_bytes(b"wheel " * 100)

    def run(python: str = "3.12", *options: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["wheelhouse", str(tmp_path / "wheels"), "--python", python, *options])
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


def test_peers_come_without_what_is_there_already(collect, calls, tmp_path):
    status, output = collect("3.12", "--peers")
    assert status == 0, output
    found = {file.name for file in (tmp_path / "wheels/peers").iterdir()} - {"contents.json"}
    assert found == {*OF_PEERS["transformers"][:2], *OF_PEERS["einops"], *OF_PEERS["mamba-ssm"]}
    (source,) = [call for call in calls if call[-1].startswith("mamba-ssm")]
    assert "--no-binary=mamba-ssm" in source
    assert "--no-build-isolation" in source
    assert not [call for call in calls if call[-1].startswith("causal-conv1d")], "it is compiled, and has no wheel"


def test_peers_fit_the_versions_that_were_collected_before(collect, wheelhouse, monkeypatch):
    held, pip = [], wheelhouse._pip

    def reading(*arguments: str) -> None:
        constraints = [Path(word.partition("=")[2]) for word in arguments if word.startswith("--constraint=")]
        held.extend(file.read_text() for file in constraints if arguments[-1].startswith("transformers"))
        pip(*arguments)

    monkeypatch.setattr(wheelhouse, "_pip", reading)
    collect("3.12", "--peers")
    assert held == ["numpy==2.5.5\nhydra_core==1.3.8\n"] or held == ["hydra_core==1.3.8\nnumpy==2.5.5\n"]


def test_a_peer_that_cannot_be_had_is_said_and_tried_again(collect, calls, wheelhouse, monkeypatch, tmp_path):
    working = wheelhouse._pip

    def without_torch(*arguments: str) -> None:
        if arguments[-1].startswith("mamba-ssm"):
            raise subprocess.CalledProcessError(1, ["pip", *arguments])
        working(*arguments)

    monkeypatch.setattr(wheelhouse, "_pip", without_torch)
    status, output = collect("3.12", "--peers")
    assert status == 0
    assert "going on without mamba-ssm" in output
    assert (tmp_path / "wheels/peers/transformers-5.24.0-py3-none-any.whl").exists()
    monkeypatch.setattr(wheelhouse, "_pip", working)
    assert "going on without" not in collect("3.12", "--peers")[1]
    before = len(calls)
    assert "peers is complete: nothing to download" in collect("3.12", "--peers")[1]
    assert len(calls) == before
