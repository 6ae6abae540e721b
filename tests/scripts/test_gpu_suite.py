"""scripts/gpu_suite.sh in rehearsal, and the rules of its stages on stand-ins."""

import importlib
import json
import os
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def suite(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("gpu_suite")


@pytest.fixture
def shell(tmp_path):
    """`shell("--rehearse", wheels="") -> CompletedProcess` of the script, with this Python first in PATH."""

    def run(*arguments: str, wheels: str = "") -> subprocess.CompletedProcess[str]:
        path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
        return subprocess.run(
            ["bash", str(ROOT / "scripts/gpu_suite.sh"), *arguments],
            cwd=tmp_path,
            env=os.environ | {"PATH": path, "NEMOHYBRID_WHEELHOUSE": wheels, "OMP_NUM_THREADS": "1"},
            text=True,
            capture_output=True,
            timeout=120,
        )

    return run


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_rehearsed_stage_leaves_its_figures_log_and_summary(shell, tmp_path):
    done = shell("--rehearse", "--only", "throughput", "--out", "results")
    assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "results"
    assert json.loads((out / "machine.json").read_text())["torch"] == torch.__version__
    (result,) = json.loads((out / "results.json").read_text())
    assert (result["stage"], result["verdict"]) == ("throughput", "ok")
    assert result["figures"]["tokens_per_second"] > 0
    assert "4 steps of 2 x 64 tokens" in (out / "throughput.log").read_text()
    assert (out / "summary.txt").read_text() in done.stdout


def test_missing_wheels_and_wheels_for_another_python_are_said(shell, tmp_path):
    done = shell("--rehearse", wheels=str(tmp_path))
    assert done.returncode == 2
    assert "scripts/wheelhouse.sh" in done.stderr
    (tmp_path / "foreign-1.0-cp27-cp27m-win32.whl").touch()
    done = shell("--rehearse", wheels=str(tmp_path))
    assert done.returncode == 2
    assert "these wheels do not install" in done.stderr


def test_peers_are_taken_from_the_wheelhouse_and_may_be_broken(shell, tmp_path):
    says = (
        "import os, sys, importlib.util as u; print(os.environ.get('NEMOHYBRID_MAMBA_SSM'), bool(u.find_spec('peer9')))"
    )
    wheel(tmp_path, "core9", {"sitecustomize.py": says})
    wheel(tmp_path / "peers", "peer9", {"peer9.py": ""})
    with tarfile.open(tmp_path / "peers/mamba_ssm-9.9.tar.gz", "w:gz") as sdist:
        sdist.addfile(tarfile.TarInfo("mamba_ssm-9.9/mamba_ssm/__init__.py"))
    done = shell("--help", wheels=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "/mamba_ssm True\n" in done.stdout
    (tmp_path / "peers/peer9-1.0-py3-none-any.whl").write_text("no wheel")
    (tmp_path / "peers/mamba_ssm-9.9.tar.gz").write_text("no archive")
    done = shell("--help", wheels=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "None False\n" in done.stdout
    assert "peers do not install here" in done.stderr


def wheel(folder: Path, name: str, files: dict[str, str]) -> None:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        files |= {"METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", "RECORD": ""}
        files |= {"WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"}
        for file, text in files.items():
            archive.writestr(file if file.endswith(".py") else f"{name}-1.0.dist-info/{file}", text)


def test_every_stage_runs_whatever_became_of_the_one_before(suite, tmp_path):
    def unsatisfied():
        raise suite.StageError("val_bits_per_byte is 7.1")

    table = suite.Outcome({"tokens_per_second": 123456.7}, ["a line of its own"])
    stages = [
        suite.Stage("fails", 60, python("print('said before'); raise SystemExit(3)")),
        suite.Stage("measures", 60, python("pass"), lambda: table),
        suite.Stage("disappoints", 60, python("pass"), unsatisfied),
        suite.Stage("missing", 60, [str(tmp_path / "no_such_program")]),
    ]
    results = suite.run_all(suite.Plan(tmp_path, rehearse=True), stages)
    verdicts = [result.verdict for result in results]
    assert verdicts[:3] == ["exit status 3", "ok", "val_bits_per_byte is 7.1"]
    assert "no_such_program" in verdicts[3]
    assert (tmp_path / "fails.log").read_text() == "said before\n"
    summary = (tmp_path / "summary.txt").read_text().splitlines()
    assert len(summary) == 6
    assert summary[0] == "A rehearsal: none of these figures measures anything."
    assert summary[2].endswith("ok  tokens_per_second 123,457")
    assert summary[3] == "    a line of its own"


def test_a_benchmark_that_fails_leaves_the_figures_it_had(suite, tmp_path):
    file = tmp_path / "out.json"
    written = {"machine": {"peer": "mamba-ssm is not here"}, "layers": [], "left_out": ["M of nemotron_h_8b"]}
    code = f"import pathlib; pathlib.Path({str(file)!r}).write_text({json.dumps(written)!r}); raise SystemExit(1)"
    stage = suite.Stage("layers", 60, python(code), lambda: suite.gpu_tables.read(file, suite.gpu_tables.layers))
    result = suite.run_stage(stage, tmp_path)
    assert result.verdict == "exit status 1"
    assert result.lines == ["peer: mamba-ssm is not here", "left out for want of time: 1, named in out.json"]


@pytest.mark.parametrize("rehearse", [True, False], ids=["rehearsed", "in earnest"])
def test_benchmarks_are_called_with_arguments_that_they_have(suite, monkeypatch, tmp_path, rehearse):
    monkeypatch.syspath_prepend(str(ROOT / "scripts/bench/kernels"))
    monkeypatch.syspath_prepend(str(ROOT / "scripts/bench"))
    for make in (suite.kernels, suite.roofline, suite.layers, suite.model_4b, suite.model_1b, suite.precision_gemm):
        stage = make(suite.Plan(tmp_path, rehearse))
        options = importlib.import_module(Path(stage.command[1]).stem)._parse(stage.command[2:])
        assert (options.rehearse, options.out) == (rehearse, tmp_path / f"{stage.name}.json")
        assert rehearse or options.seconds <= stage.limit_s - 100, f"{stage.name} may begin what it cannot end"


def test_a_part_or_a_stage_of_the_checks_can_be_chosen(suite, tmp_path):
    def names(*only: str) -> list[str]:
        return [stage.name for stage in suite.chosen_stages(list(only) or None, suite.Plan(tmp_path, True))]

    assert names("layers", "nccl") == ["nccl", "layers"]
    assert names("checks") == ["tests", "quickstart", "nccl", "throughput"]
    assert names() == [make.__name__ for make in suite.STAGES]


def test_every_file_of_gpu_tests_belongs_to_one_stage(suite, tmp_path):
    plan = suite.Plan(tmp_path, True)
    ignored = [word.partition("=")[2] for word in suite.tests(plan).command if word.startswith("--ignore=")]
    alone = [
        word
        for make in (suite.full_size, suite.shipped, suite.precision)
        for word in make(plan).command
        if "tests/gpu" in word
    ]
    assert sorted(ignored) == sorted(alone)
    assert all((ROOT / file).is_file() for file in alone)


def test_a_stage_past_its_limit_is_stopped_with_its_children(suite, tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "GRACE_S", 0.2)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    child = f"{deaf}open({str(tmp_path / 'child')!r}, 'w').write(str(__import__('os').getpid())); time.sleep(60)"
    parent = f"{deaf}import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    result = suite.run_stage(suite.Stage("hangs", 2.0, python(parent)), tmp_path)
    assert result.verdict == "stopped after 2 s"
    assert result.seconds < 10
    assert not is_running(int((tmp_path / "child").read_text())), "the child of a stopped stage goes on"


def is_running(process: int) -> bool:
    """Waits a moment for a killed process to be gone; a zombie is gone."""
    status = Path(f"/proc/{process}/stat")
    for _ in range(50):
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return False
        time.sleep(0.1)
    return True


@pytest.mark.parametrize(
    "records, said",
    [
        ([{"step": 9, "val_loss": 1.7, "val_bits_per_byte": 2.31}], None),
        ([{"step": 9, "val_loss": 1.7, "val_bits_per_byte": 2.5}], "is 2.5, it should be below 2.5"),
        ([{"step": 9, "val_loss": "nan", "val_bits_per_byte": "nan"}], "is nan"),
        ([{"step": 1, "loss": 5.0}], "missing"),
    ],
    ids=["learnt", "not learnt", "nan", "not evaluated"],
)
def test_the_quickstart_must_reach_its_quality(suite, tmp_path, records, said):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if said is None:
        assert suite._quality(tmp_path, 2.5).figures["val_bits_per_byte"] == 2.31
    else:
        with pytest.raises(suite.StageError, match=said):
            suite._quality(tmp_path, 2.5)


def test_speed_is_the_median_of_the_warm_half_and_memory_the_peak(suite, tmp_path):
    speeds = [1.0, 2.0, 100.0, 110.0, 5.0, 105.0]
    steps = [
        {"step": i, "tokens_per_second": v, "seconds": 1 / v, "mfu": None, "memory_device_gib": 9.0 - i}
        for i, v in enumerate(speeds)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    assert suite._speed(tmp_path) == {"tokens_per_second": 105.0, "seconds": 1 / 105, "memory_device_gib": 9.0}


def test_skipped_gpu_tests_are_a_failure(suite, tmp_path):
    report = tmp_path / "report.xml"
    skipped = '<testcase file="a.py" classname="a" name="t"><skipped message="no GPU"/></testcase>'
    report.write_text(f"<testsuites><testsuite><testcase name='u'/>{skipped}</testsuite></testsuites>")
    with pytest.raises(suite.StageError, match="NOT ALLOWED"):
        suite._test_counts(report)


def test_only_tests_for_other_hardware_may_be_skipped_and_count_as_that(suite, tmp_path):
    report, file = tmp_path / "report.xml", "tests/gpu/test_precision_on_gpu.py"

    def written(reason: str) -> None:
        skipped = f'<testcase file="{file}" classname="a" name="t"><skipped message="{reason}"/></testcase>'
        report.write_text(f"<testsuites><testsuite><testcase name='u'/>{skipped}</testsuite></testsuites>")

    written("torch multiplies NVFP4 from compute capability 10.0 on (Blackwell), it has 9.0")
    assert suite._test_counts(report, suite.OTHER_HARDWARE).figures == {"tests": "1 passed, 0 failed, 1 skipped"}
    written("torch 2.13.0 refuses: CUBLAS_STATUS_NOT_SUPPORTED")
    with pytest.raises(suite.StageError, match="NOT ALLOWED"):
        suite._test_counts(report, suite.OTHER_HARDWARE)


def test_the_limits_of_every_part_leave_room_in_nine_minutes(suite, tmp_path):
    for part, stages in suite.PARTS.items():
        limits = [make(suite.Plan(tmp_path, rehearse=False)).limit_s for make in stages]
        assert sum(limits) <= 9 * 60 - 10, part


def test_a_machine_without_a_gpu_is_told_so(suite, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu_suite", "--out", str(tmp_path / "results")])
    assert suite.main() == 3
    assert "--rehearse" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_results_are_never_mixed_with_older_ones(suite, monkeypatch, tmp_path, capsys):
    (tmp_path / "old").touch()
    monkeypatch.setattr("sys.argv", ["gpu_suite", "--rehearse", "--out", str(tmp_path)])
    assert suite.main() == 2
    assert "is not empty" in capsys.readouterr().err
