"""Collects the dependencies of nemohybrid as wheels for Linux x86-64, without torch and what comes with it.

    python scripts/wheelhouse.py [FOLDER] [--python 3.12]

The versions are those of pyproject.toml. FOLDER/contents.json says what was collected for which requirements: as long
as both are unchanged, another run only checks the sizes. Exits 1 when pip fails or the wheels weigh over 60 MiB.
"""

import argparse
import hashlib
import json
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

# pip matches a manylinux tag exactly, so each glibc that wheels are built for is named: up to 2.28, that of RHEL 8.
PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (28, 27, 26, 24, 17, 12, 5)] + ["manylinux2014_x86_64"]


def requirements(pyproject: Path) -> list[str]:
    """The core dependencies but torch, and the test tools."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    tools = [line for line in project["optional-dependencies"]["dev"] if _name(line) in TESTING]
    core = [line for line in project["dependencies"] if _name(line) not in PLACEHOLDERS.keys() | WITH_TORCH]
    return core + tools


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
        target = ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}"]
        target += [f"--platform={tag}" for tag in PLATFORMS]
        _pip("download", "--dest", str(fetched), "--find-links", str(built), *target, *pins, *wanted)
        for old in folder.glob("*.whl"):
            old.unlink()
        for wheel in fetched.glob("*.whl"):
            if _name(wheel.name.split("-")[0]) not in PLACEHOLDERS.keys() | WITH_TORCH:
                (folder / wheel.name).write_bytes(wheel.read_bytes())


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


def sizes(folder: Path) -> dict[str, int]:
    """File name -> bytes of every wheel, the largest first."""
    wheels = sorted(folder.glob("*.whl"), key=lambda wheel: (-wheel.stat().st_size, wheel.name))
    return {wheel.name: wheel.stat().st_size for wheel in wheels}


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


def report(weights: dict[str, int]) -> list[str]:
    """A line a wheel, and the sum."""
    lines = [f"{size / 2**20:8.2f} MiB  {name}" for name, size in weights.items()]
    return [*lines, f"{sum(weights.values()) / 2**20:8.2f} MiB  {len(weights)} wheels, at most {LIMIT / 2**20:.0f} MiB"]


def main() -> int:
    parser = argparse.ArgumentParser("wheelhouse", description="Wheels for a GPU machine without internet.")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("wheelhouse"))
    parser.add_argument("--python", default="3.12", help="version that runs there (default 3.12)")
    options = parser.parse_args()
    wanted = requirements(Path(__file__).parents[1] / "pyproject.toml")
    expected = digest(wanted, options.python)
    if is_complete(options.folder, expected):
        print(f"{options.folder} is complete: nothing to download")
    else:
        try:
            collect(options.folder, wanted, options.python)
        except subprocess.CalledProcessError as error:
            print(f"wheelhouse: pip {error.cmd[4]} failed; what it says stands above", file=sys.stderr)
            return 1
        contents = {"digest": expected, "wheels": sizes(options.folder)}
        (options.folder / "contents.json").write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
    weights = sizes(options.folder)
    print(*report(weights), sep="\n")
    if sum(weights.values()) > LIMIT:
        print(f"wheelhouse: over {LIMIT / 2**20:.0f} MiB; the largest stand first", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
