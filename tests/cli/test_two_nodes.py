"""Two nodes, each a network namespace with a launcher of its own: a node that fails comes back, and nothing is lost."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS, EVERY = 40, 10
NEW_LAUNCHER = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""Without it the launcher of rank 0 (torch 2.13) says only once where ranks meet, and a launcher that is new waits for ever."""
DEADLINE_S = 240.0


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=20)


class Node:
    """One of two: a network namespace, its end of the wire, and a host name of its own."""

    def __init__(self, number: int, folder: Path, words: list[str]) -> None:
        self.name, self.wire, self.folder, self.words = (
            f"node{number}-{os.getpid()}",
            f"w{number}x{os.getpid()}",
            folder,
            words,
        )
        self.address, self.log = f"10.111.0.{number + 1}", folder / f"node{number}.log"
        self.launcher: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """torchrun, told where the other one is and nothing else."""
        rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "10.111.0.1:29411", "--rdzv-id", "two"]
        nodes = ["--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3", "--local-addr", self.address]
        torchrun = [sys.executable, "-m", "torch.distributed.run", *nodes, *rendezvous, "-m", "nemohybrid", "train"]
        known = ["127.0.0.1 localhost", *(f"10.111.0.{n + 1} node{n}-{os.getpid()}" for n in range(2))]
        (self.folder / "hosts").write_text("\n".join(known))
        named = ["sh", "-c", f'hostname {self.name} && mount --bind hosts /etc/hosts && exec "$@"', "sh"]
        with self.log.open("ab") as log:
            self.launcher = subprocess.Popen(
                ["ip", "netns", "exec", self.name, "unshare", "--uts", *named, *torchrun, *self.words],
                cwd=self.folder,
                env=os.environ | NEW_LAUNCHER | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": self.wire},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def processes(self) -> list[psutil.Process]:
        """The launcher and what it has started."""
        if self.launcher is None or self.launcher.poll() is not None:
            return []
        own = psutil.Process(self.launcher.pid)
        return [own, *own.children(recursive=True)]

    @property
    def worker(self) -> psutil.Process:
        """The process that trains."""
        return next(process for process in self.processes if "RANK" in process.environ())

    def kill(self) -> None:
        """All of it at once, as when the power goes."""
        for process in reversed(self.processes):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if self.launcher is not None:
            self.launcher.wait()


@pytest.fixture
def words(small) -> list[str]:
    """A short run whose loss says where it has been."""
    return [*small, f"train.steps={STEPS}", f"checkpoint.every={EVERY}", "logging.console=quiet"]


@pytest.fixture
def nodes(words, empty_folder) -> Iterator[list[Node]]:
    """Two nodes with a wire between them, and no process or namespace afterwards."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("no network namespaces here: they need ip(8) and root")
    pair = [Node(number, empty_folder, [*words, "run.dir=run"]) for number in range(2)]
    try:
        for node in pair:
            ip("netns", "add", node.name)
        ip(
            "link",
            "add",
            pair[0].wire,
            "netns",
            pair[0].name,
            "type",
            "veth",
            "peer",
            pair[1].wire,
            "netns",
            pair[1].name,
        )
        for node in pair:
            ip("-n", node.name, "address", "add", f"{node.address}/24", "dev", node.wire)
            for device in ("lo", node.wire):
                ip("-n", node.name, "link", "set", device, "up")
    except subprocess.CalledProcessError as error:
        remove(pair)
        pytest.skip(f"no network namespaces here: {error.stderr}")
    yield pair
    remove(pair)


def remove(pair: list[Node]) -> None:
    for node in pair:
        node.kill()
        with contextlib.suppress(subprocess.CalledProcessError):
            ip("netns", "del", node.name)


def losses(folder: Path) -> dict[int, float]:
    """Step -> loss, as it was last written."""
    file = folder / "metrics.jsonl"
    records = map(json.loads, file.read_text().splitlines()) if file.exists() else ()
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def wait_for(condition, pair: list[Node]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        ended = [node.launcher.poll() for node in pair if node.launcher]
        assert not any(ended), "\n".join(node.log.read_text()[-5000:] for node in pair)
        assert time.monotonic() < deadline, "\n".join(node.log.read_text()[-5000:] for node in pair)
        time.sleep(0.05)


@pytest.mark.parametrize("what", ["worker", "node"])
def test_a_node_that_fails_comes_back_and_the_loss_is_that_of_a_run_without_failure(
    nodes, words, fresh, empty_folder, what
):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "nemohybrid", "train"]
    straight = fresh(*launcher, *words, "run.dir=straight")
    assert straight.returncode == 0, straight.stderr
    for node in nodes:
        node.start()
    wait_for(lambda: max(losses(empty_folder / "run"), default=0) > EVERY + 2, nodes)
    if what == "worker":
        nodes[1].worker.kill()
    else:
        nodes[1].kill()
        nodes[1].start()
    wait_for(lambda: not any(node.processes for node in nodes), nodes)
    logs = [node.log.read_text() for node in nodes]
    assert [node.launcher.returncode for node in nodes] == [0, 0], "\n".join(logs)
    assert "resuming from run/checkpoints/step_000000" in logs[0] + logs[1]
    assert losses(empty_folder / "run") == losses(empty_folder / "straight")
    steps = [json.loads(line)["step"] for line in (empty_folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) > STEPS, "nothing was done twice, so nothing had failed"
    assert steps[-1] == STEPS
