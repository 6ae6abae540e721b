"""`nemohybrid plan layout`: what it counts, and what it refuses."""

import re

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
