"""`import-hf`, `export-hf`, and runs that start from weights of others."""

import json
import shutil
import string

import pytest
import torch
from safetensors.torch import load_file

from nemohybrid.__main__ import main
from nemohybrid.checkpoint import read_metadata, read_state
from nemohybrid.cli.export_hf import size
from nemohybrid.cli.initial_model import with_initial_model
from nemohybrid.config.compose import load_model_config
from nemohybrid.config.run_config import RunConfig
from nemohybrid.config.yaml import read_config_yaml
from nemohybrid.data.prepare import prepare
from nemohybrid.data.tokenizer import ByteTokenizer, train_bpe
from nemohybrid.errors import CheckpointError
from nemohybrid.generate.load import load_for_inference
from nemohybrid.interop.hf import load_hf, save_hf
from nemohybrid.parallel.layout import logical_parameters
from nemohybrid.symbols import parse_pattern
from nemohybrid.train.initial import load_initial_weights

RUN = [
    "data.sequence_length=16",
    "train.global_batch=2",
    "train.steps=2",
    "optim.lr=1e-3",
    "run.device=cpu",
    "logging.picture=false",
    "logging.console=quiet",
]
TINY = [
    "model=tiny_latent_mtp",
    "model.hidden_size=32",
    "model.moe_latent_size=16",
    "model.dtype=float32",
    'model.pattern="M|E*/*E/*E"',
]


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    """Overrides of two steps on a few bytes of text."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text.txt").write_text("To be, or not to be, that is the question.\n" * 20)
    prepare([folder / "text.txt"], folder / "corpus", ByteTokenizer())
    return [*RUN, f"data.train={folder}/corpus", f"data.cache={folder}/cache"]


@pytest.fixture(scope="module")
def trained(words, tmp_path_factory):
    """A run folder after two steps."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    assert main(["train", *words, *TINY, f"run.dir={folder}"]) == 0
    return folder


@pytest.fixture(scope="module")
def travelled(trained, tmp_path_factory):
    """(what was exported, a run folder imported from it)."""
    root = tmp_path_factory.mktemp("travelled")
    export = ["export-hf", "--checkpoint", str(trained), "--output", str(root / "hf")]
    assert main([*export, "--max-shard-size", "0.1MB"]) == 0
    assert main(["import-hf", "--input", str(root / "hf"), "--output", str(root / "run")]) == 0
    return root / "hf", root / "run"


def weights_of(run):
    model, _ = load_for_inference(run, "cpu")
    return logical_parameters(model) | dict(model.named_buffers())


def test_a_checkpoint_comes_back_through_a_folder_with_every_bit(trained, travelled):
    folder, run = travelled
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    before, after = weights_of(trained), weights_of(run)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), f"{name} changed on its way"


def test_the_streamed_export_is_the_export_of_the_model(trained, travelled, tmp_path):
    model, tokenizer = load_for_inference(trained, "cpu")
    whole = load_file(save_hf(model, tmp_path / "hf", tokenizer=tokenizer) / "model.safetensors")
    shards = [load_file(file) for file in travelled[0].glob("model-*.safetensors")]
    streamed = {name: tensor for shard in shards for name, tensor in shard.items()}
    assert streamed.keys() == whole.keys()
    assert all(torch.equal(streamed[name], tensor) for name, tensor in whole.items())
    ours, theirs = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "hf", travelled[0]))
    assert theirs.pop("max_position_embeddings") == 16
    ours.pop("max_position_embeddings")
    assert ours == theirs


def test_an_import_generates_what_the_checkpoint_generates(trained, travelled, capsys):
    texts, options = [], ["--greedy", "--max-new-tokens", "8", "--dtype", "float32"]
    for run in (trained, travelled[1]):
        assert main(["generate", "--checkpoint", str(run), "--prompt", "To be", *options]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_an_import_is_a_checkpoint_of_step_0_without_optimizer(travelled):
    (checkpoint,) = (travelled[1] / "checkpoints").iterdir()
    assert read_state(checkpoint)["step"] == 0
    assert {name.partition(".")[0] for name in read_metadata(checkpoint)} == {"model"}
    assert read_config_yaml(checkpoint / "config.yaml").model.pattern == "M|E*/*E/*E"


def test_a_run_starts_from_imported_weights_with_a_fresh_optimizer_at_step_0(travelled, words, tmp_path, capsys):
    """The settings of the weights come along. A learning rate of 0 leaves the weights as they were read."""
    still = [f"init_from={travelled[1]}", "optim.lr=0", "model.router.bias_update_rate=0", "model.dtype=float32"]
    assert main(["train", *words, *still, f"run.dir={tmp_path}/run"]) == 0
    assert "starting from the weights of" in capsys.readouterr().out
    before, after = weights_of(travelled[1]), weights_of(tmp_path / "run")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items()), "other weights than those read"
    config = read_config_yaml(tmp_path / "run" / "config.yaml")
    assert config.model.pattern == "M|E*/*E/*E"
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2]


def composed(run, *words):
    return load_model_config(with_initial_model([f"init_from={run}", *words])).model


def test_a_recipe_decides_how_weights_are_trained_and_the_weights_what_the_model_is(travelled):
    """A repeated MTP block may be run at more depths; sizes must be those of the weights."""
    plain = load_model_config(["experiment=tiny_nemotron3_ultra"]).model
    (checkpoint,) = (travelled[1] / "checkpoints").iterdir()
    layers = parse_pattern(plain.pattern)
    one_depth = f"{layers.main}/{layers.mtp}"
    config = (checkpoint / "config.yaml").read_text()
    changed = config.replace("pattern: M|E*/*E/*E", f"pattern: {one_depth}").replace(
        "loss_weight: 0.3", "loss_weight: 0.7"
    )
    assert changed.count(one_depth) == 1
    folder = checkpoint.parent.parent / "one_depth"
    folder.mkdir()
    (folder / "config.yaml").write_text(changed)
    model = composed(folder, "experiment=tiny_nemotron3_ultra")
    assert model.pattern == plain.pattern != one_depth
    assert (model.mtp.loss_weight, model.dtype) == (plain.mtp.loss_weight, plain.dtype)
    assert (model.router.aux_loss_weight, model.init_std) == (plain.router.aux_loss_weight, plain.init_std)
    assert model.hidden_size == 32 != plain.hidden_size
    assert composed(folder).pattern == one_depth
    assert composed(travelled[1], "experiment=tiny_nemotron3_ultra").pattern == "M|E*/*E/*E", "layers without weights"


def test_weights_are_trained_in_bfloat16_unless_the_user_says_otherwise(travelled):
    (checkpoint,) = (travelled[1] / "checkpoints").iterdir()
    assert read_config_yaml(checkpoint / "config.yaml").model.dtype == "bfloat16"
    assert composed(travelled[1]).dtype == "bfloat16"
    assert composed(travelled[1], "model.dtype=float32").dtype == "float32"


def test_weights_named_themselves_are_hashed_before_use(travelled, words, tmp_path, capsys):
    (checkpoint,) = (travelled[1] / "checkpoints").iterdir()
    copy = shutil.copytree(checkpoint, tmp_path / "step_00000000")
    (file,) = copy.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert main(["train", *words, f"init_from={copy}", f"run.dir={tmp_path}/run"]) == 1
    assert "is damaged: its sha256 is" in capsys.readouterr().err


def test_a_run_that_started_from_weights_resumes_from_its_own(travelled, words, tmp_path, capsys):
    command = ["train", *words, f"init_from={travelled[1]}", f"run.dir={tmp_path}/run"]
    assert main([*command, "train.stop_at=1"]) == 0
    capsys.readouterr()
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "resuming from" in out
    assert "starting from" not in out


def test_another_model_is_refused_with_what_differs(travelled, words, tmp_path, capsys):
    other = ["model.moe_top_k=1", "model.router.normalize=false", f"run.dir={tmp_path}/run"]
    assert main(["train", *words, f"init_from={travelled[1]}", *other]) == 1
    err = capsys.readouterr().err
    assert "belong to another model:\n  model.moe_top_k: 6 -> 1\n  model.router.normalize: True -> False" in err


def test_another_tokenizer_is_refused(travelled):
    model, _ = load_for_inference(travelled[1], "cpu")
    config = RunConfig(init_from=str(travelled[1]), model=model.config)
    with pytest.raises(
        CheckpointError, match=r"another tokenizer \(257 ids, here 300\); every id would mean another text"
    ):
        load_initial_weights(config, model, train_bpe(["to be or not to be " * 50 + string.printable] * 9, 300))


def test_weights_alone_are_not_resumed_and_the_way_is_named(travelled, words, capsys):
    assert main(["train", *words, f"init_from={travelled[1]}", f"run.dir={travelled[1]}"]) == 1
    assert "has weights and no optimizer state, so it cannot be resumed. Start a new run from it: init_from=" in (
        capsys.readouterr().err
    )


def test_a_folder_that_is_not_there_is_named(words, capsys, tmp_path):
    assert main(["train", *words, f"init_from={tmp_path}/absent"]) == 1
    assert "no such folder; give a checkpoint or a run folder" in capsys.readouterr().err


def test_a_run_goes_on_when_the_weights_it_began_with_are_gone(travelled, words, capsys, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(travelled[1], source)
    command = ["train", *words, f"init_from={source}", "checkpoint.every=1", f"run.dir={tmp_path}/run"]
    assert main([*command, "train.stop_at=1"]) == 0
    shutil.rmtree(source)
    assert main(command) == 0
    assert "resuming from" in capsys.readouterr().out


def test_values_that_hydra_would_look_up_are_refused(travelled, words, tmp_path, capsys):
    """A configuration of somebody else must not read our environment."""
    (checkpoint,) = (travelled[1] / "checkpoints").iterdir()
    config = (checkpoint / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(config.replace("name: tiny_latent_mtp", "name: ${oc.env:HOME}"))
    assert main(["train", *words, f"init_from={tmp_path}"]) == 1
    assert "'$' has a meaning of its own" in capsys.readouterr().err


def test_an_import_overwrites_nothing(travelled, capsys):
    assert main(["import-hf", "--input", str(travelled[0]), "--output", str(travelled[1])]) == 1
    assert "is there already; nothing is overwritten. Give another output" in capsys.readouterr().err


def test_an_import_takes_the_tokenizer_over(tiny_model, tmp_path, capsys):
    tokenizer = train_bpe(["to be or not to be"] * 9, 300)
    folder = save_hf(tiny_model("M-", vocab_size=300), tmp_path / "hf", tokenizer=tokenizer)
    assert main(["import-hf", "--input", str(folder), "--output", str(tmp_path / "run")]) == 0
    assert load_for_inference(tmp_path / "run", "cpu")[1].description == tokenizer.description
    assert f"({tokenizer.vocab_size} ids)" in capsys.readouterr().out


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tiny_model, tmp_path, capsys):
    folder = save_hf(tiny_model("M-", vocab_size=61), tmp_path / "hf", tokenizer=ByteTokenizer())
    assert main(["import-hf", "--input", str(folder), "--output", str(tmp_path / "run")]) == 1
    assert "has 257 ids, the model 61" in capsys.readouterr().err


def test_weights_without_a_tokenizer_are_imported_and_told(untouched_folder, tmp_path, capsys):
    assert (
        main(["import-hf", "--input", str(untouched_folder("mtp")), "--output", str(tmp_path), "--mtp-depth", "2"]) == 0
    )
    assert "no tokenizer: it can be trained on, but cannot generate" in capsys.readouterr().out
    checkpoint = tmp_path / "checkpoints" / "step_00000000"
    assert read_config_yaml(checkpoint / "config.yaml").model.pattern == "ME*E/*E/*E"
    assert main(["export-hf", "--checkpoint", str(tmp_path), "--output", str(tmp_path / "hf")]) == 0
    assert load_hf(tmp_path / "hf").config.pattern == "ME*E/*E/*E"


def test_ids_of_special_tokens_survive_without_a_tokenizer(changed_folder, tmp_path):
    ids = {"bos_token_id": 1, "eos_token_id": [2, 11], "pad_token_id": 0}
    folder = changed_folder("dense", ids)
    assert main(["import-hf", "--input", str(folder), "--output", str(tmp_path / "run")]) == 0
    assert main(["export-hf", "--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "hf")]) == 0
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert {name: config[name] for name in ids} == ids


@pytest.mark.parametrize("value", ["2", True, -1, [2, "3"], {}])
def test_an_id_that_is_none_is_refused(value, changed_folder, tmp_path, capsys):
    folder = changed_folder("dense", {"eos_token_id": value})
    assert main(["import-hf", "--input", str(folder), "--output", str(tmp_path / "run")]) == 1
    assert "is no id of a token" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "number"), [("5GB", 5 * 10**9), ("20KB", 20_000), ("0.5mb", 500_000), ("2 GiB", 2**31), ("7", 7)]
)
def test_sizes_of_shards_are_read(text, number):
    assert size(text) == number
