"""Drafts make text come faster, never different."""

import math
import random

import pytest
import torch
import torch.nn.functional as F

from nemohybrid.__main__ import main
from nemohybrid.config.model import AttentionConfig, MTPConfig
from nemohybrid.data.tokenizer import ByteTokenizer
from nemohybrid.errors import ConfigError, DataError
from nemohybrid.generate import speculative
from nemohybrid.generate.draft import Drafter
from nemohybrid.generate.engine import generate_text, generate_tokens
from nemohybrid.generate.sampling import Sampling
from nemohybrid.generate.speculative import Acceptance, SpeculativeDecoder
from nemohybrid.model import SequenceContext
from nemohybrid.model.mlp import MLP
from nemohybrid.parallel.context import Group
from nemohybrid.parallel.context_parallel.moves import shifted

GREEDY, WARM = Sampling(temperature=0), Sampling(temperature=1.0, top_k=5)
SEPARATE = {"mtp": MTPConfig(repeat_block=False)}
ROPE = {"attention": AttentionConfig(position_embedding="rope")}
MODELS = {
    "one depth": ("M/*E", {}),
    "a repeated block": ("M*-E/*E/*E", {"moe_latent_size": 8}),
    "Mamba in the MTP part": ("*M/M-/M-/M-", ROPE),
    "separate blocks": ("EM*/*M/*M", SEPARATE),
}
PROMPT = [7, 8, 9, 10, 11, 12]
TOKENIZER = ByteTokenizer()
TEXT = "How much wood would a woodchuck chuck? "


@pytest.fixture(params=MODELS.values(), ids=list(MODELS))
def model(request, tiny_model):
    """Random weights: hardly a draft is accepted."""
    pattern, changes = request.param
    return tiny_model(pattern, **changes).requires_grad_(False)


@pytest.fixture(scope="module")
def trained(tiny_model):
    """Knows one sentence by heart: the token after each, and the two after that."""
    model = tiny_model("M-/-/-", vocab_size=257)
    ids = torch.tensor([TOKENIZER.encode(TEXT * 2)[start : start + 60] for start in (0, 17)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for _ in range(50):
        logits = [model(ids), *model.forward_mtp(ids)]
        losses = [
            F.cross_entropy(x[:, : 59 - k].flatten(0, 1), ids[:, k + 1 :].flatten()) for k, x in enumerate(logits)
        ]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
    return model.requires_grad_(False)


def plain(model, prompt, tokens, sampling=GREEDY, eod=None, seed=0):
    return generate_tokens(model, [prompt], tokens, sampling, eod, seed)[0]


def drafted_from_scratch(model, tokens, count):
    """Without a cache: all tokens through the model and through each depth again, for every draft."""
    tokens = list(tokens)
    for last in range(count):
        ids = torch.tensor([tokens])
        seq = SequenceContext(1, len(tokens))
        hidden = model.hidden_states(ids, seq)
        for depth in range(last + 1):
            hidden = model.mtp_step(depth, hidden, shifted(ids, depth + 1, Group()), seq)
        tokens.append(model.output.logits(hidden[len(tokens) - 2 - last]).argmax().item())
    return tokens[len(tokens) - count :]


@pytest.mark.parametrize("prompt", [[5], PROMPT], ids=len)
def test_the_mtp_blocks_draft_as_they_were_trained(prompt, model):
    """Whatever the model took of earlier drafts: from position to position as `forward_mtp` has it, and no further."""
    tokens, drafter, other = [*prompt, 3], Drafter(model, 4), random.Random(0)
    read = 0
    for accepted in (0, 4, 2, 0, 1, 3, 0):
        hidden = model.hidden_states(torch.tensor([tokens[:-1]]))[read:]
        read = len(tokens) - 1
        drafts = drafter.draft(hidden, tokens, 4)
        assert drafts == drafted_from_scratch(model, tokens, 4), f"after {len(tokens)} tokens"
        tokens += [*drafts[:accepted], other.randrange(61)]
        drafter.rewind(accepted)
        stay = [max(min(read, read + accepted - depth), 0) for depth in range(4)]
        assert [depth.cache.length for depth in drafter.depths] == stay, "what read only accepted drafts stays"
    assert all(len(depth.hidden) <= 5 for depth in drafter.depths), "no longer than a step, however long the text"


def test_the_decoder_tells_the_drafter_what_was_accepted(model, monkeypatch):
    class Checked(Drafter):
        def draft(self, hidden, tokens, count):
            drafts = super().draft(hidden, tokens, count)
            assert drafts == drafted_from_scratch(self.model, tokens, count), f"after {len(tokens)} tokens"
            return drafts

    monkeypatch.setattr(speculative, "Drafter", Checked)
    assert len(list(SpeculativeDecoder(model, GREEDY, 3).stream(PROMPT, 7))) == 7


def test_drafts_at_trained_depths_are_those_of_forward_mtp(tiny_model):
    model = tiny_model("M*/*E/*E").requires_grad_(False)
    tokens = [*PROMPT, 3]
    drafts = Drafter(model, 2).draft(model.hidden_states(torch.tensor([PROMPT])), tokens, 2)
    for depth, draft in enumerate(drafts):
        assert model.forward_mtp(torch.tensor([tokens]))[depth][0, -1].argmax() == draft, f"depth {depth}"
        tokens.append(draft)


@pytest.mark.parametrize(("drafts", "prompt"), [(1, [5]), (2, PROMPT), (3, [5, 6]), (8, [5])], ids=str)
def test_drafts_never_change_the_text(drafts, prompt, model):
    assert list(SpeculativeDecoder(model, GREEDY, drafts).stream(prompt, 10)) == plain(model, prompt, 10)


class Scripted(Drafter):
    """Drafts the text itself with a mistake here and there, so that acceptance is anything from none to all."""

    text: list[int]
    mistakes: random.Random

    def draft(self, hidden, tokens, count):
        true = self.text[len(tokens) : len(tokens) + count]
        return [(token + (self.mistakes.random() < 0.25)) % 61 for token in true]


@pytest.mark.parametrize("drafts", [2, 7])
def test_mistakes_among_good_drafts_never_change_the_text(drafts, model, monkeypatch):
    text = plain(model, PROMPT, 40)
    monkeypatch.setattr(Scripted, "text", PROMPT + text, raising=False)
    monkeypatch.setattr(Scripted, "mistakes", random.Random(drafts), raising=False)
    monkeypatch.setattr(speculative, "Drafter", Scripted)
    decoder = SpeculativeDecoder(model, GREEDY, drafts)
    assert list(decoder.stream(PROMPT, 40)) == text
    report = decoder.acceptance
    assert 0 < sum(report.accepted) < sum(report.drafted)
    assert sorted(report.accepted, reverse=True) == report.accepted, "a deeper draft was accepted more often"
    assert report.tokens == sum(report.accepted) + report.steps


def test_what_the_blocks_have_learnt_is_accepted(trained):
    decoder = SpeculativeDecoder(trained, GREEDY)
    assert decoder.texts(TOKENIZER, ["How much"], 60) == generate_text(trained, TOKENIZER, ["How much"], 60, GREEDY)
    assert decoder.acceptance.tokens_per_step > 2, f"3 are possible: {decoder.acceptance}"


def test_depths_beyond_the_trained_ones_draft_with_the_last_block(trained):
    decoder = SpeculativeDecoder(trained, GREEDY, drafts=6)
    assert decoder.texts(TOKENIZER, ["How much"], 60) == generate_text(trained, TOKENIZER, ["How much"], 60, GREEDY)
    assert [count > 0 for count in decoder.acceptance.drafted] == [True] * 6


def test_sampled_text_is_the_plain_text_of_the_seed(trained):
    prompt = TOKENIZER.encode("would")
    for seed in range(3):
        decoder = SpeculativeDecoder(trained, WARM, drafts=3, seed=seed)
        assert list(decoder.stream(prompt, 40)) == plain(trained, prompt, 40, WARM, seed=seed), f"seed {seed}"
        assert decoder.acceptance.tokens_per_step > 1


def test_text_is_as_long_as_asked_for_wherever_that_cuts_a_step(trained):
    prompt = TOKENIZER.encode("How much")
    text = plain(trained, prompt, 9)
    for tokens in range(10):
        assert list(SpeculativeDecoder(trained, GREEDY, 4).stream(prompt, tokens)) == text[:tokens], f"{tokens} tokens"


def test_text_ends_before_eod_wherever_that_stands_in_a_step(trained):
    """And nothing that was drafted beyond it counts."""
    prompt = TOKENIZER.encode("How")
    text = plain(trained, prompt, 30)
    for eod in set(text):
        decoder = SpeculativeDecoder(trained, GREEDY, 4)
        assert list(decoder.stream(prompt, 30, eod)) == text[: text.index(eod)], f"eod {chr(eod)!r}"
        assert decoder.acceptance.tokens == text.index(eod), "the prompt gave the first token; eod itself counts"
        assert decoder.acceptance.drafted[0] == decoder.acceptance.steps


def test_prompts_follow_each_other_and_their_drafts_add_up(trained):
    prompts, both = ["How", "would a", ""], SpeculativeDecoder(trained, GREEDY)
    assert both.texts(TOKENIZER, prompts, 20) == generate_text(trained, TOKENIZER, prompts, 20, GREEDY)
    alone = [SpeculativeDecoder(trained, GREEDY) for _ in prompts]
    for prompt, decoder in zip(prompts, alone, strict=True):
        decoder.texts(TOKENIZER, [prompt], 20)
    assert both.acceptance.steps == sum(decoder.acceptance.steps for decoder in alone)
    assert both.acceptance.accepted == [sum(n) for n in zip(*(d.acceptance.accepted for d in alone), strict=True)]


def test_acceptance_is_counted_by_depth():
    acceptance = Acceptance(drafted=[0] * 3, accepted=[0] * 3)
    assert math.isnan(acceptance.tokens_per_step)
    acceptance.add([1, 2, 3], [1, 2, 3, 4], ended=False)  # all, and the model's own 4
    acceptance.add([1, 2, 3], [1, 9], ended=False)  # the model has 9 for 2
    acceptance.add([1, 2, 3], [1, 2], ended=True)  # 2 ended the document
    acceptance.add([1, 2], [9], ended=True)  # so did 9, for 1
    assert (acceptance.steps, acceptance.tokens) == (4, 9)
    assert acceptance.drafted == [4, 3, 2]
    assert acceptance.accepted == [3, 2, 1]
    assert str(acceptance) == "2.25 tokens a step; 6 of 9 drafts accepted, by depth 75.0 % 66.7 % 50.0 %"


def test_no_graph_is_built_where_weights_want_gradients(tiny_model):
    model = tiny_model("M*/M")
    made = []
    model.layers[0].mixer.conv.register_forward_hook(lambda *call: made.append(call[2][0]))
    list(SpeculativeDecoder(model, GREEDY).stream(PROMPT, 5))
    assert not any(y.requires_grad for y in made)


def test_a_model_without_mtp_is_refused(tiny_model):
    with pytest.raises(ConfigError, match=r"pattern M- has no MTP part, such as /\*E, .* Legal: generate without"):
        SpeculativeDecoder(tiny_model("M-"), GREEDY)


def test_no_drafts_are_refused(trained):
    with pytest.raises(ConfigError, match=r"0 drafts in a step .* Legal: 1 or more"):
        SpeculativeDecoder(trained, GREEDY, drafts=0)


def test_a_prompt_without_tokens_is_refused(trained):
    with pytest.raises(DataError, match="at least one token"):
        list(SpeculativeDecoder(trained, GREEDY).stream([], 3))


@pytest.mark.parametrize("pattern", ["-/M", "M/-"])
def test_a_mixer_that_cannot_take_drafts_back_is_named_before_one_is_made(pattern, tiny_model, monkeypatch):
    def remember(self, x, seq):
        seq.cache.states[self] = x[-1:]
        return x

    monkeypatch.setattr(MLP, "forward", remember)
    with pytest.raises(ConfigError, match="a draft cannot be taken back from MLP"):
        list(SpeculativeDecoder(tiny_model(pattern), GREEDY).stream(PROMPT, 5))


def test_the_command_prints_the_same_text_and_reports_on_stderr(trained, save_run, tmp_path, capsys):
    run = ["generate", "--checkpoint", str(save_run(trained, tmp_path)), "--max-new-tokens", "20", "--device", "cpu"]

    def printed(*options):
        assert main([*run, "--greedy", *options]) == 0
        return capsys.readouterr()

    one, two = ("--prompt", "How"), ("--prompt", "How", "--prompt", "would")
    for options in (one, (*one, "--no-stream"), two):
        want = printed(*options)
        for flag in (["--speculative"], ["--speculative", "5"]):
            got = printed(*options, *flag)
            assert got.out == want.out
            assert got.err.startswith("speculative decoding: ")
            assert " tokens a step; " in got.err
        assert "speculative" not in want.err
    assert main([*run, *one, "--seed", "3"]) == 0
    warm = capsys.readouterr().out
    assert main([*run, *one, "--seed", "3", "--speculative"]) == 0
    assert capsys.readouterr().out == warm


def test_the_command_refuses_a_checkpoint_without_mtp(tiny_model, save_run, tmp_path, capsys):
    run = save_run(tiny_model("M", vocab_size=257), tmp_path)
    assert main(["generate", "--checkpoint", str(run), "--prompt", "a", "--speculative", "--device", "cpu"]) == 1
    assert "has no MTP part" in capsys.readouterr().err
