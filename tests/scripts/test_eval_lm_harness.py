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
from nemohybrid.errors import ConfigError, DataError

SCRIPT = Path(__file__).parents[2] / "scripts" / "eval_lm_harness.sh"
TEXT = plays()[-1].text
DOCUMENTS = [TEXT[:1], TEXT[10:40], TEXT[100:165], TEXT[200:700], "é😀 naïve\n\n", TEXT[900:3000]]


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, timeout=280
    )


@pytest.fixture(scope="module")
def script():
    """The Python side as a module."""
    spec = importlib.util.spec_from_file_location("eval_lm_harness", SCRIPT.with_suffix(".py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_lines_of_a_jsonl_file_end_at_newlines_alone(script, tmp_path):
    """U+2028 and the like stand in JSON texts as they are; a blank line holds no document."""
    texts = ["a\u2028b\u0085c", "second"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "a.jsonl").write_text("\n".join([lines[0], "", lines[1], "", ""]), encoding="utf-8")
    assert list(script.texts_of_files([tmp_path / "a.jsonl"])) == texts


@pytest.mark.parametrize("line", ['{"text": null}', '{"text": 3}', '{"other": "a"}', "[]", "{"])
def test_what_is_no_text_is_refused_by_its_line(line, script, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + line + "\n")
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: .*text"):
        list(script.texts_of_files([tmp_path / "a.jsonl"]))


def test_without_the_harness_nothing_is_written(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'nemohybrid\[eval\]'"):
        script.main([str(tmp_path / "run"), "--output", str(tmp_path / "out")])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval: pip install 'nemohybrid[eval]'")
@pytest.mark.parametrize("tokenizer", ["byte", "bpe:300"])
def test_the_harness_agrees_with_what_the_run_wrote(tokenizer, tmp_path):
    """To 1e-6 bits per byte. Found: 1e-8, the last place of fp32 sums."""
    source = tmp_path / "text.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    prepare([source], tmp_path / "corpus", make_tokenizer(tokenizer, lambda: DOCUMENTS))
    command = ["train", "model=tiny_latent_mtp", "model.hidden_size=32", "model.moe_latent_size=16"]
    command += ["model.dtype=float32", "run.device=cpu"]
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
