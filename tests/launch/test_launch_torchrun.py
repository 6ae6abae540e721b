"""The scripts for torchrun, really run: signals on one machine, and a meeting of two."""

import signal
import socket
import sys

import psutil
import pytest
from processes import end, steps_of, wait_for

PYTHON = ["--python", sys.executable]


@pytest.mark.slow
def test_the_command_becomes_torchrun_which_passes_a_signal_on_to_the_ranks(background, small, empty_folder):
    """SIGUSR1 would kill torchrun if the script did not have it handled."""
    words = ["torchrun", "--gpus-per-node", "2", *PYTHON, "--", *small, "train.steps=1000000"]
    run = background(sys.executable, "-m", "nemohybrid", "launch", *words)
    wait_for(lambda: steps_of(empty_folder / "run"), run)
    run.send_signal(signal.SIGUSR1)
    status, out = end(run)
    assert "on 2 x cpu" in out
    assert "stopped by SIGUSR1 at step " in out
    assert ", saved run/checkpoints/step_" in out
    assert status == 1, "torchrun ends with 1 whatever its ranks end with"


def test_options_of_torchrun_stand_in_the_script(rendered, small):
    script = rendered("torchrun", "--nodes", "2", "--gpus-per-node", "2", "--rendezvous", "a:29400", "--", *small)
    given = [line.split()[0] for line in script.splitlines() if line.startswith("    --")]
    for word in ("--nnodes=2", "--nproc-per-node=2", "--rdzv-endpoint=a:29400", "--rdzv-id=run", "--max-restarts=3"):
        assert word in given


@pytest.mark.parametrize("where", [[], ["--nodes", "2", "--rendezvous", "a:29400"]], ids=["alone", "several"])
def test_what_is_set_outside_stays(rendered, small, stand_in, background, where):
    python = stand_in('echo "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT $TORCH_DISABLE_SHARE_RDZV_TCP_STORE"')
    script = rendered(
        "torchrun", *where, "--gpus-per-node", "2", "--save-seconds", "400", "--python", python, "--", *small
    )
    set_here = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "7", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "0"}
    assert end(background("bash", "-c", script, **set_here)) == (0, "7 0\n")
    assert end(background("bash", "-c", script, **dict.fromkeys(set_here, ""))) == (0, "400 1\n")


def ranks_of(agent: int) -> list[psutil.Process]:
    return [child for child in psutil.Process(agent).children() if "RANK" in child.environ()]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_two_machines_meet_and_start_again_together_after_a_crash(background, rendered, small, empty_folder):
    """Two agents on this machine. The second loses its rank once, and all go on from the checkpoint."""
    meet = ["--nodes", "2", "--gpus-per-node", "1", "--rendezvous", f"localhost:{free_port()}"]
    words = [*meet, "--max-restarts", "1", *PYTHON, "--", *small, "train.steps=200", "checkpoint.every=10"]
    script = rendered("torchrun", *words)
    agents = [background("bash", "-c", script) for _ in range(2)]
    wait_for(lambda: (empty_folder / "run/checkpoints/step_00000020").exists(), agents[0])
    (rank,) = ranks_of(agents[1].pid)
    rank.kill()
    ended = [end(agent) for agent in agents]
    assert [status for status, _ in ended] == [0, 0], ended
    told = "".join(out for _, out in ended)
    assert "resuming from run/checkpoints/step_" in told
    assert "done: step 200 of 200" in told
