"""What the watch sees of a thread: its line, its expression, and the collective it waits in."""

import linecache
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing

import psutil
import pytest
import torch
import torch._dynamo  # before ranks are forked: each would spend seconds on it
import torch.distributed as dist
from forked import run_world

from nemohybrid.parallel import collectives
from nemohybrid.parallel.context import Group, ParallelContext
from nemohybrid.train.watch import sight
from nemohybrid.train.watch.processes import GONE, RUNS, STOPPED, kill, started_at, state_of
from nemohybrid.train.watch.sight import DEVICE, Glances, Stacks, look, parsed, waits_in, where_raised

ROOT = sight._ROOTS[0]


def standing(*lines: tuple[str, str, str]) -> sight.Stack:
    """(file below the root, function, text of its line), innermost first, as the stack of a thread."""
    for file, _, text in lines:
        linecache.cache[f"{ROOT}{file}"] = len(text), None, [f"{text}\n"], f"{ROOT}{file}"
    return tuple((f"{ROOT}{file}", 1, function) for file, function, _ in lines)


@pytest.fixture(autouse=True)
def real_files():
    yield
    linecache.clearcache()


CALLER = ("nemohybrid/train/step.py", "compute_gradients", "counts = sum_over(target_counts(batch), context.data)")


@pytest.mark.parametrize(
    "lines, found",
    [
        ([("nemohybrid/parallel/collectives.py", "sum_over", "dist.all_reduce(tensor)"), CALLER], "all_reduce"),
        (
            [("nemohybrid/parallel/collectives.py", "gathered", "functional.wait_tensor(coming)"), CALLER],
            "a collective",
        ),
        ([("nemohybrid/parallel/pipeline.py", "_arrived", "tensor.work.wait()"), CALLER], "a transfer between ranks"),
        ([("nemohybrid/train/trainer.py", "train_step", "numbers = numbers.tolist()")], DEVICE),
        ([("nemohybrid/train/trainer.py", "train_step", "batch = self.data.batch(step)")], ""),
        ([CALLER], ""),
        ([("nemohybrid/model/layer.py", "forward", "return all_gather(x)"), CALLER], ""),
        ([("nemohybrid/model/moe/x.py", "stuck", "x.wait()")], ""),
        ([], ""),
    ],
)
def test_what_a_line_waits_in(lines, found):
    assert waits_in(standing(*lines)) == found
    assert Glances().is_waiting(standing(*lines)) == bool(found)


def test_a_function_of_torch_distributed_names_what_its_caller_asked_for(monkeypatch):
    monkeypatch.setattr(sight, "_ROOTS", (ROOT,))
    inner = ("torch/distributed/distributed_c10d.py", "all_gather", "work.wait()")
    outer = ("torch/distributed/distributed_c10d.py", "all_gather_object", "all_gather(sizes)")
    logger = ("torch/distributed/c10d_logger.py", "wrapper", "return func(*args)")
    assert waits_in(standing(inner, logger, outer, logger, CALLER)) == "all_gather_object"
    fsdp = ("torch/distributed/fsdp/_fsdp_collectives.py", "foreach_all_gather_copy_out", "work.wait()")
    assert waits_in(standing(fsdp, CALLER)) == "a collective"
    operator = ("torch/_ops.py", "__call__", "return self._op(*args)")
    calls = ("nemohybrid/parallel/collectives.py", "gathered", "return functional.all_gather_into_tensor(x, 2)")
    assert waits_in(standing(operator, calls, CALLER)) == "all_gather_into_tensor"


@pytest.fixture
def stacks() -> Iterator[Stacks]:
    with closing(Stacks()) as reader:
        yield reader


def test_stacks_are_read_of_threads_that_run(stacks):
    stop, main = threading.Event(), threading.get_ident()
    thread = threading.Thread(target=stop.wait, daemon=True)
    thread.start()
    time.sleep(0.1)
    mine, seen = stacks.of(main), stacks.read()[thread.ident or 0]
    assert [function for _, _, function in mine][:2] == ["read", "of"]
    assert mine[2][2] == "test_stacks_are_read_of_threads_that_run"
    assert "wait" in seen[0][2]
    assert stacks.read()[thread.ident or 0] == seen, "it stands still"
    stop.set()
    thread.join()
    assert thread.ident not in stacks.read()


def test_a_folder_whose_name_is_not_ascii_is_ours_all_the_same():
    """faulthandler escapes it."""
    dump = r"""Thread 0x0001 (most recent call first):
  File "/home/j\xfcrgen/\u65e5\U0001f525/nemohybrid/x.py", line 3 in stra\xdfe
"""
    assert parsed(dump)[1] == (("/home/jürgen/日🔥/nemohybrid/x.py", 3, "straße"),)


def test_while_a_gpu_runs_backward_its_thread_is_looked_at(monkeypatch, stacks):
    lines = f'Thread 0x00000000000000ff (most recent call first):\n  File "{ROOT}x.py", line 3 in backward\n\n'
    graph = f"{sight._ROOTS[-1]}torch/autograd/graph.py"
    dump = (
        f'{lines}Current thread 0x0001 (most recent call first):\n  File "{graph}", line 979 in _engine_run_backward\n'
    )
    monkeypatch.setattr(Stacks, "read", lambda _: parsed(dump))
    assert stacks.of(1)[0][2] == "backward"
    monkeypatch.setattr(Stacks, "read", lambda _: parsed(dump.replace("autograd/graph.py", "autograd/other.py")))
    assert stacks.of(1)[0][2] == "_engine_run_backward"
    assert stacks.of(77) == ()
    assert look(()).places == ()


def test_where_an_error_was_raised():
    def fails() -> None:
        collectives.own_part(torch.ones(4, 2), Group(size=3, rank=9))

    with pytest.raises(IndexError) as caught:
        fails()
    place = str(where_raised(caught.value).places[0])
    assert place.startswith("nemohybrid/parallel/collectives.py:")
    assert place.endswith("in own_part: return x.narrow(0, group.rank * rows, rows)")


def waits_for_the_other(rank: int, call: Callable[[], object], names: str) -> None:
    """Rank 1 comes a second late; a thread of rank 0 sees where the main thread is."""
    seen = []

    def watch() -> None:
        time.sleep(0.8)
        with closing(Stacks()) as stacks:
            stack = stacks.of(threading.main_thread().ident or 0)
        seen.append((waits_in(stack), Glances().is_waiting(stack), dist.group.WORLD._get_sequence_number_for_group()))

    dist.barrier()
    thread = threading.Thread(target=watch)
    thread.start()
    if rank == 1:
        time.sleep(1.6)
    call()
    thread.join()
    name, waiting, count = seen[0]
    assert (name, waiting) == ((names, True) if rank == 0 else ("", False)), seen
    counts = collectives.gather_json(count, Group(2, rank, dist.group.WORLD), torch.device("cpu"))
    assert counts[0] == counts[1] + 1, "rank 0 has entered one that rank 1 has not"


def test_real_collectives_are_seen_and_counted(tmp_path):
    def member(rank: int) -> None:
        group, context = Group(2, rank, dist.group.WORLD), ParallelContext(torch.device("cpu"), rank, 2)
        waits_for_the_other(rank, lambda: collectives.sum_over(torch.ones(2), group), "all_reduce")
        waits_for_the_other(rank, lambda: collectives.gathered(torch.ones(2), group), "all_gather_into_tensor")
        waits_for_the_other(rank, lambda: collectives.wait_for_all(context), "barrier")

    failures = run_world(2, member, tmp_path)
    assert not failures, failures[0].read_text()


def test_what_the_system_says_of_a_process():
    process = psutil.Popen(["sleep", "100"])
    started = started_at(process.pid)
    try:
        assert state_of(process.pid) == RUNS
        process.suspend()
        deadline = time.monotonic() + 5
        while state_of(process.pid) == RUNS and time.monotonic() < deadline:
            time.sleep(0.01)
        assert state_of(process.pid) == STOPPED
        kill(process.pid, started - 10)
        assert state_of(process.pid) == STOPPED, "another process that had the number before"
        kill(process.pid, started)
        while state_of(process.pid) != GONE and time.monotonic() < deadline:
            time.sleep(0.01)
        assert state_of(process.pid) == GONE, "a zombie is gone, too"
    finally:
        process.kill()
        process.wait()
    assert state_of(process.pid) == GONE
