"""Collects the dependencies of nemohybrid as wheels for Linux x86-64, without torch and what comes with it.

    python scripts/wheelhouse.py [FOLDER] [--python 3.12] [--peers]

The versions are those of pyproject.toml. FOLDER/contents.json says what was collected for which requirements: as long
as both are unchanged, another run only checks the sizes. Exits 1 when pip fails or the wheels weigh over 60 MiB.

--peers: into FOLDER/peers also what our kernels and models are compared with, transformers and the source of mamba-ssm. What
of it cannot be had is said, and fails nothing.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path

LIMIT = 60 * 2**20
"""Bytes of all wheels together: what can be carried to a machine beside the clone."""

TESTING = ("pytest", "pytest-timeout", "hypothesis")
"""What the tests need of the extra `dev`."""

SOURCE_ONLY = "antlr4-python3-runtime==4.9.*"
"""hydra-core and omegaconf want exactly this; it was never published as a wheel, and is pure Python."""

PLACEHOLDERS = {"torch": "2.11.0+placeholder", "huggingface-hub": "1.0+placeholder"}
"""An empty wheel of these satisfies pip, so that it fetches neither them nor what only they need.

torch is the machine's own. tokenizers imports huggingface-hub only to download, which is not possible there.
"""

WITH_TORCH = {
    "filelock",
    "fsspec",
    "jinja2",
    "markupsafe",
    "mpmath",
    "networkx",
    "sympy",
    "triton",
    "typing-extensions",
}
"""Dependencies of torch, found wherever it is installed."""

OF_MAMBA = "einops>=0.7,<1"
"""What the Triton kernels of mamba-ssm need beside torch and triton."""

# pip matches a manylinux tag exactly, so each glibc that wheels are built for is named: up to 2.28, that of RHEL 8.
PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (28, 27, 26, 24, 17, 12, 5)] + ["manylinux2014_x86_64"]


def requirements(pyproject: Path) -> list[str]:
    """The core dependencies but torch, and the test tools."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    tools = [line for line in project["optional-dependencies"]["dev"] if _name(line) in TESTING]
    core = [line for line in project["dependencies"] if _name(line) not in PLACEHOLDERS.keys() | WITH_TORCH]
    return core + tools


def peers(pyproject: Path) -> list[str]:
    """transformers, mamba-ssm, and what that needs."""
    extras = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    return [*extras["hf"], OF_MAMBA, *(line for line in extras["mamba"] if _name(line) == "mamba-ssm")]


def _name(text: str) -> str:
    """The distribution at the start of a requirement or of a wheel's first field, spelled as pip compares names."""
    found = re.match(r"[\w.-]+", text)
    assert found, f"no name in {text!r}"
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def collect(folder: Path, wanted: list[str], python: str) -> None:
    """Fill `folder` with the wheels of `wanted` and of all they need. Raises CalledProcessError when pip fails."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        built, fetched = Path(scratch) / "built", Path(scratch) / "fetched"
        _pip("wheel", "--no-deps", "--wheel-dir", str(built), SOURCE_ONLY)
        pins = [_placeholder(built, name, version) for name, version in PLACEHOLDERS.items()]
        _pip("download", "--dest", str(fetched), "--find-links", str(built), *_target(python), *pins, *wanted)
        for old in folder.glob("*.whl"):
            old.unlink()
        for wheel in fetched.glob("*.whl"):
            if _name(wheel.name.split("-")[0]) not in PLACEHOLDERS.keys() | WITH_TORCH:
                (folder / wheel.name).write_bytes(wheel.read_bytes())


def collect_peers(folder: Path, core: Path, wanted: list[str], python: str) -> list[str]:
    """Fill `folder` with what there is of `wanted` and is not in `core`. Returns the requirements that pip could not meet."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in _files(folder):
        old.unlink()
    return [one for one in wanted if not _had(one, folder, core, python)]


def _had(wanted: str, folder: Path, core: Path, python: str) -> bool:
    with tempfile.TemporaryDirectory() as scratch:
        try:
            if _name(wanted) == "mamba-ssm":
                _source(wanted, Path(scratch))
            else:
                _wheels(wanted, Path(scratch), core, python)
        except subprocess.CalledProcessError:
            return False
        for file in _files(Path(scratch)):
            (folder / file.name).write_bytes(file.read_bytes())
    return True


def _wheels(wanted: str, scratch: Path, core: Path, python: str) -> None:
    """Such that they fit those of `core`, without what is there."""
    held = dict(wheel.name.split("-")[:2] for wheel in core.glob("*.whl"))
    (scratch / "held.txt").write_text("".join(f"{name}=={version}\n" for name, version in held.items()))
    constraint = f"--constraint={scratch / 'held.txt'}"
    _pip("download", "--dest", str(scratch), "--find-links", str(core), constraint, *_target(python), wanted)
    for wheel in scratch.glob("*.whl"):
        if wheel.name.split("-")[0] in held or _name(wheel.name.split("-")[0]) in WITH_TORCH:
            wheel.unlink()


def _source(wanted: str, scratch: Path) -> None:
    """Its wheels are compiled for one torch each; its Triton kernels are Python. Its set-up wants torch and setuptools here."""
    os.environ["MAMBA_SKIP_CUDA_BUILD"] = "TRUE"  # or it looks for a compiler to say what it is
    alone = ["--no-deps", "--no-build-isolation", f"--no-binary={_name(wanted)}"]
    _pip("download", "--dest", str(scratch), *alone, wanted)


def _target(python: str) -> list[str]:
    """Wheels for that Python on Linux x86-64."""
    platforms = [f"--platform={tag}" for tag in PLATFORMS]
    return ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}", *platforms]


def _pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments, "--quiet"], check=True)


def _placeholder(folder: Path, name: str, version: str) -> str:
    """Write a wheel with nothing in it; returns the requirement that only it can satisfy."""
    stem = f"{name.replace('-', '_')}-{version}"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{stem}.dist-info/RECORD", "")
    return f"{name}=={version}"


def _files(folder: Path) -> list[Path]:
    return [*folder.glob("*.whl"), *folder.glob("*.tar.gz")]


def sizes(folder: Path) -> dict[str, int]:
    """File name -> bytes of every wheel and source, the largest first."""
    files = sorted(_files(folder), key=lambda file: (-file.stat().st_size, file.name))
    return {file.name: file.stat().st_size for file in files}


def digest(wanted: list[str], python: str) -> str:
    """Changes with everything that decides what is collected: the requirements, the target and this file."""
    text = "\n".join([*wanted, python, Path(__file__).read_text(encoding="utf-8")])
    return hashlib.sha256(text.encode()).hexdigest()


def is_complete(folder: Path, expected: str) -> bool:
    """Whether `folder` holds just what an earlier run collected for the digest `expected`."""
    contents = folder / "contents.json"
    if not contents.is_file():
        return False
    try:
        found = json.loads(contents.read_text(encoding="utf-8"))
    except ValueError:  # a run that was stopped while it wrote
        return False
    return found == {"digest": expected, "wheels": sizes(folder)}


def remember(folder: Path, collected: str) -> None:
    """Let `is_complete` know."""
    contents = {"digest": collected, "wheels": sizes(folder)}
    (folder / "contents.json").write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")


def report(weights: dict[str, int]) -> list[str]:
    """A line a wheel, and the sum."""
    lines = [f"{size / 2**20:8.2f} MiB  {name}" for name, size in weights.items()]
    return [*lines, f"{sum(weights.values()) / 2**20:8.2f} MiB  {len(weights)} wheels, at most {LIMIT / 2**20:.0f} MiB"]


def main() -> int:
    parser = argparse.ArgumentParser("wheelhouse", description="Wheels for a GPU machine without internet.")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("wheelhouse"))
    parser.add_argument("--python", default="3.12", help="version that runs there (default 3.12)")
    parser.add_argument("--peers", action="store_true", help="also what ours is compared with, into FOLDER/peers")
    options = parser.parse_args()
    pyproject = Path(__file__).parents[1] / "pyproject.toml"
    status = get_core(options.folder, requirements(pyproject), options.python)
    if options.peers and status == 0:
        get_peers(options.folder, peers(pyproject), options.python)
    return status


def get_core(folder: Path, wanted: list[str], python: str) -> int:
    """What nemohybrid needs; returns an exit status."""
    expected = digest(wanted, python)
    if is_complete(folder, expected):
        print(f"{folder} is complete: nothing to download")
    else:
        try:
            collect(folder, wanted, python)
        except subprocess.CalledProcessError as error:
            print(f"wheelhouse: pip {error.cmd[4]} failed; what it says stands above", file=sys.stderr)
            return 1
        remember(folder, expected)
    weights = sizes(folder)
    print(*report(weights), sep="\n")
    if sum(weights.values()) > LIMIT:
        print(f"wheelhouse: over {LIMIT / 2**20:.0f} MiB; the largest stand first", file=sys.stderr)
        return 1
    return 0


def get_peers(core: Path, wanted: list[str], python: str) -> None:
    """What of them there is. Only what is whole is not tried again."""
    folder, expected = core / "peers", digest([*wanted, *sizes(core)], python)
    if is_complete(folder, expected):
        print(f"{folder} is complete: nothing to download")
    elif missing := collect_peers(folder, core, wanted, python):
        said = "what pip says stands above; to get mamba-ssm it must be that of a Python with torch and setuptools"
        print(f"wheelhouse: going on without {' and '.join(missing)}: {said}", file=sys.stderr)
        (folder / "contents.json").unlink(missing_ok=True)
    else:
        remember(folder, expected)
    weights = sizes(folder)
    print(f"{sum(weights.values()) / 2**20:8.2f} MiB  {len(weights)} files to compare with, in {folder}")


if __name__ == "__main__":
    sys.exit(main())
