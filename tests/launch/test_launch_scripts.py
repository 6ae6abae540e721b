"""The scripts that come with the project are what the command writes, and no shell finds fault with any."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "scripts" / "launch").iterdir())


@pytest.fixture
def corpus(empty_folder) -> None:
    """What looks like the corpus that the scripts name."""
    (empty_folder / "corpus").mkdir()
    for end in ("bin", "idx"):
        (empty_folder / "corpus" / f"train.{end}").touch()


@pytest.mark.parametrize("script", SHIPPED, ids=lambda file: file.name)
def test_a_shipped_script_is_what_the_command_in_it_writes(rendered, corpus, script):
    text = script.read_text()
    command = re.search(r"^# nemohybrid launch (.*)$", text, re.MULTILINE)
    assert command, f"{script} does not say how it was written"
    again = rendered(*shlex.split(command[1]))
    assert again == text, f"write it again: nemohybrid launch --dry-run {command[1]} > {script.relative_to(ROOT)}"


def test_there_is_one_for_every_way_to_start():
    assert {file.name for file in SHIPPED} == {
        "kubernetes.yaml",
        "slurm.sh",
        "slurm_container.sh",
        "torchrun.sh",
        "torchrun_nodes.sh",
    }


def shellcheck(*files: Path) -> str:
    """What it says of scripts; it follows what they source."""
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert program, "shellcheck is not installed: pip install 'nemohybrid[dev]' brings it"
    words = [program, "--external-sources", "--source-path=SCRIPTDIR", *map(str, files)]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout


def test_shellcheck_finds_nothing_in_the_scripts_of_the_project():
    scripts = sorted((ROOT / "scripts").rglob("*.sh"))
    assert len(scripts) > 5
    assert shellcheck(*scripts) == ""


ODD = ["run.dir=a b", "run.name=b", "checkpoint.every=${train.steps}", 'sample.prompts=["it\'s *"]']


@pytest.mark.parametrize(
    "words",
    [
        [
            "slurm",
            "--nodes",
            "2",
            "--setup",
            "my env.sh",
            "--logs",
            "my $logs",
            "--python",
            "/a b/python",
            "--share-nodes",
        ],
        [
            "slurm",
            "--container-image",
            "./a b.sqsh",
            "--mount",
            "/my data:/data",
            "--mount",
            "/c:/d:ro",
            "--sbatch=--qos=x",
        ],
        ["torchrun", "--setup", "my env.sh", "--python", "/a b/python"],
        ["torchrun", "--nodes", "2", "--rendezvous", "node-1.cluster:29400", "--max-restarts", "0"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_shellcheck_finds_nothing_in_what_is_rendered(rendered, small, words, empty_folder):
    script = empty_folder / "script.sh"
    (empty_folder / "my env.sh").touch()
    script.write_text(rendered(*words, "--gpus-per-node", "1", "--", *small, *ODD))
    assert shellcheck(script) == ""


def test_shellcheck_is_listening(empty_folder):
    (empty_folder / "script.sh").write_text("#!/bin/bash\necho $UNQUOTED\n")
    assert "SC2086" in shellcheck(empty_folder / "script.sh")


def test_the_table_of_variables_names_every_one_that_a_script_sets_or_mentions():
    page = (ROOT / "docs" / "launch.md").read_text().partition("## Variables")[2].partition("\n## ")[0]
    table = set(re.findall(r"`([A-Z_]{8,})`", page))
    texts = "".join(file.read_text() for file in SHIPPED)
    named = set(re.findall(r"export ([A-Z_]+)=", texts)) | set(re.findall(r"- \{name: ([A-Z_]+), value", texts))
    of_each_rank = {"RANK"}
    assert named - of_each_rank <= table, f"the table lacks {sorted(named - table)}"
    assert table <= set(re.findall(r"[A-Z_]{8,}", texts)), "the table names what no script does"
