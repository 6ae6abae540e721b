"""scripts/eval_lm_harness.sh: lm-evaluation-harness gives the bits per byte that the run wrote. Needs the extra `eval`."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemohybrid.__main__ import main
from nemohybrid.data.bundled import plays
from nemohybrid.data.prepare import prepare
from nemohybrid.data.tokenizer import make_tokenizer

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "scripts" / "eval_lm_harness.sh"
TEXT = plays()[-1].text
DOCUMENTS = [TEXT[:1], TEXT[10:40], TEXT[100:165], TEXT[200:700], "é😀 naïve\n\n", TEXT[900:3000]]


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, timeout=280
    )


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval: pip install 'nemohybrid[eval]'")
@pytest.mark.parametrize("tokenizer", ["byte", "bpe:300"])
def test_the_harness_agrees_with_what_the_run_wrote(tokenizer, tmp_path):
    """To 1e-6 bits per byte. Found: 1e-8, the last place of fp32 sums."""
    source = tmp_path / "text.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    prepare([source], tmp_path / "corpus", make_tokenizer(tokenizer, lambda: DOCUMENTS))
    command = ["train", "model=tiny_latent_mtp", "model.hidden_size=32", "model.dtype=float32", "run.device=cpu"]
    command += [f"data.train={tmp_path}/corpus", f"data.valid={tmp_path}/corpus", "data.sequence_length=64"]
    command += ["train.global_batch=2", "train.steps=3", "train.evaluate_every=3", "optim.lr=1e-2"]
    command += ["data.valid_windows=documents", "logging.picture=false", f"run.dir={tmp_path}/run"]
    assert main(command) == 0
    *_, last = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    done = run_script(str(tmp_path / "run"), "--output", str(tmp_path / "out"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert abs(results["lm_eval"] - json.loads(last)["val_bits_per_byte"]) < 1e-6
    assert abs(results["nemohybrid"] - json.loads(last)["val_bits_per_byte"]) < 1e-6
    assert results["documents"] == len(DOCUMENTS)
