"""The batch script, really run: signals, statuses, requeues."""

import json
import re
import signal
import sys
from pathlib import Path

import pytest
from processes import steps_of

TWO_RANKS = ["--gpus-per-node", "2"]


def test_a_run_saves_before_its_time_is_up_is_queued_again_and_comes_to_its_end(rendered, cluster, small, empty_folder):
    steps = ["train.steps=100", "checkpoint.every=0"]
    script = rendered("slurm", *TWO_RANKS, "--python", sys.executable, "--", *small, *steps)
    cluster.start(script)
    cluster.wait_for(lambda: len(steps_of(empty_folder / "run")) > 3)
    cluster.signal_tasks(signal.SIGUSR1)
    status, out = cluster.end()
    first = (empty_folder / "logs" / f"run-{cluster.job}-attempt0.log").read_text()
    stopped = re.search(r"stopped by SIGUSR1 at step (\d+) of 100, saved run/checkpoints/step_", first)
    assert stopped, first
    assert (status, cluster.requeued()) == (75, [cluster.job]), out
    assert "queued again as attempt 1" in out

    status, out = cluster.run(script, attempt=1)
    second = (empty_folder / "logs" / f"run-{cluster.job}-attempt1.log").read_text()
    assert f": step {stopped[1]} of 100" in second
    assert "done: step 100 of 100" in second
    assert (status, cluster.requeued()) == (0, [cluster.job]), "a run that is complete was queued again"
    lines = (empty_folder / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 101))


def test_a_run_that_fails_is_not_queued_again_and_its_status_is_passed_on(rendered, cluster, small, empty_folder):
    absent = ["data.bundled=null", "data.train=absent"]
    script = rendered("slurm", *TWO_RANKS, "--elsewhere", "--python", sys.executable, "--", *small, *absent)
    status, out = cluster.run(script)
    assert (status, cluster.requeued()) == (1, [])
    assert "failed with status 1 and is not started again" in out
    assert "absent.bin and absent.idx not found" in cluster.logs()


@pytest.mark.parametrize("status, requeues", [(0, 0), (1, 0), (75, 1), (137, 0)])
def test_only_the_status_of_a_saved_run_queues_it_again(rendered, cluster, small, stand_in, status, requeues):
    python = stand_in(f"exit {status}")
    got, out = cluster.run(rendered("slurm", *TWO_RANKS, "--python", python, "--", *small))
    assert (got, len(cluster.requeued())) == (status, requeues), out


def test_who_ends_first_with_75_does_not_have_the_others_killed(rendered, cluster, small, stand_in):
    python = stand_in('sleep "0.$((RANK * 4))"; exit 75')
    status, out = cluster.run(rendered("slurm", *TWO_RANKS, "--python", python, "--", *small))
    assert (status, cluster.requeued()) == (75, [cluster.job]), out


def test_a_rank_that_hangs_after_the_others_ended_is_killed_and_nothing_is_queued_again(
    rendered, cluster, small, stand_in
):
    python = stand_in('[ "$RANK" = 0 ] || exec sleep 60; exit 75')
    script = rendered("slurm", *TWO_RANKS, "--python", python, "--", *small)
    assert "--wait=60 " in script
    status, out = cluster.run(script.replace("--wait=60 ", "--wait=0.1 "))
    assert (status, cluster.requeued()) == (137, []), out


STOPS_WHEN_ASKED = """trap 'exit 75' USR1 TERM
touch "started$RANK"
while :; do sleep 0.05; done"""


def started(folder: Path) -> bool:
    return (folder / "started0").exists() and (folder / "started1").exists()


def test_the_signal_reaches_python_and_not_a_shell_around_it(rendered, cluster, small, stand_in, empty_folder):
    cluster.start(rendered("slurm", *TWO_RANKS, "--python", stand_in(STOPS_WHEN_ASKED), "--", *small))
    cluster.wait_for(lambda: started(empty_folder))
    cluster.signal_tasks(signal.SIGUSR1)
    status, out = cluster.end()
    assert (status, cluster.requeued()) == (75, [cluster.job]), out


def test_a_job_that_was_cancelled_saves_and_stays_cancelled(rendered, cluster, small, stand_in, empty_folder):
    cluster.start(rendered("slurm", *TWO_RANKS, "--python", stand_in(STOPS_WHEN_ASKED), "--", *small))
    cluster.wait_for(lambda: started(empty_folder))
    cluster.cancel()
    status, out = cluster.end()
    assert (status, cluster.requeued()) == (75, []), out
    assert "cancelled" in out


@pytest.mark.parametrize("attempt, requeues", [(2, 1), (3, 0)])
def test_the_number_of_requeues_is_bounded(rendered, cluster, small, stand_in, attempt, requeues):
    script = rendered("slurm", *TWO_RANKS, "--max-requeues", "3", "--python", stand_in("exit 75"), "--", *small)
    status, out = cluster.run(script, attempt)
    assert (status, len(cluster.requeued())) == (75, requeues), out


def test_a_cluster_that_refuses_to_queue_again_is_said(rendered, cluster, small, stand_in):
    script = rendered("slurm", *TWO_RANKS, "--python", stand_in("exit 75"), "--", *small)
    status, out = cluster.run(script, FAKE_REQUEUE_STATUS="1")
    assert status == 75
    assert "cannot be queued again" in out


TELLS = 'printf "%s\\n" "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $SLURM_CPUS_PER_TASK" "$@" >"told$RANK"'


def test_every_task_is_told_its_rank_and_the_overrides_arrive_as_they_were_given(
    rendered, cluster, small, stand_in, empty_folder
):
    odd = ["run.dir=a b", 'sample.prompts=["it\'s $HOME `x` {{name}}"]']
    setup = empty_folder / "set up.sh"
    setup.write_text("echo from the setup $NOT_SET\ngrep -q nothing /dev/null\nfalse | true\n")
    options = ["--nodes", "2", *TWO_RANKS, "--python", stand_in(TELLS), "--setup", "set up.sh", "--logs", "log files"]
    script = rendered("slurm", *options, "--", *small, *odd)
    status, out = cluster.run(script, SLURM_JOB_NODELIST="node[1-2]", SLURM_EXPORT_ENV="NONE")
    assert status == 0, out
    assert "from the setup" in out
    for rank in range(4):
        first, *words = (empty_folder / f"told{rank}").read_text().splitlines()
        assert first == f"{rank} {rank % 2} 4 2 node1 8"
        assert words == ["-m", "nemohybrid", "train", *small, *odd]
    assert (empty_folder / "log files" / f"run-{cluster.job}-attempt0.log").is_file()


def test_a_setup_that_is_not_on_the_node_starts_nothing_and_is_named(rendered, cluster, small, stand_in, empty_folder):
    options = ["--elsewhere", "--setup", "absent.sh", "--python", stand_in("touch started")]
    status, out = cluster.run(rendered("slurm", *TWO_RANKS, *options, "--", *small))
    assert (status, (empty_folder / "started").exists()) == (1, False)
    assert "cannot read ./absent.sh, the file of --setup" in out


def test_a_setup_is_that_of_this_folder_and_not_one_on_path(rendered, cluster, small, stand_in, empty_folder):
    stand_in("exit 9", "env.sh")
    (empty_folder / "env.sh").write_text("echo from here\n")
    status, out = cluster.run(
        rendered("slurm", *TWO_RANKS, "--setup", "env.sh", "--python", stand_in("exit 0"), "--", *small)
    )
    assert (status, "from here" in out) == (0, True), out


TELLS_VALUES = 'echo "$NCCL_DEBUG $OMP_NUM_THREADS $MASTER_ADDR" >told'


def test_what_is_set_outside_wins_and_what_is_not_has_a_value(rendered, cluster, small, stand_in, empty_folder):
    script = rendered("slurm", *TWO_RANKS, "--python", stand_in(TELLS_VALUES), "--", *small)
    cluster.run(script, NCCL_DEBUG="INFO", OMP_NUM_THREADS="3", MASTER_ADDR="10.0.0.7")
    assert (empty_folder / "told").read_text() == "INFO 3 10.0.0.7\n"
    cluster.run(script, NCCL_DEBUG="", OMP_NUM_THREADS="", MASTER_ADDR="")
    assert (empty_folder / "told").read_text() == "WARN 1 localhost\n"


def test_a_container_gets_its_mounts_its_variables_and_the_folder_of_the_job(
    rendered, cluster, small, stand_in, empty_folder
):
    image = ["--container-image", "nvcr.io#team/image:1", "--mount", "/my data:/data:ro", "--mount", "/c:/c"]
    script = rendered("slurm", *TWO_RANKS, *image, "--python", stand_in(TELLS_VALUES), "--", *small)
    there = {"NCCL_DEBUG": "TRACE", "MASTER_ADDR": "nowhere", "OMP_NUM_THREADS": "64"}
    status, out = cluster.run(script, FAKE_IMAGE=json.dumps(there), NCCL_IB_HCA="=mlx5_0", TRITON_CACHE_DIR="/t")
    assert status == 0, out
    assert (empty_folder / "told").read_text() == "WARN 1 localhost\n"
    options = json.loads((cluster.folder / "srun").read_text())
    assert options["--container-image"] == "nvcr.io#team/image:1"
    assert options["--container-mounts"] == f"{empty_folder}:{empty_folder},/my data:/data:ro,/c:/c"
    assert options["--container-workdir"] == str(empty_folder)
    assert {"NCCL_IB_HCA", "TRITON_CACHE_DIR"} < set(options["--container-env"].split(","))


def test_sbatch_is_given_the_script_and_its_status_is_passed_on(launch, rendered, cluster, small, monkeypatch):
    words = ["slurm", *TWO_RANKS, "--partition", "gpu,long", "--account", "me", "--sbatch=--qos=high", "--", *small]
    code, out, err = launch(*words)
    assert (code, out) == (0, "Submitted batch job 4242\n"), err
    script = (cluster.folder / "submitted").read_text()
    assert script == rendered(*words)
    for line in (
        "--partition=gpu,long",
        "--account=me",
        "--qos=high",
        "--signal=USR1@300",
        "--time=24:00:00",
        "--exclusive",
    ):
        assert f"#SBATCH {line}\n" in script
    assert "gpus" not in re.sub(r"^# .*$", "", script, flags=re.MULTILINE), "a run on CPUs asks for GPUs"
    assert "#SBATCH --gpus-per-node=8\n" in rendered("slurm", "--", *small, "run.device=auto", "train.global_batch=8")
    monkeypatch.setenv("FAKE_SBATCH_STATUS", "3")
    assert launch(*words)[0] == 3


def test_memory_can_be_asked_for_where_nodes_are_shared(rendered, small):
    script = rendered(
        "slurm", *TWO_RANKS, "--share-nodes", "--sbatch=--mem=200G", "--sbatch=--exclusive=user", "--", *small
    )
    assert re.findall("#SBATCH --(mem.*|exclusive.*)", script) == ["mem=200G", "exclusive=user"]


def test_variables_of_the_shell_change_nothing_that_the_script_decides(launch, cluster, small, monkeypatch):
    """To sbatch they count more than the lines in a script."""
    mine = {
        "TIMELIMIT": "1",
        "NO_REQUEUE": "1",
        "SIGNAL": "B:TERM@9",
        "GPU_BIND": "single:1",
        "ACCOUNT": "a",
        "QOS": "low",
    }
    kept = {"PARTITION": "mine", "CONSTRAINT": "h100"}
    for name, value in (mine | kept).items():
        monkeypatch.setenv(f"SBATCH_{name}", value)
    code, _, err = launch("slurm", *TWO_RANKS, "--account", "b", "--sbatch=--qos=high", "--", *small)
    assert code == 0
    asked = json.loads((cluster.folder / "asked").read_text())
    said = {
        "time": "24:00:00",
        "signal": "USR1@300",
        "account": "b",
        "qos": "high",
        "partition": "mine",
        "constraint": "h100",
    }
    assert {name: asked[name] for name in said} == said
    assert not asked.keys() & {"no-requeue", "gpu-bind"}
    assert set(re.findall("SBATCH_([A-Z_]+) of this shell is left out", err)) == set(mine)


def test_directives_stand_before_the_first_command(rendered, small):
    lines = rendered("slurm", *TWO_RANKS, "--", *small).splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not [line for line in lines[first:] if line.startswith("#SBATCH")]
