"""From prompts to text, and from a checkpoint to a model that writes it."""

import pytest
import torch

from nemohybrid.__main__ import main
from nemohybrid.data.tokenizer import ByteTokenizer, StreamingDecoder
from nemohybrid.errors import CheckpointError, DataError
from nemohybrid.generate.engine import encode_prompt, generate_text, generate_tokens, stream_tokens
from nemohybrid.generate.load import load_for_inference
from nemohybrid.generate.sampling import Sampling

WARM, GREEDY = Sampling(temperature=1.0), Sampling(temperature=0)
TOKENIZER = ByteTokenizer()


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("M*-", vocab_size=257).requires_grad_(False)


def test_a_seed_gives_the_same_tokens_again_and_another_seed_others(model):
    first, again, other = (generate_tokens(model, [[65], [66, 67]], 20, WARM, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert [len(row) for row in first] == [20, 20]


def test_global_random_state_is_neither_used_nor_changed(model):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = generate_tokens(model, [[65]], 10, WARM)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    assert generate_tokens(model, [[65]], 10, WARM) == first


def test_a_row_ends_before_eod_and_the_others_go_on(model):
    free = generate_tokens(model, [[65], [66, 67]], 30, WARM)
    eod = free[0][3]
    cut = [row[: row.index(eod)] if eod in row else row for row in free]
    assert generate_tokens(model, [[65], [66, 67]], 30, WARM, eod=eod) == cut
    assert len(cut[0]) == 3


def test_decoding_stops_when_every_row_has_ended(model):
    calls = []
    hook = model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    first = generate_tokens(model, [[65]], 1, GREEDY)[0][0]
    calls.clear()
    assert generate_tokens(model, [[65]], 500, GREEDY, eod=first) == [[]]
    hook.remove()
    assert len(calls) <= 2


def test_no_new_tokens_means_none(model):
    assert generate_tokens(model, [[65]], 0, GREEDY) == [[]]
    assert len(generate_tokens(model, [[65]], 1, GREEDY)[0]) == 1


@pytest.mark.parametrize("prompts", [[], [[]], [[65], []]], ids=str)
def test_a_prompt_without_tokens_is_refused(prompts, model):
    with pytest.raises(DataError, match="at least one token"):
        next(stream_tokens(model, prompts, 3, GREEDY))


def test_an_empty_prompt_begins_a_new_document(model):
    assert encode_prompt(TOKENIZER, "") == [TOKENIZER.eod]
    assert encode_prompt(TOKENIZER, "é") == [0xC3, 0xA9]
    rows = generate_tokens(model, [[TOKENIZER.eod]], 8, GREEDY, TOKENIZER.eod)
    assert generate_text(model, TOKENIZER, [""], 8, GREEDY) == [TOKENIZER.decode(rows[0])]


def test_each_text_begins_with_its_prompt(model):
    texts = generate_text(model, TOKENIZER, ["Romeo", "Jülich", ""], 6, WARM)
    assert [text[:6] for text in texts[:2]] == [f"Romeo{texts[0][5]}", "Jülich"]
    assert texts == generate_text(model, TOKENIZER, ["Romeo", "Jülich", ""], 6, WARM)


def test_streaming_prints_whole_characters_only():
    text = "aé€😀."
    decoder = StreamingDecoder(TOKENIZER)
    pushed = [decoder.push(byte) for byte in text.encode()]
    assert [piece for piece in pushed if piece] == list(text)
    assert decoder.finish() == ""


@pytest.fixture(scope="module")
def run_folder(model, save_run, tmp_path_factory):
    return save_run(model, tmp_path_factory.mktemp("run"))


def test_a_run_folder_or_checkpoint_gives_the_model_back(model, run_folder, token_rows):
    for path in (run_folder, run_folder / "checkpoints", run_folder / "checkpoints" / "step_00000003"):
        loaded, tokenizer = load_for_inference(path, "cpu")
        assert torch.equal(loaded(token_rows(1, 9)), model(token_rows(1, 9)))
        assert not loaded.training
        assert not any(p.requires_grad for p in loaded.parameters())
        assert tokenizer.description == TOKENIZER.description


def test_another_compute_dtype_can_be_asked_for(run_folder, token_rows):
    loaded, _ = load_for_inference(run_folder, "cpu", dtype="bfloat16")
    assert loaded(token_rows(1, 9)).dtype == torch.bfloat16


def test_a_folder_without_checkpoints_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run folder"):
        load_for_inference(tmp_path, "cpu")


def test_the_command_streams_what_it_prints_at_once(run_folder, capsys):
    options = [
        "generate",
        "--checkpoint",
        str(run_folder),
        "--prompt",
        "Enter",
        "--max-new-tokens",
        "9",
        "--device",
        "cpu",
    ]
    outputs = []
    for extra in ([], ["--no-stream"], ["--prompt", "Exit"]):
        assert main([*options, *extra]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert outputs[0].startswith("Enter")
    assert outputs[2].startswith("----- 1 -----\nEnter")
    assert "\n----- 2 -----\nExit" in outputs[2]
