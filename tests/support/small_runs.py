"""A run of milliseconds a step, on any machine, and commands in this process."""

from nemohybrid.__main__ import main

TINY = [
    "model=tiny",
    "model.hidden_size=32",
    "model.ssm_state_size=8",
    'model.pattern="M-*"',
    "model.dtype=float32",
    "data.sequence_length=32",
    "run.device=cpu",
    "logging.picture=false",
]
SMALL = ["data=shakespeare", "data.tokenizer=byte", *TINY]


def in_this_process(capfd, *words: str) -> tuple[int, str, str]:
    """`nemohybrid WORDS` -> (exit status, stdout, stderr)."""
    try:
        code = main(list(words))
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    out, err = capfd.readouterr()
    return code, out, err
