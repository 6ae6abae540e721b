"""CONTRIBUTING.md, "Add a layer symbol", followed to the letter in a copy of the package.

What the page says of files, edits and tests is done to the copy; the checkout is not touched. One other process does all
that needs torch, since each start costs seconds, and reports as JSON.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SECTION = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Add a layer symbol\n")[2]
SECTION = SECTION.partition("\n## ")[0]
BLOCK = re.compile(r"```(python|diff)\n(.*?)```", re.DOTALL)
FILE = re.compile(r"`((?:src|tests)/[\w/]+\.py)`:\n")
MIXER, TEST = "src/nemohybrid/model/token_shift.py", "tests/model/test_token_shift.py"

FAULTS = {
    "documents leak": (
        ".masked_fill(begins.unsqueeze(-1), 0.0)",
        "",
        "test_packed_documents_equal_separate_rows",
    ),
    "nothing remembered": (
        "cache[self] = x_BLD[:, -1:]",
        "cache[self] = last",
        "test_cached_decoding_equals_the_full_forward",
    ),
    "parameter without effect": (
        "self._previous(x_BLD, seq)",
        "x_BLD",
        "test_every_parameter_has_a_gradient",
    ),
}
"""Name -> a part of the page's mixer, what takes its place, and the test of the page that must find it."""

DRIVER = """
import importlib.util, json, sys
from pathlib import Path
import pytest, torch
import nemohybrid.model
from nemohybrid.config.compose import load_model_config
from nemohybrid.model import HybridModel
from nemohybrid.config.accounting import total_cost
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.parallel.gradients import gradient_norm
from nemohybrid.train.batch import Batch
from nemohybrid.train.optimizer import build_optimizer
from nemohybrid.train.step import compute_gradients, update

def train():
    overrides = ["model=tiny", "model.hidden_size=64", 'model.pattern="CM-C*-"', "optim.lr=3e-3"]
    config = load_model_config(overrides)
    model = HybridModel.create(config.model, seed=0)
    optimizer = build_optimizer(model.parameters(), config.optim)
    new = {n: p for n, p in model.named_parameters() if n.startswith(("layers.0.mixer", "layers.3.mixer"))}
    tokens = torch.randint(257, (4, 17), generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(4, 16), None)
    losses, smallest = [], {name: float("inf") for name in new}
    for _ in range(3):
        losses.append(compute_gradients(model, batch, 2, ParallelContext.single()).item())
        for name, p in new.items():
            smallest[name] = min(smallest[name], p.grad.abs().max().item() if p.grad is not None else 0.0)
        update(model.parameters(), optimizer, 1.0, gradient_norm(model.parameters()))
    built = sum(p.numel() for p in model.parameters())
    return dict(losses=losses, gradients=smallest, built=built, counted=total_cost(config.model, 16).parameters)

class Outcomes:
    def pytest_runtest_logreport(self, report):
        if report.when == "call":
            self.seen[report.nodeid.split("::")[1]] = report.outcome

def page_tests():
    plugin = Outcomes()
    plugin.seen = {}
    pytest.main(["-q", "-p", "no:cacheprovider", sys.argv[1]], plugins=[plugin])
    return plugin.seen

def with_mixer(path):
    spec = importlib.util.spec_from_file_location(path.stem.replace(" ", "_"), path)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))  # registers its class in place of the page's
    return page_tests()

report = {"package": nemohybrid.model.__file__, "train": train(), "sound": page_tests()}
report["faults"] = {path.stem: with_mixer(path) for path in Path("faults").iterdir()}
Path("report.json").write_text(json.dumps(report))
"""


def page_blocks() -> list[tuple[str, str, str]]:
    """(file, kind, content) of every code block of the section, in order; a block belongs to the file named last."""
    files = [(match.end(), match[1]) for match in FILE.finditer(SECTION)]
    blocks = []
    for match in BLOCK.finditer(SECTION):
        named = [file for end, file in files if end <= match.start()]
        assert named, f"no file is named before\n{match[2]}"
        blocks.append((named[-1], match[1], match[2]))
    return blocks


def apply_diff(path: Path, diff: str) -> None:
    """Replace the lines of a block that begin with "-" by those that begin with "+"; they must be there once."""
    lines = diff.splitlines(keepends=True)
    old = "".join(line[1:] for line in lines if line.startswith("-"))
    new = "".join(line[1:] for line in lines if line.startswith("+"))
    content = path.read_text(encoding="utf-8")
    assert content.count(old) == 1, f"the page edits a line that is not in {path.name} just once:\n{old}"
    path.write_text(content.replace(old, new), encoding="utf-8")


def follow_the_page(house: Path) -> None:
    """Copy what can be installed to `house`, and do there what the page says."""
    no_caches = shutil.ignore_patterns("__pycache__", "bundled")
    shutil.copytree(ROOT / "src" / "nemohybrid", house / "src" / "nemohybrid", ignore=no_caches)
    shutil.copytree(ROOT / "configs", house / "configs", ignore=no_caches)
    for file, kind, content in page_blocks():
        path = house / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "diff":
            apply_diff(path, content)
        else:
            path.write_text(content, encoding="utf-8")


def plant_faults(house: Path) -> None:
    """One faulty mixer a file, in `faults/`."""
    (house / "faults").mkdir()
    sound = (house / MIXER).read_text(encoding="utf-8")
    for name, (part, fault, _) in FAULTS.items():
        assert sound.count(part) == 1, f"{part!r} is not on the page just once"
        (house / "faults" / f"{name}.py").write_text(sound.replace(part, fault), encoding="utf-8")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What the driver found in a house that the page was applied to."""
    house = tmp_path_factory.mktemp("house")
    follow_the_page(house)
    plant_faults(house)
    environment = {**os.environ, "PYTHONPATH": str(house / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DRIVER, TEST]
    done = subprocess.run(command, cwd=house, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, f"following the page ended in an error\n{done.stdout}\n{done.stderr}"
    content = json.loads((house / "report.json").read_text())
    assert content["package"].startswith(str(house)), f"{content['package']} is not the copy"
    return content


def test_the_page_names_every_file_it_needs() -> None:
    kinds = {file: kind for file, kind, _ in page_blocks()}
    assert kinds.get(MIXER) == kinds.get(TEST) == "python", f"the page writes {kinds}"
    assert len(kinds) == 5, f"expected a mixer, a test and three edited files, found {sorted(kinds)}"


def test_the_new_layer_learns_in_every_parameter(report: dict) -> None:
    gradients, losses = report["train"]["gradients"], report["train"]["losses"]
    assert len(gradients) == 6, f"expected three parameters in each of two layers, found {sorted(gradients)}"
    for name, smallest in gradients.items():
        assert smallest > 0, f"{name}: no gradient in one of three steps"
    assert losses[2] < losses[0], f"three steps on the same batch did not lower its loss: {losses}"


def test_the_cost_on_the_page_counts_the_parameters_that_are_built(report: dict) -> None:
    counted, built = report["train"]["counted"], report["train"]["built"]
    assert counted == built, f"accounting counts {counted} parameters, the model has {built}"


def test_the_tests_on_the_page_pass(report: dict) -> None:
    expected = dict.fromkeys((test for _, _, test in FAULTS.values()), "passed")
    assert report["sound"] == expected, f"the tests of the page ended as {report['sound']}"


@pytest.mark.parametrize("name", FAULTS)
def test_the_tests_on_the_page_find_a_planted_fault(report: dict, name: str) -> None:
    part, fault, red = FAULTS[name]
    outcome = report["faults"][name].get(red)
    assert outcome == "failed", f"{red} {outcome} although {fault!r} stood in place of {part!r}"
