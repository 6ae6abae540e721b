"""The arguments that a shell script gives to the program that trains."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from nemohybrid.errors import ConfigError
from nemohybrid.interop.megatron.arguments import CONTRADICTION, TO_GIVE, Arguments, Given, collect, name_of
from nemohybrid.interop.megatron.shell import Statement, Variables, statements

_OPENING = ("if", "for", "while", "until", "case", "select", "function")
_CLOSING = ("fi", "done", "esac")
_PASSING = ("then", "else", "elif", "do", "time", "exec", "!")
_EXPANSION = re.compile(r"\$(\w+|\{\w+(\[[@*]\])?\})")
_LISTS = ("data_path", "train_data_path", "valid_data_path", "test_data_path", "rampup_batch_size")


def read_script(text: str, defaults: Mapping[str, Any]) -> Arguments:
    """The arguments of the one command that gets some; without such a command, those in the variables.

    Conditions are not evaluated: what stands under one is taken as it stands, and a remark says so. Raises ConfigError,
    with the lines, when several commands could be meant.
    """
    variables, conditional, depth = Variables(), list[str](), 0
    commands: list[tuple[int, list[str]]] = []
    for statement in statements(text):
        depth += _depth(statement)
        if statement.name:
            if depth > 0:
                conditional.append(f"{statement.name}= in line {statement.line}")
            variables.assign(statement)
        elif words := _program_and_arguments(statement, variables):
            if commands and words[0] == commands[-1][1][0] == "":  # lines of one bare list
                commands[-1][1].extend(words[1:])
            else:
                commands.append((statement.line, words))
    arguments = collect(_of_command(commands) if commands else _of_variables(variables), defaults)
    for subject in conditional:
        reason = "stands under a condition or in a loop, which is not evaluated; taken as it stands"
        arguments.remark(CONTRADICTION, subject, reason)
    for word in dict.fromkeys(word for _, words in commands for word in words if _EXPANSION.fullmatch(word)):
        arguments.remark(TO_GIVE, word, "is not set in the file: what it holds is not translated")
    return arguments


def _depth(statement: Statement) -> int:
    first = statement.words[0].plain if statement.words and not statement.name else ""
    return (first in _OPENING) - (first in _CLOSING)


def _of_command(commands: list[tuple[int, list[str]]]) -> Iterator[Given]:
    training = [found for found in commands if "train" in found[1][0].rpartition("/")[2]] or commands
    if len(training) > 1:
        lines = ", ".join(str(line) for line, _ in training)
        raise ConfigError(f"several commands take arguments (lines {lines}); leave the one that trains in the file")
    line, words = training[0]
    yield from _parse(words[1:], f"line {line}")


def _of_variables(variables: Variables) -> Iterator[Given]:
    """A file that only prepares arguments for others to use, such as the model configurations of Megatron-LM's examples."""
    for name, words in variables.values.items():
        parts = words[0].split() if len(words) == 1 else words
        yield from _parse(parts, name)


def _program_and_arguments(statement: Statement, variables: Variables) -> list[str]:
    """A command -> [program, argument, ...]; [] where no argument of Megatron-LM can be in it.

    The program is the first word that ends in .py: what stands before are launchers and their own options.
    """
    words = [text for word in statement.words for text in variables.expand(word)]
    words = [part for word in words for part in (word.split() if ".py " in word else [word])]  # bash -c "python ..."
    words = words[next((at for at, word in enumerate(words) if word not in _PASSING), len(words)) :]
    programs = [at for at, word in enumerate(words) if word.endswith(".py")]
    if programs:
        words = words[programs[0] :]
    elif words and words[0].startswith("--"):  # a bare list of arguments
        words = ["", *words]
    else:  # `ls --color` is none of ours
        return []
    return words if any(word.startswith("--") for word in words[1:]) else []


def _parse(words: list[str], where: str) -> Iterator[Given]:
    """`--flag`, `--flag value`, `--flag=value`, `--flag value value ...`."""
    flag, values = "", list[str]()
    for word in [*words, "--"]:
        if not word.startswith("--"):
            lone = _EXPANSION.fullmatch(word) and values and name_of(flag) not in _LISTS
            values += [] if lone or not word.strip("\\") else [word]
            continue
        if flag:
            yield Given(name_of(flag), flag, _value(values), where)
        flag, equals, value = word.partition("=")
        values = [value] if equals else []
        flag = flag if len(flag) > 2 else ""


def _value(values: list[str]) -> Any:
    if not values:
        return True
    return values[0] if len(values) == 1 else values
