"""Workers, interruptions and a second command: the corpus is always the one that a single quiet run gives."""

import errno
import gzip
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from nemohybrid.data import parts, trained
from nemohybrid.data.corpus import Corpus
from nemohybrid.data.prepare import PrepareOptions, prepare
from nemohybrid.data.readers import Reading, read_unit
from nemohybrid.data.tokenizer import ByteTokenizer, train_bpe
from nemohybrid.data.trained import Training, training_texts
from nemohybrid.data.units import cut_into_units
from nemohybrid.data.workers import Job, Task, encode_all
from nemohybrid.data.workspace import workspace
from nemohybrid.errors import DataError
from nemohybrid.locking import FolderLock

BYTES = ByteTokenizer()
SUFFIXES = ("bin", "idx", "json")


def line(text: str) -> bytes:
    return json.dumps({"text": text}).encode() + b"\n"


def inputs_of(folder: Path) -> list[Path]:
    """Two jsonl files whose lines are shorter and longer than the units below, and two files of one unit each."""
    lines = b"".join(line(f"{number} " * (number * 37 % 101)) for number in range(150))
    files = {
        "a.jsonl": lines,
        "b.txt": b"text\n" * 50,
        "c.jsonl.gz": gzip.compress(lines),
        "d.jsonl": b"\n" + line("x" * 5000) + line("last")[:-1],
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in files]


def content_of(prefix) -> list[bytes]:
    return [Path(f"{prefix}.{suffix}").read_bytes() for suffix in SUFFIXES]


def options(**changes) -> PrepareOptions:
    return PrepareOptions(**{"unit_bytes": 3000, **changes})


@pytest.mark.parametrize("unit_bytes, workers", [(1500, 1), (4000, 2), (4000, 3)])
def test_the_corpus_is_the_same_for_any_workers_and_units(unit_bytes, workers, tmp_path):
    inputs = inputs_of(tmp_path)
    prepare(inputs, tmp_path / "whole", BYTES)
    prepare(inputs, tmp_path / "cut", BYTES, PrepareOptions(unit_bytes=unit_bytes, workers=workers))
    assert content_of(tmp_path / "cut") == content_of(tmp_path / "whole")
    left = {path.name for path in tmp_path.iterdir() if path.name.startswith("cut")}
    assert left == {"cut.bin", "cut.idx", "cut.json", "cut.tokenizer"}, "the parts were not cleared away"


def test_a_file_that_is_named_twice_is_there_twice(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(line("one") + line("two"))
    info = prepare([tmp_path / "a.jsonl"] * 2, tmp_path / "c", BYTES, options(unit_bytes=10)).info
    assert info.documents == 4
    assert Corpus(tmp_path / "c").tokens(2).tolist() == [*b"one", 256]


def test_every_line_belongs_to_exactly_one_unit(tmp_path):
    lines = [line("x" * size) for size in (0, 1, 40, 2, 0, 90)]
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    for unit_bytes in range(1, sum(map(len, lines)) + 2):
        units = cut_into_units(tmp_path / "a.jsonl", "text", unit_bytes)
        lengths = [len(document.text) for unit in units for document in read_unit(unit, Reading())]
        assert lengths == [0, 1, 40, 2, 0, 90], f"units of {unit_bytes} bytes lose or double a line"
        assert sum(unit.file_bytes for unit in units) == sum(map(len, lines))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_damaged_line_far_inside_a_file_has_its_own_number(workers, tmp_path):
    lines = [line(f"{number:02}") for number in range(40)]
    lines[23], lines[30] = b"bad\n", b"worse\n"
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    for unit_bytes in (4 * len(lines[0]), 130):
        with pytest.raises(DataError, match=r"a\.jsonl, line 24: not a JSON object"):
            prepare([tmp_path / "a.jsonl"], tmp_path / "c", BYTES, options(workers=workers, unit_bytes=unit_bytes))


def test_the_first_of_two_errors_is_reported_whichever_is_found_first(tmp_path):
    (tmp_path / "slow.jsonl").write_bytes(line("x" * 3_000_000) + b"first\n")
    (tmp_path / "quick.jsonl").write_bytes(b"second\n")
    with pytest.raises(DataError, match=r"slow\.jsonl, line 2"):
        prepare(
            [tmp_path / "slow.jsonl", tmp_path / "quick.jsonl"],
            tmp_path / "c",
            train_bpe(["x y"], 258),
            PrepareOptions(workers=2),
        )


def broken_at_the_end(folder: Path) -> list[Path]:
    inputs = inputs_of(folder)
    with inputs[-1].open("ab") as file:
        file.write(b"\nbad\n")
    return inputs


def test_what_is_done_is_not_done_again(tmp_path):
    inputs = broken_at_the_end(tmp_path)
    with pytest.raises(DataError, match=r"d\.jsonl, line 4"):
        prepare(inputs, tmp_path / "c", BYTES, options())
    prepared = prepare(inputs, tmp_path / "c", BYTES, options(skip_damaged=True))
    last = cut_into_units(inputs[-1], "text", 3000)[-1]
    assert prepared.read_bytes == last.file_bytes, "more than the last unit was read again"
    prepare(inputs, tmp_path / "fresh", BYTES, options(skip_damaged=True))
    assert content_of(tmp_path / "c") == content_of(tmp_path / "fresh")


def test_a_part_that_skipped_damage_does_not_serve_a_command_that_stops_there(tmp_path):
    inputs = broken_at_the_end(tmp_path)
    (tmp_path / "broken.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match="damaged"):
        prepare([*inputs, tmp_path / "broken.gz"], tmp_path / "c", BYTES, options(skip_damaged=True))
    with pytest.raises(DataError, match=r"d\.jsonl, line 4"):
        prepare(inputs, tmp_path / "c", BYTES, options())


@pytest.mark.parametrize("change", ["tokenizer", "field", "file", "part", "record"])
def test_a_part_of_anything_else_is_not_taken(change, tmp_path):
    lines = b"".join(b'{"text": "t%d", "other": "o%d"}\n' % (number, number) for number in range(200))
    source = tmp_path / "a.jsonl"
    source.write_bytes(lines + b"bad\n")
    with pytest.raises(DataError):
        prepare([source], tmp_path / "c", BYTES, options())
    tokenizer, reading = BYTES, Reading()
    if change == "tokenizer":
        tokenizer = train_bpe(["t1 t2"], 258)
    elif change == "field":
        reading = Reading("other")
    elif change == "file":
        source.write_bytes(lines.replace(b"t1", b"T1") + b"bad\n")
    else:
        for path in (tmp_path / "c.parts").glob("*.bin" if change == "part" else "*.json"):
            os.truncate(path, 3)
    for prefix in ("c", "fresh"):
        prepare([source], tmp_path / prefix, tokenizer, options(reading=reading, skip_damaged=True))
    assert content_of(tmp_path / "c") == content_of(tmp_path / "fresh"), f"parts of another {change} were taken"


def test_a_trained_tokenizer_is_not_trained_again(tmp_path, monkeypatch):
    inputs, calls = broken_at_the_end(tmp_path), []
    real = trained.make_tokenizer
    monkeypatch.setattr(trained, "make_tokenizer", lambda *arguments: calls.append(arguments) or real(*arguments))
    monkeypatch.setattr(trained, "training_texts", lambda training: iter(["some text to learn from"]))
    for _ in range(2):
        with pytest.raises(DataError, match=r"d\.jsonl, line 4"):
            prepare(inputs, tmp_path / "c", "bpe:260", options())
    assert len(calls) == 1
    with pytest.raises(DataError):
        prepare(inputs, tmp_path / "c", "bpe:261", options())
    assert len(calls) == 2, "a tokenizer of another size was taken"


def test_training_reads_the_head_of_every_file(tmp_path):
    for name, documents in {"a": 2, "b": 100, "c": 100}.items():
        (tmp_path / f"{name}.jsonl").write_bytes(line(name * 10) * documents)
    units = [unit for name in "abc" for unit in cut_into_units(tmp_path / f"{name}.jsonl", "text", 200)]
    texts = "".join(training_texts(Training(units, Reading(), False, 200)))
    assert {name: texts.count(name) for name in "abc"} == {"a": 20, "b": 90, "c": 90}


def test_a_second_command_on_the_same_output_is_refused(tmp_path):
    inputs = inputs_of(tmp_path)
    with workspace(tmp_path / "c"), pytest.raises(DataError, match=r"/c is being written by process \d+ on .*\. Wait"):
        prepare(inputs, tmp_path / "c", BYTES)
    prepare(inputs, tmp_path / "c", BYTES)


def test_a_folder_that_is_not_its_own_is_not_emptied(tmp_path):
    mine = tmp_path / "c.parts"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    (tmp_path / "in.txt").write_text("text")
    with pytest.raises(DataError, match="was not made by `data prepare`"):
        prepare([tmp_path / "in.txt"], tmp_path / "c", ByteTokenizer())
    (tmp_path / "d.parts").symlink_to(mine)
    with pytest.raises(DataError, match="was not made by `data prepare`"):
        prepare([tmp_path / "in.txt"], tmp_path / "d", ByteTokenizer())
    assert (mine / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["c.json", "c.bin", "c.tokenizer/in.txt"])
def test_an_input_is_never_overwritten(name, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("text")
    with pytest.raises(DataError, match="would be overwritten by the corpus"):
        prepare([path], tmp_path / "c", ByteTokenizer())
    assert path.read_text() == "text"


def test_a_lock_that_was_deleted_meanwhile_is_no_lock(tmp_path, monkeypatch):
    """The last owner sweeps its folder; who opened the lock just before must not hold a file that is gone."""
    first, second = FolderLock(tmp_path / "p"), FolderLock(tmp_path / "p")
    real = os.open

    def swept_after_open(path, *rest):
        descriptor = real(path, *rest)
        monkeypatch.undo()
        (tmp_path / "p" / "lock").unlink()
        return descriptor

    monkeypatch.setattr(os, "open", swept_after_open)
    assert first.take() == ""
    assert "process" in second.take(), "a second owner beside the first"


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path):
    source = tmp_path / "a.jsonl"
    source.write_bytes(line("one"))
    (unit,) = cut_into_units(source, "text")
    source.write_bytes(line("one") + line("two"))
    with pytest.raises(DataError, match="changed while it was read"):
        unit.check_unchanged()


def test_a_full_disk_leaves_the_old_corpus_and_the_parts(tmp_path, monkeypatch):
    inputs, writes = inputs_of(tmp_path), []
    prepare(inputs[:1], tmp_path / "c", BYTES, options())
    old = content_of(tmp_path / "c")

    def full(file):
        writes.append(file)
        if len(writes) > 10:  # three to a part
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(parts, "flush_to_disk", full)
        with pytest.raises(DataError, match=r"no room left on the disk .* goes on"):
            prepare(inputs, tmp_path / "c", BYTES, options())
    assert content_of(tmp_path / "c") == old
    assert len(list((tmp_path / "c.parts").glob("*.json"))) == 3, "finished parts were lost"
    assert not list((tmp_path / "c.parts").glob("*.tmp"))
    prepare(inputs, tmp_path / "c", BYTES, options())
    prepare(inputs, tmp_path / "fresh", BYTES)
    assert content_of(tmp_path / "c") == content_of(tmp_path / "fresh")


def test_a_worker_that_dies_is_named_with_what_to_do(tmp_path):
    BYTES.save(tmp_path / "tokenizer")
    (tmp_path / "a.txt").write_text("text")
    units = [unit for _ in range(4) for unit in cut_into_units(tmp_path / "a.txt", "text")]
    tasks = [Task(unit, tmp_path / f"part{number}") for number, unit in enumerate(units)]
    results = encode_all(tasks, Job(str(tmp_path / "tokenizer"), Reading(), False), 2, lambda count: None)
    next(results)
    for process in multiprocessing.active_children():
        process.kill()
        process.join()
    with pytest.raises(DataError, match=r"exit code -9 while it read .*a\.txt; .* fewer --workers"):
        list(results)
    assert not multiprocessing.active_children()


@contextmanager
def command(folder: Path, prefix: str, inputs: list[Path]):
    """The real command line with two workers, in a process group of its own."""
    words = ["data", "prepare", "--input", *map(str, inputs), "--output", str(folder / prefix)]
    words += ["--tokenizer", str(folder / "tokenizer"), "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "nemohybrid", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def many_files(folder: Path, count: int = 24) -> list[Path]:
    """As many units, each of which takes a worker a moment: all of them longer than a test is ever late with its signal."""
    train_bpe(["some words to learn, and some more words"], 280).save(folder / "tokenizer")
    files = [folder / f"{number:02}.jsonl" for number in range(count)]
    for number, path in enumerate(files):
        path.write_bytes(line(f"some words, and {number} more of them. " * 1000) * 8)
    return files


def records_of(prefix: Path) -> dict[Path, int]:
    """Files of the finished parts and when they were written."""
    stems = [path.with_suffix("") for path in Path(f"{prefix}.parts").glob("*.json")]
    return {path: path.stat().st_mtime_ns for stem in stems for path in Path(f"{prefix}.parts").glob(f"{stem.name}.*")}


def wait_until(condition, what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.005)


def test_a_killed_command_goes_on_where_it_was(tmp_path):
    files, prefix = many_files(tmp_path), tmp_path / "c"
    with command(tmp_path, "c", files) as process:
        wait_until(lambda: len(records_of(prefix)) >= 9 or process.poll() is not None, "three parts")
        workers = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "the command was over before it could be killed"
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive, "workers outlive the command that was killed"
    assert not Path(f"{prefix}.bin").exists()
    before = records_of(prefix)
    for path, written in before.items():
        os.utime(path, ns=(0, written - 10**9))
    before, sizes = records_of(prefix), {path: path.stat().st_ino for path in before}
    (tmp_path / "bad.jsonl").write_bytes(b"bad\n")  # keeps the parts, so that they can be looked at
    with command(tmp_path, "c", [*files, tmp_path / "bad.jsonl"]) as process:
        errors = process.communicate(timeout=60)[1]
        assert process.returncode == 1, errors
    assert "bad.jsonl, line 1: not a JSON object" in errors
    after = records_of(prefix)
    assert len(after) == 3 * len(files)
    assert {path: after[path] for path in before} == before, "a finished part was written again"
    assert {path: path.stat().st_ino for path in before} == sizes
    with command(tmp_path, "c", files) as process:
        printed, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    assert "read 0 bytes" in printed
    prepare(files, tmp_path / "fresh", str(tmp_path / "tokenizer"))
    assert content_of(prefix) == content_of(tmp_path / "fresh")
    assert not Path(f"{prefix}.parts").exists()


def test_ctrl_c_says_that_the_same_command_goes_on(tmp_path):
    files = many_files(tmp_path, 120)
    # A shell starts its background jobs with Ctrl-C ignored, and what they start inherits that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with command(tmp_path, "c", files) as process:
        wait_until(lambda: records_of(tmp_path / "c") or process.poll() is not None, "one part")
        os.killpg(process.pid, signal.SIGINT)
        printed, errors = process.communicate(timeout=60)
        assert process.returncode == 130, errors
    assert errors.strip() == f"stopped; the same command goes on from {tmp_path}/c.parts"
    assert printed == ""
    assert records_of(tmp_path / "c")
