"""From a file of Megatron-LM's or Megatron-Bridge's to overrides, with a word about every argument that has none."""

from pathlib import Path

from nemohybrid.interop.megatron.arguments import NOT_NEEDED, UNKNOWN
from nemohybrid.interop.megatron.counterparts import verdict
from nemohybrid.interop.megatron.files import read_arguments
from nemohybrid.interop.megatron.model import translate_model
from nemohybrid.interop.megatron.precision import translate_precision
from nemohybrid.interop.megatron.training import translate_training
from nemohybrid.interop.megatron.translation import Translation


def translate(path: Path) -> Translation:
    """Overrides and remarks for the arguments in a file. Nothing in it is executed. Raises ConfigError if it cannot be read."""
    now = Translation(read_arguments(path))
    translate_model(now)
    translate_training(now)
    translate_precision(now, path.parent)
    _judge_the_rest(now)
    return now


def _judge_the_rest(now: Translation) -> None:
    """A remark for each argument that nothing has been made of."""
    arguments = now.arguments
    pattern = now.overrides.get("model.pattern", "")
    for name, given in arguments.given.items():
        if name in arguments.taken or given.value is None:
            continue
        known = verdict(name, pattern)
        if known:
            arguments.remark(known[0], given.text, known[1])
        elif given.value is False or given.value == [] or given.value == {}:
            arguments.remark(NOT_NEEDED, given.text, "switched off in the file")
        else:
            arguments.remark(UNKNOWN, given.text, "not an argument that this translation knows")
