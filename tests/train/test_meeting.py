"""Ranks that cannot meet end with one sentence: who, where, why, and what to do."""

import os
import socket

import pytest
from forked import fork, wait

from nemohybrid.errors import TrainingError
from nemohybrid.train.run import join


@pytest.fixture
def told(configure, tmp_path):
    """`told(RANK="0", ...)`: what a rank of two that joins with these variables says, in a process of its own."""
    config = configure("cluster.timeout_minutes=0.02", world_size=2)

    def meet() -> None:
        try:
            join(config)
        except TrainingError as error:
            (tmp_path / "said").write_text(str(error))

    def attempt(**variables: str) -> str:
        def member() -> None:
            for name in ("MASTER_ADDR", "MASTER_PORT"):
                os.environ.pop(name, None)
            os.environ.update({"LOCAL_RANK": "0", "WORLD_SIZE": "2"} | variables)
            meet()

        assert wait(fork(member, tmp_path / "traceback")) == 0, (tmp_path / "traceback").read_text()
        return (tmp_path / "said").read_text()

    return attempt


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_a_port_that_is_taken(told):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        said = told(RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    assert f"rank 0 on {socket.gethostname()} did not meet all 2 ranks at 127.0.0.1:{port}. " in said
    assert "Another program has the port" in said
    assert "EADDRINUSE" in said


def test_a_rank_that_does_not_come(told):
    said = told(RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    assert "The others did not come" in said
    assert "1/2 clients joined" in said


def test_a_first_rank_that_is_not_there(told):
    said = told(RANK="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    assert "Rank 0 is not there" in said


def test_an_address_that_nobody_gave(told):
    said = told(RANK="1")
    assert "at ?:?. " in said
    assert "MASTER_ADDR expected, but not set" in said


@pytest.mark.parametrize("words", ["Unable to find address for: eth9", "something new"])
def test_what_is_heard_is_never_hidden(words, monkeypatch):
    from nemohybrid.train.meeting import in_words_of_a_meeting

    with pytest.raises(TrainingError, match=words), in_words_of_a_meeting():
        raise RuntimeError(words)
