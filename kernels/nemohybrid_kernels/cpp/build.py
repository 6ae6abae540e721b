"""Compiles the C++ files beside this one into a shared library, once for each machine and version."""

import fcntl
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch

FLAGS = ["-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC"]
"""Nothing that lets the compiler reorder sums or forget NaN and infinity."""
COMMAND = "python -m nemohybrid_kernels.cpp"
PATIENCE = 10 * 60
"""Seconds after which a compiler is taken to hang. It needs 5."""


class BuildError(RuntimeError):
    """The library could not be built; the message says why."""


@cache
def library_file() -> Path:
    """Where the library of these sources, these flags, this torch and this processor is, or would be.

    The processor counts because its own instructions are used: nodes of a cluster may share a home and differ in them.
    """
    parts = [*(source.read_bytes() for source in _sources(headers=True)), *(flag.encode() for flag in _flags())]
    parts += [torch.__version__.encode(), str(openmp_file()).encode(), _processor()]
    key = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:20]
    return cache_folder() / f"kernels-{key}.so"


def cache_folder() -> Path:
    """$NEMOHYBRID_CACHE, or the user's cache folder."""
    own = os.environ.get("NEMOHYBRID_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nemohybrid"


def openmp_file() -> Path | None:
    """The OpenMP library that torch has loaded. Ours must use the same one: each has threads of its own.

    Other packages bring theirs. Torch's is the one in its own folder; a torch that brings none takes the system's, whose
    name carries no digits of a wheel.
    """
    if not sys.platform.startswith("linux"):
        return None
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    known = sorted(file for file in map(Path, mapped) if file.name.startswith(("libgomp", "libiomp5")))
    own = [file for file in known if file.is_relative_to(Path(torch.__file__).parents[1] / "torch")]
    own += [file for file in known if file.is_relative_to(Path(torch.__file__).parents[1] / "torch.libs")]
    return next(iter(own + [file for file in known if "-" not in file.name]), None)


def build() -> Path:
    """Compile unless that has been done, and return the file. One process at a time; others wait for it.

    Raises BuildError.
    """
    target = library_file()
    compiler, openmp = shutil.which(os.environ.get("CXX") or "g++"), openmp_file()
    if compiler is None:
        raise BuildError("there is no C++ compiler: install g++, or name one in CXX")
    if openmp is None:
        raise BuildError("torch has loaded no OpenMP library (libgomp, libiomp5) that the kernels could share")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with (target.parent / "kernels.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                _compile(compiler, openmp, target)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{error} (NEMOHYBRID_CACHE names another folder)") from error
    return target


def is_trusted(file: Path) -> bool:
    """Whether nobody but this user and root could have written the file: it is about to be run."""
    status = file.stat()
    return status.st_uid in (0, os.getuid()) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _compile(compiler: str, openmp: Path, target: Path) -> None:
    """Nobody ever sees half a library: it is moved into its place when it is whole."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="building-") as folder:
        _run([compiler, *_flags(), "-c", *map(str, _sources())], folder)
        objects = [f"{source.stem}.o" for source in _sources()]
        _run([compiler, "-shared", "-Wl,--no-undefined", *objects, str(openmp), "-o", target.name], folder)
        (Path(folder) / target.name).chmod(0o755)
        (Path(folder) / target.name).replace(target)


def _run(command: list[str], folder: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(command)} failed with {done.returncode}:\n{done.stderr[-4000:]}")


def _flags() -> list[str]:
    """512 bits wide where there are such: compilers prefer 256, from the days when processors slowed down for more."""
    return [*FLAGS, *(["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else [])]


def _sources(headers: bool = False) -> list[Path]:
    folder = Path(__file__).parent
    return sorted([*folder.glob("*.cpp"), *(folder.glob("*.h") if headers else ())])


def _processor() -> bytes:
    """What /proc/cpuinfo says of the first core's instructions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    first = [
        next((line for line in lines if line.startswith(name)), "") for name in ("model name", "flags", "Features")
    ]
    return "\n".join([platform.machine(), *first]).encode()
