"""Encode units in worker processes, each at the other end of a pipe.

A pipe carries units one way and progress, parts and errors the other. It also tells either side that the other is gone:
a worker whose parent was killed ends at its next message, and a worker that the kernel killed is noticed at once.
"""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import NamedTuple

from nemohybrid.data.parts import Part, StoppedAt, write_part
from nemohybrid.data.readers import Reading, read_unit
from nemohybrid.data.tokenizer import Tokenizer, load_tokenizer
from nemohybrid.data.units import Unit
from nemohybrid.errors import DataError

PROGRESS_BYTES = 2**20

Advance = Callable[[int], object]


class Task(NamedTuple):
    """A unit, and where its part goes."""

    unit: Unit
    stem: Path


class Job(NamedTuple):
    """What all tasks of a command have in common. tokenizer: what `load_tokenizer` takes."""

    tokenizer: str
    reading: Reading
    skip_damaged: bool


class TaskFailed(Exception):
    """Raised for the first task, in order, that failed; those in front of it are done. cause: what it raised."""

    def __init__(self, index: int, cause: Exception):
        super().__init__(index, cause)
        self.index, self.cause = index, cause


def encode_all(
    tasks: Sequence[Task], job: Job, workers: int, advance: Advance
) -> Generator[tuple[int, Part], None, None]:
    """(index, part) of each task as it is done. advance: told how many more bytes of the inputs were read.

    One worker is this process. Raises TaskFailed; DataError when a worker process dies.
    """
    if min(workers, len(tasks)) <= 1:
        yield from _encode_here(tasks, job, advance)
        return
    crew = [_Worker(job) for _ in range(min(workers, len(tasks)))]
    try:
        yield from _share_out(tasks, crew, advance)
    finally:
        for worker in crew:
            worker.stop()


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_task(task: Task, job: Job, tokenizer: Tokenizer, advance: Advance) -> Part:
    """Encode one unit into its part; in the end `advance` was told exactly the bytes of the unit.

    Raises StoppedAt or DataError for what cannot be read.
    """
    meter = _Meter(advance)
    part = write_part(read_unit(task.unit, job.reading), task.stem, tokenizer, job.skip_damaged, meter.add)
    task.unit.check_unchanged()
    meter.finish(task.unit.file_bytes)
    return part


def _encode_here(tasks: Sequence[Task], job: Job, advance: Advance) -> Iterator[tuple[int, Part]]:
    tokenizer = load_tokenizer(job.tokenizer)
    for index, task in enumerate(tasks):
        try:
            part = encode_task(task, job, tokenizer, advance)
        except (StoppedAt, DataError, OSError) as error:
            raise TaskFailed(index, error) from error
        yield index, part


def _share_out(tasks: Sequence[Task], crew: Sequence["_Worker"], advance: Advance) -> Iterator[tuple[int, Part]]:
    waiting, busy = deque(range(len(tasks))), dict[Connection, tuple[int, _Worker]]()
    failed: dict[int, Exception] = {}
    idle = deque(crew)
    # A failed task ends the work, but only after those in front of it, which might fail too: one input, one error.
    while (waiting and not failed) or any(index < min(failed, default=len(tasks)) for index, _ in busy.values()):
        while idle and waiting and not failed:
            index, worker = waiting.popleft(), idle.popleft()
            worker.give(tasks[index])
            busy[worker.pipe] = (index, worker)
        for pipe in wait(list(busy)):
            index, worker = busy[pipe]  # pyright: ignore[reportArgumentType]
            message = worker.receive(tasks[index])
            if isinstance(message, int):
                advance(message)
                continue
            del busy[worker.pipe]
            idle.append(worker)
            if isinstance(message, Part):
                yield index, message
            else:
                failed[index] = message
    if failed:
        raise TaskFailed(min(failed), failed[min(failed)])


class _Worker:
    """A process that encodes the tasks it is given, one after the other."""

    def __init__(self, job: Job):
        context = multiprocessing.get_context("spawn")  # forking a process with threads is not safe
        self.pipe, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(target=_work, args=(theirs, job), daemon=True)
        previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited: it imports undisturbed
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, previous)
        theirs.close()  # or the end of the worker would not close the pipe

    def give(self, task: Task) -> None:
        with suppress(BrokenPipeError):  # it died: `receive` says so
            self.pipe.send(task)

    def receive(self, task: Task) -> int | Part | Exception:
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            raise DataError(
                f"a worker ended with exit code {self.process.exitcode} while it read {task.unit.path}; when the "
                "machine is out of memory, take fewer --workers. The same command goes on from the parts that are done"
            ) from None

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _work(pipe: Connection, job: Job) -> None:
    """What a worker does, until its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    tokenizer = load_tokenizer(job.tokenizer)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            task = pipe.recv()
            try:
                answer: Part | Exception = encode_task(task, job, tokenizer, pipe.send)
            except (BrokenPipeError, ConnectionResetError):
                raise
            except (StoppedAt, DataError, OSError) as error:
                answer = error
            pipe.send(answer)


class _Meter:
    """Gathers small progress, so that a message is worth sending."""

    def __init__(self, advance: Advance):
        self.advance, self.pending, self.told = advance, 0, 0

    def add(self, count: int) -> None:
        self.pending += count
        if self.pending >= PROGRESS_BYTES:
            self._tell(self.pending)

    def finish(self, total: int) -> None:
        self._tell(total - self.told)

    def _tell(self, count: int) -> None:
        self.advance(count)
        self.told, self.pending = self.told + count, 0
