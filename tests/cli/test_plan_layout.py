"""`nemohybrid plan layout`: what it counts, and what it refuses."""

import re
import shlex
from pathlib import Path

import pytest

TINY = ["plan", "layout", "model=tiny", "data.sequence_length=32", "train.global_batch=16", "train.microbatch=1"]


def gib(out: str, name: str) -> float:
    """Of the line that begins so."""
    found = re.search(rf"^  {re.escape(name)}.*?([\d.]+) GiB$", out, re.MULTILINE)
    assert found, f"no line {name!r} in\n{out}"
    return float(found[1])


def test_it_says_what_a_rank_keeps_and_sends(nemohybrid):
    words = ["model=nemotron_h_8b", "parallel.tensor=2", "data.sequence_length=8192", "train.global_batch=16"]
    code, out, err = nemohybrid("plan", "layout", "--gpus", "8", *words, "train.microbatch=1", "train.recompute=layer")
    assert (code, err) == (0, "")
    assert "nemotron_h_8b on 8 ranks: a step is 16 x 8,192 tokens, 4 microbatches on each of 4 data ranks" in out
    kept, sent = out.split("a rank sends in a step")
    assert gib(kept, "weights, fp32, 1/4") == 3.77
    assert 30 < gib(kept, "total") < 45
    assert gib(sent, "M layers, tensor ranks") > gib(sent, "* layers, tensor ranks") > 0
    parts = [float(size) for size in re.findall(r"([\d.]+) GiB$", sent, re.MULTILINE)]
    assert sum(parts[:-1]) == pytest.approx(parts[-1], abs=0.1)


def test_of_a_pipeline_it_takes_the_fullest_rank_and_says_how_long_ranks_wait(nemohybrid):
    words = ["parallel.pipeline=2", 'model.pattern="MMMMMM|-"']
    code, out, _ = nemohybrid(*TINY, *words, "--gpus", "4")
    assert code == 0
    assert "8 microbatches on each of 2 data ranks" in out
    assert "keeps, on pipeline rank 0" in out
    assert "1f1b, 8 microbatches: ranks wait" in out
    assert "sends is not counted" in out
    words[-1] = 'model.pattern="-|MMMMMM"'
    assert "keeps, on pipeline rank 1" in nemohybrid(*TINY, *words, "--gpus", "4")[1]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--gpus", "3", "parallel.tensor=2"], "does not make the 3 processes that run"),
        (["--gpus", "4", "parallel.data_mode=hybrid"], "parallel.data_shard=8"),
        (["--gpus", "4", "parallel.tensors=2"], "parallel.tensors"),
    ],
    ids=str,
)
def test_what_cannot_run_is_refused(nemohybrid, words, complaint):
    code, out, err = nemohybrid(*TINY, *words)
    assert code == 1
    assert complaint in err
    assert "GiB" not in out


def test_the_number_of_ranks_must_be_given(nemohybrid):
    assert nemohybrid(*TINY)[0] == 2


PAGE = (Path(__file__).parents[2] / "docs/parallelism.md").read_text(encoding="utf-8")
EXAMPLE = PAGE[PAGE.index("## An example, from 8 to 1024 GPUs") : PAGE.index("## A layout never changes")]
COMMANDS = re.findall(r"```bash\n(.*?)```\n\n```text\n(.*?)```", EXAMPLE, re.DOTALL)
ROWS = [
    (gpus, *row)
    for gpus, table in re.findall(r"^\| on (\d+) GPUs, .*\n\|[-:|]+\n((?:\|.*\n)+)", EXAMPLE, re.MULTILINE)
    for row in re.findall(r"^\| `(.+?)` \| (\S+) \| (.+?) \|", table, re.MULTILINE)
]


@pytest.mark.parametrize("number", range(len(COMMANDS)))
def test_the_example_shows_what_is_printed(nemohybrid, number):
    command, shown = COMMANDS[number]
    _, out, err = nemohybrid(*shlex.split(command.replace("\\\n", " "))[1:])
    for part in shown.split("  ...\n"):
        assert part in (out or err), f"the page shows\n{part}\nand the command prints\n{out or err}"


@pytest.mark.slow
@pytest.mark.parametrize("gpus, words, kept, sent", ROWS)
def test_the_tables_of_the_example_are_what_is_counted(nemohybrid, gpus, words, kept, sent):
    given = words if "microbatch" in words else f"{words} train.microbatch=1"
    model = ["model=nemotron_nano_v2_12b", "data.sequence_length=8192", "train.global_batch=768"]
    _, out, _ = nemohybrid("plan", "layout", "--gpus", gpus, *model, "train.recompute=layer", *given.split())
    memory, _, traffic = out.partition("sends")
    assert gib(memory, "total") == pytest.approx(float(kept), abs=0.051)
    if sent == "not counted":
        assert "is not counted" in traffic
    else:
        assert gib(traffic, "total") == pytest.approx(float(sent.replace(",", "")), abs=0.51)
