"""The command as torchrun starts it, and as a wheel brings it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def torchrun(fresh, *arguments: str, ranks: int = 2):
    launcher = (
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        "-m",
        "nemohybrid",
        "train",
    )
    return fresh(*launcher, *arguments)


def test_torchrun_trains_on_two_ranks_and_only_rank_zero_speaks_and_writes(fresh, small, empty_folder):
    done = torchrun(fresh, *small, "run.dir=run", "run.name=two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done: step 2 of 2") == 1
    assert "on 2 x cpu" in done.stdout
    assert [path.name for path in empty_folder.iterdir()] == ["run"]
    lines = (empty_folder / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    saved = {path.name for path in (empty_folder / "run" / "checkpoints").iterdir()}
    assert saved == {"step_00000002"}


def test_four_ranks_share_a_model_that_one_then_writes_with_exports_and_trains_on(
    fresh, nemohybrid, small, empty_folder
):
    """The whole way: tensor 2 x full_shard 2 with experts and MTP, then everything that one process does with the result."""
    model = ['model.pattern="M*E/*"', "model.num_experts=4", "model.num_attention_heads=4"]
    words = [*small, *model, "run.dir=run", "train.global_batch=4", "train.microbatch=1", "train.steps=4"]
    sharing = [
        "parallel.tensor=2",
        "parallel.data_mode=full_shard",
        "sample.prompts=[ROMEO]",
        "sample.max_new_tokens=4",
    ]
    done = torchrun(fresh, *words, *sharing, "train.stop_at=2", ranks=4)
    assert done.returncode == 0, done.stderr
    assert "on 4 x cpu, tensor 2 (sequence parallel) x data 2 (full_shard), " in done.stdout
    assert done.stdout.count("----- sample 1 -----\nROMEO") == 1
    code, text, told = nemohybrid("generate", "--checkpoint", "run", "--prompt", "ROMEO", "--max-new-tokens", "3")
    assert (code, text[:5]) == (0, "ROMEO"), told
    assert nemohybrid("export-hf", "--checkpoint", "run", "--output", "hf")[0] == 0
    assert nemohybrid("import-hf", "--input", "hf", "--output", "back")[0] == 0
    code, _, told = nemohybrid("train", *words)
    assert code == 0, told
    lines = (empty_folder / "run" / "metrics.jsonl").read_text().splitlines()
    assert [r["step"] for r in map(json.loads, lines) if "loss" in r] == [1, 2, 3, 4]


def test_a_pipeline_with_folded_experts_shows_its_cut_and_one_process_goes_on(fresh, nemohybrid, small, empty_folder):
    model = ['model.pattern="M*E-/*E"', "model.num_experts=4", "model.num_attention_heads=4"]
    words = [*small, *model, "run.dir=run", "train.global_batch=8", "train.steps=4"]
    sharing = ["parallel.pipeline=2", "parallel.expert=2", "train.stop_at=2", "train.microbatch=1"]
    done = torchrun(fresh, *words, *sharing, ranks=4)
    assert done.returncode == 0, done.stderr
    assert "on 4 x cpu, pipeline 2 x data 2 (shard_grad), experts on expert 2, " in done.stdout
    assert done.stdout.count("stage 0 | ") == done.stdout.count("stage 1 | ") == 1
    assert "1f1b, 4 microbatches: ranks wait " in done.stdout
    code, _, told = nemohybrid("train", *words)
    assert code == 0, told
    lines = (empty_folder / "run" / "metrics.jsonl").read_text().splitlines()
    assert [r["step"] for r in map(json.loads, lines) if "loss" in r] == [1, 2, 3, 4]


def test_a_sweep_under_torchrun_is_refused_with_the_reason(fresh, small, empty_folder):
    world = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
    done = fresh("-m", "nemohybrid", "train", "-m", *small, "optim.lr=1,2", **world)
    assert done.returncode == 1
    assert "a sweep starts one job after another" in done.stderr
    assert list(empty_folder.iterdir()) == []


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with nothing but what the wheel brings."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = [
        *pip,
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-cache-dir",
        "-w",
        str(folder / "dist"),
        str(ROOT),
    ]
    subprocess.run(build, check=True, timeout=120)
    (wheel,) = (folder / "dist").glob("*.whl")
    subprocess.run(
        [*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True, timeout=120
    )
    return folder / "site"


def test_a_new_size_trains_from_the_wheel_in_an_empty_folder(fresh, installed, empty_folder):
    program = (
        "import sys, nemohybrid, nemohybrid_kernels\n"
        "from nemohybrid.__main__ import main\n"
        "from nemohybrid.config.groups import configs_dir\n"
        "print('FROM', nemohybrid.__file__, nemohybrid_kernels.__file__, configs_dir())\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    size = ["model=tiny", "model.hidden_size=64", 'model.pattern="M-M*-"', "data=shakespeare", "data.tokenizer=byte"]
    short = ["train.steps=2", "data.sequence_length=32", "train.global_batch=2", "run.device=cpu"]
    done = fresh("-c", program, "train", *size, *short, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    origin = next(line for line in done.stdout.splitlines() if line.startswith("FROM")).split()[1:]
    assert all(Path(path).is_relative_to(installed) for path in origin), f"not from the wheel: {origin}"
    assert "M-M*- (5 layers)" in done.stdout
    assert (empty_folder / "runs" / "run" / "loss.png").is_file()
    assert [path.name for path in empty_folder.iterdir()] == ["runs"]


def test_the_wheel_brings_every_configuration_and_the_bundled_text(installed):
    shipped = {path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.yaml")}
    configs = installed / "nemohybrid" / "configs"
    assert {path.relative_to(configs) for path in configs.rglob("*.yaml")} == shipped
    assert (installed / "nemohybrid" / "data" / "bundled" / "shakespeare.txt").stat().st_size > 900_000
    assert (installed / "nemohybrid" / "launch" / "templates" / "slurm.sh").is_file()
    assert not [name for name in os.listdir(installed) if name in ("tests", "docs", "scripts")]  # noqa: PTH208
