"""The stages of scripts/gpu_suite.sh, which prepares the Python that runs this.

Every stage runs, whatever became of the one before, with a log and a time limit of its own; a stage that measures reads
its figures from what the run wrote. To add one, write a function that returns a `Stage` and name it in `PARTS`.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import gpu_tables
from check_skips import read_report, verdict
from gpu_tables import Outcome

ROOT = Path(__file__).parents[1]
GRACE_S = 10.0
"""From asking a stage to stop until it is killed."""


class StageError(Exception):
    """A stage whose command succeeded, but not its result."""


@dataclass(frozen=True)
class Plan:
    """Where results go and on what the stages run; a rehearsal is small and on the CPU."""

    out: Path
    rehearse: bool

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"


Rules = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Stage:
    """`command` for at most `limit_s` seconds; then `outcome()` reads what it measured, or raises StageError."""

    name: str
    limit_s: float
    command: list[str]
    outcome: Callable[[], Outcome] = Outcome
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Result:
    """What became of a stage: `ok`, or why not, its figures, and lines of a table."""

    stage: str
    verdict: str
    seconds: float
    figures: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)


def tests(plan: Plan) -> Stage:
    """tests/gpu but what takes long, none of them skipped."""
    return _tests(plan, "tests", 210, "tests/gpu", *(f"--ignore=tests/gpu/{file}" for file in LONG_TESTS.values()))


def full_size(plan: Plan) -> Stage:
    """Gradients at the sizes of Nemotron-H-8B, and rows whose offsets do not fit into 32 bits."""
    return _long_tests(plan, "full_size")


def shipped(plan: Plan) -> Stage:
    """Every kernel in every configuration that is shipped."""
    return _long_tests(plan, "shipped")


def precision(plan: Plan) -> Stage:
    """FP8 and NVFP4: bytes, products, a run. What other hardware is for is skipped, and named in the log."""
    stage = _tests(plan, "precision", 300, f"tests/gpu/{LONG_TESTS['precision']}")
    return replace(stage, outcome=lambda: _test_counts(plan.out / "precision.xml", OTHER_HARDWARE))


def precision_gemm(plan: Plan) -> Stage:
    """The products of Nemotron-H-8B in low precision and in bf16."""
    return _benchmark(plan, "precision_gemm", "../precision_gemm.py", gpu_tables.precision, seconds=300)


def quickstart(plan: Plan) -> Stage:
    """The quickstart in bf16 learns what it learns on a CPU."""
    small = ["train.steps=4", "train.evaluate_every=4", "model.hidden_size=32", "sample.prompts=[]"]
    command = _train(
        plan, "quickstart", *(small if plan.rehearse else []), "experiment=quickstart", "model.dtype=bfloat16"
    )
    return Stage("quickstart", 150, command, lambda: _quality(plan.out / "quickstart", 9.0 if plan.rehearse else 2.5))


def nccl(plan: Plan) -> Stage:
    """Collectives in a world of one that torchrun started; the loopback address, since the machine may know no other."""
    report = plan.out / "nccl.xml"
    launcher = [*_python("torch.distributed.run"), "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=1"]
    command = launcher + _pytest(plan, report, "tests/gpu/test_world_of_one.py")[1:]
    return Stage("nccl", 60, command, lambda: _test_counts(report))


def throughput(plan: Plan) -> Stage:
    """Tokens per second of a hybrid of 90 million parameters, by the ordinary trainer."""
    size = {"hidden_size": 768, "ssm_state_size": 128, "mamba_head_dim": 64, "head_dim": 64}
    pattern, batch, length, steps = "M-M-M-M*-M-M-M-M*-M-M-", 16, 2048, 40
    if plan.rehearse:
        size, pattern, batch, length, steps = {"hidden_size": 32}, "M-*", 2, 64, 4
    model = [f'model.pattern="{pattern}"', *(f"model.{key}={value}" for key, value in size.items())]
    job = [f"train.global_batch={batch}", f"data.sequence_length={length}", f"train.steps={steps}"]
    command = _train(plan, "throughput", *model, *job, "data=shakespeare", "logging.picture=false")
    return Stage("throughput", 110, command, lambda: Outcome(_speed(plan.out / "throughput")))


def kernels(plan: Plan) -> Stage:
    """Our kernels, those of mamba-ssm and plain PyTorch, in turns: the main sizes, then as much of the grid as time allows."""
    return _benchmark(plan, "kernels", "against_mamba.py", gpu_tables.kernels, seconds=400)


def roofline(plan: Plan) -> Stage:
    """Each of our kernels against what its bytes and FLOPs would take at least."""
    return _benchmark(plan, "roofline", "roofline.py", gpu_tables.roofline, seconds=300)


def layers(plan: Plan) -> Stage:
    """Whole layers by us, by mamba-ssm, by plain PyTorch and by transformers."""
    return _benchmark(plan, "layers", "layers.py", gpu_tables.layers, seconds=400)


def model_4b(plan: Plan) -> Stage:
    """Training steps of Nemotron-H-4B by us, by mamba-ssm, by plain PyTorch and by transformers."""
    return _benchmark(plan, "model_4b", "models.py", gpu_tables.models, "--only=nemotron_h_4b", seconds=300)


def model_1b(plan: Plan) -> Stage:
    """The same of a hybrid of 1 billion parameters."""
    return _benchmark(plan, "model_1b", "models.py", gpu_tables.models, "--only=hybrid_1b", seconds=300)


LONG_TESTS = {
    "full_size": "test_full_size.py",
    "shipped": "test_shipped_kernels.py",
    "precision": "test_precision_on_gpu.py",
}
"""Stage -> its file in tests/gpu."""
OTHER_HARDWARE = [
    ("tests/gpu/test_precision_on_gpu.py*", "*ompute capability*"),
    ("tests/gpu/test_precision_on_gpu.py*", "transformer_engine is not installed*"),
]
"""Tests and reasons for which they may be skipped, and count as that."""
PARTS = {
    "checks": (tests, quickstart, nccl, throughput),
    "full_size": (full_size,),
    "shipped": (shipped,),
    "precision": (precision,),
    "kernels": (kernels,),
    "roofline": (roofline,),
    "layers": (layers,),
    "model_4b": (model_4b,),
    "model_1b": (model_1b,),
    "precision_gemm": (precision_gemm,),
}
"""In the order in which they run. The limits of each part sum up to less than 9 minutes."""
STAGES = tuple(stage for part in PARTS.values() for stage in part)
LONGEST_S = 520
"""Of a stage that is a part by itself."""


def _tests(plan: Plan, name: str, limit_s: float, *arguments: str, **environment: str) -> Stage:
    report = plan.out / f"{name}.xml"
    command = _pytest(plan, report, *arguments, "--durations=10")
    return Stage(name, limit_s, command, lambda: _test_counts(report), environment)


def _long_tests(plan: Plan, name: str) -> Stage:
    """By name as they pass: a stage that is stopped has no report."""
    interpreted = {"TRITON_INTERPRET": "1"} if plan.rehearse else {}
    return _tests(plan, name, LONGEST_S, f"tests/gpu/{LONG_TESTS[name]}", "-v", **interpreted)


def _benchmark(plan: Plan, name: str, script: str, make: Callable[..., Outcome], *more: str, seconds: int) -> Stage:
    """Begins nothing after so many seconds. What its file says counts, whatever became of it."""
    file = plan.out / f"{name}.json"
    arguments = ["--rehearse"] if plan.rehearse else [f"--seconds={seconds}", *more]
    command = [sys.executable, str(ROOT / "scripts/bench/kernels" / script), *arguments, f"--out={file}"]
    # What mamba-ssm's kernels found once need not be found again by the next stage. The interpreter has nothing to find.
    environment = {} if plan.rehearse else {"TRITON_CACHE_AUTOTUNING": "1"}
    return Stage(name, LONGEST_S, command, lambda: gpu_tables.read(file, make), environment)


def _python(module: str) -> list[str]:
    return [sys.executable, "-m", module]


def _pytest(plan: Plan, report: Path, *arguments: str) -> list[str]:
    """Plugins of the machine's own stay out: they may not fit this pytest."""
    chosen = [*arguments, "-m", "not gpu" if plan.rehearse else "gpu", f"--junit-xml={report}"]
    return [*_python("pytest"), "-p", "pytest_timeout", "-p", "no:cacheprovider", "-o", "junit_family=xunit1", *chosen]


def _train(plan: Plan, name: str, *overrides: str) -> list[str]:
    place = [f"run.dir={plan.out / name}", f"run.name={name}", f"run.device={plan.device}"]
    return [*_python("nemohybrid"), "train", *overrides, *place, "logging.console=lines"]


def _test_counts(report: Path, rules: Rules = ()) -> Outcome:
    lines, well = verdict(read_report(report), list(rules))
    if not well:
        raise StageError("; ".join(lines))
    return Outcome({"tests": lines[-1]})


def _quality(folder: Path, limit: float) -> Outcome:
    from nemohybrid.observe.metrics import read_metrics

    scores = [float(r["val_bits_per_byte"]) for r in read_metrics(folder / "metrics.jsonl") if "val_bits_per_byte" in r]
    if not scores or not scores[-1] < limit:
        raise StageError(f"val_bits_per_byte is {scores[-1] if scores else 'missing'}, it should be below {limit}")
    return Outcome({"val_bits_per_byte": scores[-1], **_speed(folder)})


def _speed(folder: Path) -> dict[str, Any]:
    """Medians over the second half of the steps, when all is warm, and the peak memory of the run."""
    from nemohybrid.observe.metrics import read_metrics

    steps = [r for r in read_metrics(folder / "metrics.jsonl") if "tokens_per_second" in r]
    late = steps[len(steps) // 2 :]
    known = {key: [r[key] for r in late if r.get(key) is not None] for key in ("tokens_per_second", "seconds", "mfu")}
    figures = {key: statistics.median(values) for key, values in known.items() if values}
    peak = max((r["memory_device_gib"] for r in steps if "memory_device_gib" in r), default=None)
    return figures if peak is None else figures | {"memory_device_gib": peak}


def run_stage(stage: Stage, out: Path) -> Result:
    """Run one stage, its output going to <out>/<name>.log. One that failed has the figures that it left."""
    began = time.monotonic()
    try:
        with (out / f"{stage.name}.log").open("wb") as log, _own_session(stage, log) as process:
            code = process.wait(stage.limit_s)
        problem = None if code == 0 else f"exit status {code}"
    except subprocess.TimeoutExpired:
        problem = f"stopped after {stage.limit_s:.0f} s"
    except OSError as error:
        problem = str(error)
    outcome, unread = _outcome(stage)
    seconds = round(time.monotonic() - began, 1)
    return Result(stage.name, problem or unread or "ok", seconds, outcome.figures, outcome.lines)


def _outcome(stage: Stage) -> tuple[Outcome, str | None]:
    """And why there is none."""
    try:
        return stage.outcome(), None
    except (StageError, OSError, ValueError) as error:
        return Outcome(), str(error)


@contextmanager
def _own_session(stage: Stage, log: Any) -> Iterator[subprocess.Popen[Any]]:
    """A process with all its children to itself: whatever ends the block, none of them is left."""
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"} | stage.environment
    streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(stage.command, cwd=ROOT, env=environment, start_new_session=True, **streams)
    try:
        yield process
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            if process.poll() is None:
                _signal_session(process.pid, number)
                _wait_quietly(process)
        _signal_session(process.pid, signal.SIGKILL)  # a child that outlived its parent


def _signal_session(leader: int, number: signal.Signals) -> None:
    try:
        os.killpg(leader, number)
    except ProcessLookupError:  # nobody is left
        return


def _wait_quietly(process: subprocess.Popen[Any]) -> None:
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        return


def machine(rehearse: bool) -> dict[str, Any]:
    """What the figures were taken on."""
    import torch

    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    facts |= {"triton": _version("triton"), "numpy": _version("numpy"), "cores": os.cpu_count(), "rehearsal": rehearse}
    if not rehearse:
        gpu = torch.cuda.get_device_properties(0)
        facts |= {"gpu": gpu.name, "gpus": torch.cuda.device_count(), "memory_gib": round(gpu.total_memory / 2**30, 1)}
        facts |= {"compute_capability": f"{gpu.major}.{gpu.minor}", "driver": _driver()}
    return facts


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def gpu_obstacle() -> str | None:
    """Why nothing can run on a GPU here, or None."""
    import torch

    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    return f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no GPU it can use; does nvidia-smi show one?"


def heading(plan: Plan) -> list[str]:
    """What must not be forgotten of the figures."""
    return ["A rehearsal: none of these figures measures anything."] if plan.rehearse else []


def table(results: list[Result]) -> list[str]:
    """A line a stage, and beneath it those of its own table."""
    lines = []
    for result in results:
        figures = ", ".join(f"{key} {_short(value)}" for key, value in result.figures.items())
        lines.append(f"{result.stage:12}{result.seconds:7.1f} s  {result.verdict}{f'  {figures}' if figures else ''}")
        lines += [f"    {line}" for line in result.lines]
    return lines


def _short(value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if value >= 1e4 else f"{value:.4g}"


def run_all(plan: Plan, stages: list[Stage]) -> list[Result]:
    """All stages, one after the other; results.json and summary.txt are whole after each."""
    results: list[Result] = []
    for stage in stages:
        print(f"== {stage.name}: at most {stage.limit_s:.0f} s, log in {plan.out / stage.name}.log", flush=True)
        results.append(run_stage(stage, plan.out))
        print(*table(results[-1:]), sep="\n", flush=True)
        (plan.out / "results.json").write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")
        (plan.out / "summary.txt").write_text("\n".join([*heading(plan), *table(results)]) + "\n")
    return results


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("gpu_suite", description="What only a GPU can show.")
    default = f"runs/gpu_suite-{time.strftime('%Y%m%d-%H%M%S')}"
    parser.add_argument("--out", type=Path, default=ROOT / default, help=f"a new or empty folder (default {default})")
    parser.add_argument("--rehearse", action="store_true", help="the same stages, small and on the CPU")
    names = [*PARTS, *(make.__name__ for make in PARTS["checks"])]
    parser.add_argument("--only", action="append", choices=names, help="a part or a stage; may be repeated")
    return parser.parse_args()


def chosen_stages(only: list[str] | None, plan: Plan) -> list[Stage]:
    """All, or those that were named, or whose part was."""
    wanted = {stage for name in only or PARTS for stage in PARTS.get(name, ())}
    return [make(plan) for make in STAGES if make in wanted or make.__name__ in (only or ())]


def main() -> int:
    chosen = options()
    plan = Plan(chosen.out.resolve(), chosen.rehearse)
    if not plan.rehearse and (obstacle := gpu_obstacle()):
        print(f"gpu_suite: {obstacle}. --rehearse runs the stages on the CPU", file=sys.stderr)
        return 3
    if plan.out.exists() and any(plan.out.iterdir()):
        print(f"gpu_suite: {plan.out} is not empty; its runs would go on instead of starting", file=sys.stderr)
        return 2
    plan.out.mkdir(parents=True, exist_ok=True)
    facts = json.dumps(machine(plan.rehearse), indent=1)
    (plan.out / "machine.json").write_text(facts + "\n")
    print(facts, flush=True)
    results = run_all(plan, chosen_stages(chosen.only, plan))
    print(f"\n{plan.out}", *heading(plan), *table(results), sep="\n")
    return 0 if all(result.verdict == "ok" for result in results) else 1


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    for stopping in (signal.SIGTERM, signal.SIGINT):  # SIGINT too: it is ignored where a shell started this with "&"
        signal.signal(stopping, _stop)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("gpu_suite: stopped; what was done stands in the folder of the results", file=sys.stderr)
        sys.exit(130)
