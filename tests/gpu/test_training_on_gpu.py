"""Whole runs on a GPU: what they learn, what they save, how they go on, and how they fail."""

import gc
from pathlib import Path

import pytest
import torch

from nemohybrid.__main__ import main
from nemohybrid.generate.engine import generate_tokens
from nemohybrid.generate.load import load_for_inference
from nemohybrid.generate.sampling import Sampling
from nemohybrid.generate.speculative import SpeculativeDecoder
from nemohybrid.observe.metrics import read_metrics
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.parallel.layout import logical_parameters
from nemohybrid.parallel.world import choose_device
from nemohybrid.train.run import run
from nemohybrid.train.state import run_tensors
from nemohybrid.train.trainer import Trainer


@pytest.fixture
def train(configure):
    """`train("cuda", "train.steps=3") -> Trainer`, after the run has come to its end."""
    return lambda device, *overrides: run(
        configure(device, *overrides), ParallelContext.single(choose_device(device, local_rank=0))
    )


def losses(folder: str | Path) -> list[float]:
    return [record["loss"] for record in read_metrics(Path(folder) / "metrics.jsonl")]


def on_cpu(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu() for name, tensor in run_tensors(trainer.model, trainer.optimizer).items()}


@pytest.mark.parametrize("model", ["quickstart", "tiny_latent_mtp"])
def test_five_steps_in_fp32_learn_what_they_learn_on_the_cpu(device, model, train, tmp_path):
    five = [f"model={model}", "model.dtype=float32", "train.steps=5"]
    train("cpu", *five, f"run.dir={tmp_path}/cpu")
    train(device, *five, f"run.dir={tmp_path}/there")
    expected = losses(tmp_path / "cpu")
    assert expected[-1] < expected[0] - 0.05, "nothing is learnt, so nothing is compared"
    assert losses(tmp_path / "there") == pytest.approx(expected, rel=1e-3)


def test_a_run_that_resumes_is_bitwise_the_run_that_never_stopped(device, train, tmp_path):
    """Sequences of several key blocks: where a backward pass adds in the order in which blocks end, it shows here."""
    length = 512 if device == "cuda" else 64
    six = ["train.steps=6", f"data.sequence_length={length}", "train.microbatch=2"]
    straight = train(device, *six, f"run.dir={tmp_path}/straight")
    train(device, *six, "train.stop_at=3")
    resumed = train(device, *six)
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    found, expected = on_cpu(resumed), on_cpu(straight)
    different = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    assert not different, f"these tensors differ: {different}"


def test_a_checkpoint_holds_the_weights_exactly_and_loads_on_the_cpu(device, train, tmp_path):
    trained = logical_parameters(train(device, "train.steps=2").model)
    loaded, _ = load_for_inference(tmp_path / "run", "cpu")
    for name, value in logical_parameters(loaded).items():
        assert torch.equal(value, trained[name].cpu()), name


@pytest.mark.parametrize("there_first", [True, False], ids=["there_then_cpu", "cpu_then_there"])
def test_a_run_moves_between_devices(device, there_first, train, tmp_path, capfd):
    four = ["train.steps=4", "model.dtype=float32"]
    train("cpu", *four, f"run.dir={tmp_path}/cpu")
    first, second = (device, "cpu") if there_first else ("cpu", device)
    train(first, *four, "train.stop_at=2")
    train(second, *four)
    assert "step 2 of 4" in capfd.readouterr().out
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-3)


@pytest.mark.parametrize("model", ["quickstart", "tiny_moe"])
def test_greedy_text_is_that_of_the_cpu(device, model, train, tmp_path):
    train(device, f"model={model}", "train.steps=3", "model.dtype=float32")
    prompts = [list(b"BRUTUS."), list(b"To be"), list(b"x")]

    def written(where: str) -> list[list[int]]:
        loaded, _ = load_for_inference(tmp_path / "run", choose_device(where, local_rank=0))
        return generate_tokens(loaded, prompts, 40, Sampling(temperature=0))

    assert written(device) == written("cpu")


def test_drafts_change_no_token(device, train, tmp_path):
    train(device, "model=tiny_latent_mtp", "train.steps=3", "model.dtype=float32")
    model, _ = load_for_inference(tmp_path / "run", choose_device(device, local_rank=0))
    greedy = Sampling(temperature=0)
    [plain] = generate_tokens(model, [list(b"BRUTUS.")], 40, greedy)
    assert list(SpeculativeDecoder(model, greedy, drafts=3).stream(list(b"BRUTUS."), 40)) == plain


def test_a_model_that_does_not_fit_is_refused_with_an_estimate(device, tmp_path, capsys):
    command = ["model=tiny", "model.hidden_size=65536", "data=shakespeare", f"run.device={device}"]
    assert main(["train", *command, f"run.dir={tmp_path}/run"]) == 1
    message = capsys.readouterr().err
    assert "GiB" in message, message


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_batch_that_does_not_fit_ends_with_an_estimate(tmp_path, capsys):
    """Half a million tokens in 32 MLPs: 352 GiB of activations by the estimate, and a GiB of weights."""
    model = [f'model.pattern="{"-" * 32}"', "model.hidden_size=1024"]
    huge = ["experiment=quickstart", *model, "data.sequence_length=4096", "train.global_batch=128"]
    status = main(["train", *huge, "train.evaluate_every=0", f"run.dir={tmp_path}/run", "run.device=cuda"])
    gc.collect()
    torch.cuda.empty_cache()
    message = capsys.readouterr().err
    assert status == 1, message
    assert "out of memory" in message, message
    assert "GiB" in message, message
    assert "microbatch" in message, message
