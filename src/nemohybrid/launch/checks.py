"""What may stand in a script: names, times, mounts, and never a secret."""

import os
import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from nemohybrid.config.secrets import is_secret
from nemohybrid.errors import ConfigError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
NAMES = re.compile(rf"{NAME.pattern}(,{NAME.pattern})*")
CLUSTER_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,48}[a-z0-9])?")
JOB_NAME = re.compile(r"[a-z]([a-z0-9-]{0,48}[a-z0-9])?")
"""A label of DNS as RFC 1035 has it, which Kubeflow asks for, with room for what the names of pods have behind it."""
DIRECTIVE = re.compile(r"--([a-z][a-z-]*)(=[^\s'\"\\#]+)?")
HOST_AND_PORT = re.compile(rf"{NAME.pattern}:(?P<port>[1-9]\d{{0,4}})")
TIME = re.compile(r"(?:(?P<days>\d+)-(?P<h>\d+)(?::(?P<m>\d+)(?::(?P<s>\d+))?)?)|(?P<clock>\d+(?::\d+){0,2})")
TIMES = "minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes or days-hours:minutes:seconds"
MOUNT = re.compile(r"(?P<source>tmpfs|[./][^:,]*):(?P<target>/[^:,]*)(:(?P<options>[^:,]+))?")
MOUNT_OPTION = re.compile(r"ro|rw|r?(bind|private|slave|shared|unbindable)|no(suid|dev|exec|atime)|x-[a-z]+(=[a-z]+)?")
MOST_AHEAD = 65_535
"""Seconds before the limit at which SLURM can send a signal."""
MOST_PORT = 65_535
LEAST_SECRET = 8
"""Characters. A shorter value could stand in a script by chance."""
LEAST_TRAINING = 60
"""Seconds of an attempt, before it is asked to save."""


def matching(option: str, text: str, form: re.Pattern[str], legal: str) -> str:
    """`text`, where all of it has the form. Raises ConfigError, which names what would be right, otherwise."""
    if not form.fullmatch(text):
        raise ConfigError(f"{option} {text!r}: not understood. Legal: {legal}")
    return text


def name(option: str, text: str) -> str:
    """A single name, such as that of a job."""
    return matching(option, text, NAME, "letters, digits, _ . and -, the first a letter or a digit")


def names(option: str, text: str) -> str:
    """A name or several, with commas between them, as partitions of SLURM may be given."""
    return matching(option, text, NAMES, "a name of letters, digits, _ . and -; or several with commas between them")


def seconds_of(text: str) -> int:
    """A time limit of SLURM in seconds. Raises ConfigError for another form, and for a limit that is none."""
    found = TIME.fullmatch(text)
    if not found:
        raise ConfigError(f"--time {text!r}: no time of SLURM. Legal: {TIMES}")
    if found["clock"] is None:
        days, hours, minutes, seconds = (int(found[part] or 0) for part in ("days", "h", "m", "s"))
    else:
        days, hours, minutes, seconds = _clock([int(part) for part in found["clock"].split(":")])
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if not total:
        raise ConfigError(f"--time {text!r}: without a limit nothing asks the run to save. Legal: more, e.g. 24:00:00")
    return total


def _clock(parts: list[int]) -> tuple[int, int, int, int]:
    """Days, hours, minutes, seconds. A single number counts minutes."""
    if len(parts) == 3:
        return 0, parts[0], parts[1], parts[2]
    return 0, 0, parts[0], parts[1] if len(parts) == 2 else 0


def room_to_save(time: str, save_seconds: int) -> None:
    """Raises ConfigError where the signal to save would come at the start. SLURM may send it a minute early."""
    limit = seconds_of(time)
    if save_seconds > MOST_AHEAD:
        raise ConfigError(f"--save-seconds {save_seconds}: SLURM signals at most {MOST_AHEAD} s ahead")
    most = limit - 60 - LEAST_TRAINING
    if save_seconds > most:
        legal = f"up to {most}, or a longer --time" if most > 0 else "a longer --time"
        raise ConfigError(
            f"--save-seconds {save_seconds}: of {limit} s of --time {time} not a minute would be left to train. Legal: {legal}"
        )


def directive(text: str, taken: Iterable[str]) -> str:
    """An option of sbatch that is passed on. Raises ConfigError for those in `taken`, and for short forms of them."""
    matching("--sbatch", text, DIRECTIVE, "an option of sbatch in one word, e.g. --sbatch=--qos=high")
    found = DIRECTIVE.fullmatch(text)
    assert found is not None
    if meant := next((option for option in taken if option.startswith(found[1])), None):
        raise ConfigError(
            f"--sbatch={text}: the script decides about --{meant}. Legal: the options of `nemohybrid launch slurm --help`, "
            "or what --dry-run prints, edited"
        )
    return text


def rendezvous(text: str) -> str:
    """HOST:PORT. Raises ConfigError for another form, and for a port that there cannot be."""
    found = HOST_AND_PORT.fullmatch(text)
    if not found or int(found["port"]) > MOST_PORT:
        raise ConfigError(
            f"--rendezvous {text!r}: not understood. Legal: HOST:PORT, the port up to {MOST_PORT}, e.g. node1:29400"
        )
    return text


def one_line(option: str, text: str) -> str:
    """Raises ConfigError for line ends and other control characters, which a script cannot quote in one line."""
    if not text or not text.isprintable():
        raise ConfigError(f"{option} {text!r}: must be printable text in one line")
    return text


def program(text: str) -> str:
    """A program, by its name or path. Raises ConfigError for one with its arguments, which a script would take for its name."""
    if " " in one_line("--python", text) and "/" not in text:
        raise ConfigError(
            f"--python {text!r}: is one word to the script. Legal: a program without arguments, e.g. .venv/bin/python"
        )
    return text


def setup(text: str, look: bool) -> str:
    """The path of a file for `source`, which looks on PATH for one without a /. look: raise ConfigError where it is not here."""
    file = os.path.expanduser(one_line("--setup", text))  # noqa: PTH111 - a plain string: Path would drop a ./
    if look and not Path(file).is_file():
        raise ConfigError(
            f"--setup {text!r}: no such file here. Legal: one that is there, or with --elsewhere one that only nodes see"
        )
    return file if "/" in file else f"./{file}"


def image(text: str) -> str:
    """An image for pyxis. Raises ConfigError for a file that it would look for in a registry."""
    if text.endswith((".sqsh", ".squashfs")) and not text.startswith((".", "/")):
        raise ConfigError(f"--container-image {text!r}: without a / in front it is no file to pyxis. Legal: ./{text}")
    return one_line("--container-image", text)


def mount(text: str) -> str:
    """SOURCE:TARGET or SOURCE:TARGET:OPTIONS. Raises ConfigError for what pyxis refuses, or would cut elsewhere."""
    found = MOUNT.fullmatch(one_line("--mount", text))
    options = (found["options"] or "ro").split("+") if found else []
    if not options or not all(MOUNT_OPTION.fullmatch(option) for option in options):
        legal = (
            "/SOURCE:/TARGET, ./SOURCE:/TARGET, either with options as :ro+nosuid, without commas; repeat it for more"
        )
        raise ConfigError(f"--mount {text!r}: not understood. Legal: {legal}")
    return text


def volume(text: str) -> tuple[str, str]:
    """CLAIM:/PATH of a persistent volume, as (claim, path)."""
    claim, _, path = one_line("--volume", text).partition(":")
    if not CLUSTER_NAME.fullmatch(claim) or not path.startswith("/") or ":" in path:
        legal = "CLAIM:/PATH, the claim in small letters, digits and -"
        raise ConfigError(f"--volume {text!r}: not understood. Legal: {legal}")
    return claim, path


def distinct(option: str, targets: Sequence[str]) -> None:
    """Raises ConfigError where two mounts have the same place."""
    if twice := [target for i, target in enumerate(targets) if target in targets[:i]]:
        raise ConfigError(f"{option}: {twice[0]} is given twice. Legal: a place of its own for each")


def on_a_volume(run_dir: str, workdir: str | None, places: Sequence[str]) -> None:
    """Raises ConfigError for a run folder that would be lost with its container. A relative one may lie anywhere in an image."""
    if not places:
        raise ConfigError(
            "no --volume: the run folder would be lost with its container. Give --volume CLAIM:/PATH, and a run.dir on it"
        )
    folder = PurePosixPath(posixpath.normpath(posixpath.join(workdir or "", run_dir)))
    if folder.is_absolute() and not any(folder.is_relative_to(posixpath.normpath(place)) for place in places):
        raise ConfigError(
            f"run.dir={run_dir}: {folder} would be lost with its container. Legal: a folder in {' or '.join(places)}"
        )


def refuse_secrets(texts: Iterable[str], environment: Mapping[str, str]) -> None:
    """Raises ConfigError, which does not tell it, where the value of a secret of the environment stands in one of `texts`."""
    texts = list(texts)
    for variable, value in environment.items():
        if is_secret(variable) and len(value) >= LEAST_SECRET and any(value in text for text in texts):
            raise ConfigError(
                f"the script would hold the value of {variable}, for everybody to read. "
                f"Leave it out: the run takes {variable} from the environment"
            )
