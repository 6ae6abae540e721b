"""Training with multi-token prediction: the loss, every gradient, and what must not change them."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nemohybrid.__main__ import main
from nemohybrid.config.model import MTPConfig, RouterConfig
from nemohybrid.errors import ConfigError, TrainingError
from nemohybrid.model import HybridModel, SequenceContext
from nemohybrid.model.mtp import MTPBlock
from nemohybrid.observe.metrics import read_metrics
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.train.batch import Batch
from nemohybrid.train.loss import loss_weights, summed_losses, target_counts
from nemohybrid.train.step import compute_gradients
from nemohybrid.train.trainer import Trainer
from nemohybrid_kernels.cross_entropy import cross_entropy

ALONE = ParallelContext.single()
EOD = 60
MODELS = {
    "one block": ("M*-/*-/*-", {}),
    "three blocks": ("M*/M-/M-/M-", {"mtp": MTPConfig(repeat_block=False, loss_weight=0.5)}),
    "one depth, tied": ("-M/*", {"tie_embeddings": True}),
    "latent experts": ("ME/*E/*E", {"moe_latent_size": 8, "router": RouterConfig(aux_loss="none")}),
}
DOCUMENTS = [[4, 4, 4, 9, 9, 9, 9, 4, 4, 4, 4, 4], [0] * 12, [0, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3, 3]]  # 4 comes back


def packed_batch(eod: int | None = EOD) -> Batch:
    """Three rows of packed documents, the last of which ends in the last column; some labels are masked."""
    generator = torch.Generator().manual_seed(1)
    samples = torch.randint(0, EOD, (3, 13), generator=generator)
    samples[2, 11] = EOD
    mask = (torch.rand(3, 12, generator=generator) < 0.8).float()
    return Batch(samples[:, :-1], samples[:, 1:], mask, torch.tensor(DOCUMENTS, dtype=torch.int32), eod)


def documents(batch: Batch) -> Iterator[tuple[int, int, list[int]]]:
    """Row, first column and tokens of each document, with the label of the row's last token where it belongs to it."""
    for row in range(len(batch.tokens)):
        ids = [0] * batch.tokens.shape[1] if batch.document_ids is None else batch.document_ids[row].tolist()
        for _, columns in groupby(range(len(ids)), key=lambda column, ids=ids: ids[column]):
            columns = list(columns)
            tokens = batch.tokens[row, columns].tolist()
            if columns[-1] == len(ids) - 1 and tokens[-1] != batch.eod:
                tokens.append(int(batch.labels[row, -1]))
            yield row, columns[0], tokens


def by_hand(norm, x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + norm.epsilon).sqrt() * norm.weight


def drafts_by_hand(model: HybridModel, tokens: list[int]) -> Iterator[tuple[int, int, Tensor]]:
    """Depth, position and log-probabilities, for each draft of one document: no row, no padding, no mask."""
    read = torch.tensor(tokens)
    hidden = model.hidden_states(read[None])
    for depth in range(model.mtp_depth):
        block = model.mtp[0 if len(model.mtp) == 1 else depth]
        assert isinstance(block, MTPBlock)
        positions = range(len(tokens) - 2 - depth)
        if not positions:
            return
        inputs = []
        for t in positions:
            embedded = by_hand(block.enorm, model.embedding.weight[tokens[t + depth + 1]])
            inputs.append(block.eh_proj.weight @ torch.cat([embedded, by_hand(block.hnorm, hidden[t])]))
        x = torch.stack(inputs)
        for layer in block.layers:
            x = layer(x, SequenceContext(1, len(positions)))
        hidden = by_hand(block.final_norm, x)
        for t in positions:
            yield depth, t, (model.output.weight[:61] @ hidden[t]).log_softmax(0)


def losses_by_hand(model: HybridModel, batch: Batch) -> tuple[list[Tensor], list[int]]:
    sums, counts = [torch.zeros((), dtype=torch.float64) for _ in range(model.mtp_depth)], [0] * model.mtp_depth
    for row, first, tokens in documents(batch):
        for depth, t, log_p in drafts_by_hand(model, tokens):
            if batch.loss_mask[row, first + t + depth + 1]:
                sums[depth] = sums[depth] - log_p[tokens[t + depth + 2]]
                counts[depth] += 1
    return sums, counts


@pytest.fixture(params=MODELS.values(), ids=list(MODELS))
def model(request, tiny_model) -> HybridModel:
    pattern, changes = request.param
    return tiny_model(pattern, **changes)


def gradients_of(model: HybridModel, batch: Batch, microbatch: int = 3) -> tuple[list[float], dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    losses = compute_gradients(model, batch, microbatch, ALONE)
    return losses.tolist(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("eod", [EOD, None])
def test_losses_and_gradients_are_those_computed_position_by_position(model, eod, assert_close_to_scale):
    """In float64 to 1e-6: the weights of the losses are fp32."""
    model.double().dtype = torch.float64
    batch = packed_batch(eod)
    losses, got = gradients_of(model, batch)
    assert len(got) == len(list(model.parameters())), "a parameter has no gradient"
    main_model = model.output.logits(model.hidden_states(batch.tokens, SequenceContext(3, 12, batch.document_ids)))
    main_loss = -main_model.log_softmax(-1).gather(1, batch.labels.flatten()[:, None]).flatten()
    main_loss = (main_loss * batch.loss_mask.flatten()).sum() / batch.loss_mask.sum()
    sums, counts = losses_by_hand(model, batch)
    assert min(counts) > 0
    means = [total / count for total, count in zip(sums, counts, strict=True)]
    assert losses == pytest.approx([main_loss.item(), *(mean.item() for mean in means)], rel=1e-6)
    model.zero_grad(set_to_none=True)
    (main_loss + model.config.mtp.loss_weight / model.mtp_depth * torch.stack(means).sum()).backward()
    want = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name, gradient in want.items():
        assert gradient.abs().max() > 0, f"{name}: no gradient"
    assert_close_to_scale(got, want, 1e-6)


def test_the_rows_that_count_are_named():
    """One row, L = 6: documents of 3 and 3 tokens, the second goes on past the row or ends with it."""
    tokens = torch.tensor([[1, 2, EOD, 4, 5, 6]])
    labels = torch.tensor([[2, EOD, 4, 5, 6, 7]])
    batch = Batch(tokens, labels, torch.ones(1, 6), torch.tensor([[0, 0, 0, 1, 1, 1]]), EOD)
    (labels_1, mask_1), (labels_2, mask_2), (_, mask_3) = batch.draft_targets(3)
    assert mask_1.tolist() == [[1, 0, 0, 1, 1, 0]]
    assert mask_2.tolist() == [[0, 0, 0, 1, 0, 0]]
    assert mask_3.tolist() == [[0, 0, 0, 0, 0, 0]]
    assert (labels_1 * mask_1).tolist() == [[EOD, 0, 0, 6, 7, 0]]
    assert (labels_2 * mask_2).tolist() == [[0, 0, 0, 7, 0, 0]]
    ended = replace(batch, tokens=torch.where(tokens == 6, EOD, tokens))
    assert [mask.tolist() for _, mask in ended.draft_targets(2)] == [[[1, 0, 0, 1, 0, 0]], [[0, 0, 0, 0, 0, 0]]]
    hidden = replace(batch, loss_mask=torch.tensor([[1.0, 0, 1, 1, 0, 1]]))
    assert next(hidden.draft_targets(1))[1].tolist() == [[0, 0, 0, 0, 1, 0]]
    whole = replace(batch, document_ids=None, eod=None)
    assert next(whole.draft_targets(1))[1].tolist() == [[1, 1, 1, 1, 1, 0]]


def test_the_training_loss_is_the_main_one_and_an_equal_part_of_lambda_for_each_depth():
    weights = loss_weights(torch.tensor([10.0, 8.0, 0.0]), mtp_weight=0.3)
    torch.testing.assert_close(weights, torch.tensor([0.1, 0.15 / 8, 0.0]))


@pytest.mark.parametrize("microbatch", [1, 2])
def test_microbatches_give_the_losses_and_gradients_of_the_whole_batch(model, microbatch, assert_close_to_scale):
    """Masks and documents are uneven: a mean over microbatches would weigh them wrongly."""
    losses, want = gradients_of(model, packed_batch())
    split_losses, got = gradients_of(model, packed_batch(), microbatch)
    assert split_losses == pytest.approx(losses, rel=1e-6)
    assert_close_to_scale(got, want, 2e-5)


def test_a_masked_or_foreign_token_has_no_influence_on_any_loss(model):
    """What stands where a row has ended is a token like any other: it must not be read by anything that counts."""
    batch = packed_batch()
    losses, want = gradients_of(model, batch)
    for by, (_, mask) in enumerate(batch.draft_targets(model.mtp_depth), 1):
        assert not mask[:, 12 - by :].any(), "a target beyond the row counts"
    labels = torch.where(batch.loss_mask.bool(), batch.labels, 0)
    again, got = gradients_of(model, replace(batch, labels=labels))
    assert again == losses
    assert [name for name in want if not torch.equal(got[name], want[name])] == []


def test_the_main_loss_alone_is_the_first_of_all(model):
    batch = packed_batch()
    logits = model(batch.tokens, SequenceContext(*batch.tokens.shape, document_ids=batch.document_ids))
    losses = cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
    assert torch.equal((losses * batch.loss_mask.flatten()).sum(), summed_losses(model, batch)[0])


def test_without_weight_the_drafts_change_no_gradient_of_the_model(tiny_model):
    plain, silent = tiny_model("M*-"), tiny_model("M*-/*-/*-", mtp=MTPConfig(loss_weight=0.0))
    plain.load_state_dict(silent.state_dict(), strict=False)
    want = gradients_of(plain, packed_batch())[1]
    for name, gradient in gradients_of(silent, packed_batch())[1].items():
        assert torch.equal(gradient, want.get(name, torch.zeros_like(gradient))), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recomputation_changes_no_bit_and_keeps_the_logits_of_one_head(tiny_model, dtype):
    model = tiny_model("M*/*E/*E/*E", dtype=dtype)
    losses, want = gradients_of(model, packed_batch())
    kept = kept_bytes(model)
    model.recompute = True
    again, got = gradients_of(model, packed_batch())
    assert again == losses
    assert [name for name in want if not torch.equal(got[name], want[name])] == []
    assert kept_bytes(model) < kept / 3


def kept_bytes(model: HybridModel) -> int:
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t}) or t, lambda t: t):
        summed_losses(model, packed_batch())
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_rows_too_short_for_a_depth_train_the_others(tiny_model):
    """Two tokens: the next one, and one of the first depth; the second has none, which is no number and no gradient."""
    model = tiny_model("M*/*-/*-", mtp=MTPConfig(repeat_block=False))
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    batch = Batch(ids[:, :2], ids[:, 1:], torch.ones(2, 2), None)
    losses, got = gradients_of(model, batch, 1)
    assert torch.tensor(losses).isnan().tolist() == [False, False, True]
    assert target_counts(batch, 2).tolist() == [4, 2, 0]
    for name, gradient in got.items():
        assert gradient.isfinite().all(), name
        assert gradient.any() == (not name.startswith("mtp.1")), name


# --- the numerics that made Nemotron 3 Ultra diverge -----------------------------------------------------------------

MICROBATCHES = 96


@pytest.fixture
def ultra(tiny_model):
    """`ultra(mtp_weight)`: a bf16 model, its two depths weighing 0.05 each for 0.1."""
    return lambda weight: tiny_model("M*/-/-", dtype="bfloat16", mtp=MTPConfig(loss_weight=weight))


@pytest.fixture
def steady() -> Batch:
    """Microbatches that agree on the gradient, as those of a trained model nearly do on its large entries."""
    samples = torch.randint(0, 61, (1, 9), generator=torch.Generator().manual_seed(3)).repeat(MICROBATCHES, 1)
    return Batch(samples[:, :-1], samples[:, 1:], torch.ones(MICROBATCHES, 8), None)


def output_gradients(model: HybridModel, part: Batch, weights: Tensor) -> list[Tensor]:
    """Of the output matrix, from the main loss and from each depth: one bf16 product each."""
    sums = summed_losses(model, part) * weights
    return [torch.autograd.grad(one, model.output.weight, retain_graph=True)[0] for one in sums]


def lost(with_mtp: Tensor, without: Tensor, mtp_part: Tensor) -> float:
    """Relative error of what MTP added to a gradient."""
    return ((with_mtp.double() - without.double() - mtp_part).norm() / mtp_part.norm()).item()


def test_the_output_gradient_keeps_the_share_of_mtp_and_bf16_sums_would_lose_it(ultra, steady):
    """Main loss and two MTP losses at 0.05 each, over 96 microbatches: ours to 0.1 %; summed in bf16 over a third is lost."""
    weights = loss_weights(target_counts(steady, 2), 0.1)
    pieces = output_gradients(ultra(0.1), next(steady.split(1)), weights)
    mtp_part = MICROBATCHES * torch.stack(pieces[1:]).double().sum(0)
    ours = {weight: ultra(weight) for weight in (0.1, 0.0)}
    for model in ours.values():
        compute_gradients(model, steady, 1, ALONE)
        assert model.output.weight.grad is not None
        assert model.output.weight.grad.dtype == torch.float32
    error = lost(ours[0.1].output.weight.grad, ours[0.0].output.weight.grad, mtp_part)
    assert error < 1e-3, f"{error:.2%} of the MTP share of the output gradient is lost"

    def summed_in_bf16(kinds: int) -> Tensor:
        total = torch.zeros_like(pieces[0], dtype=torch.bfloat16)
        for _ in range(MICROBATCHES):
            total += torch.stack(pieces[:kinds]).sum(0).bfloat16()
        return total

    assert lost(summed_in_bf16(3), summed_in_bf16(1), mtp_part) > 0.3, "this case does not show the failure"


def test_a_cast_that_the_heads_share_would_be_seen(ultra, steady, monkeypatch):
    """Guards the test above: autograd adds the gradients of a shared bf16 tensor in bf16."""
    weights = loss_weights(target_counts(steady, 2), 0.1)
    part = next(steady.split(1))

    def shared(weights: Tensor) -> Tensor:
        model = ultra(0.1)
        cast = model.output.weight.bfloat16()
        monkeypatch.setattr(model.output, "gemm", lambda x, weight, bias: x @ cast.T)
        return torch.autograd.grad((summed_losses(model, part) * weights).sum(), model.output.weight)[0]

    mtp_part = torch.stack(output_gradients(ultra(0.1), part, weights)[1:]).double().sum(0)
    assert lost(shared(weights), shared(weights * torch.tensor([1.0, 0, 0])), mtp_part) > 5e-3


# --- runs ------------------------------------------------------------------------------------------------------------

RUN = ['model.pattern="M*/*-/*-"', "train.microbatch=2", "train.evaluate_every=2"]


def test_every_gradient_of_two_ranks_equals_that_of_one(configure, run_ranks, tmp_path):
    """Documents of 9, 5, 2 and 1 tokens: the second rank has nothing to draft."""
    config = configure('model.pattern="M*/*E/*E"', "model.num_experts=4", "train.microbatch=1")

    def gradients(context: ParallelContext) -> dict[str, Tensor]:
        trainer = Trainer(config, context, [])
        batch = trainer.data.batch(1)
        rows = torch.arange(len(batch.tokens)) + context.data.rank * len(batch.tokens)
        lengths = torch.tensor([9, 5, 2, 1])[rows][:, None]
        batch = replace(batch, document_ids=(torch.arange(32) // lengths).int())
        losses = compute_gradients(trainer.model, batch, 1, context)
        return {"losses": losses} | {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}

    def save(context: ParallelContext) -> None:
        save_file({n: g.contiguous() for n, g in gradients(context).items()}, tmp_path / f"{context.rank}.safetensors")

    want = gradients(ALONE)
    assert run_ranks(save) == ["", ""]
    for rank in range(2):
        with safe_open(tmp_path / f"{rank}.safetensors", framework="pt") as file:
            assert set(file.keys()) == set(want)
            for name, expected in want.items():
                assert expected.abs().max() > 0, f"{name}: no gradient"
                got = file.get_tensor(name)
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def saved(folder, step: int) -> dict[str, Tensor]:
    with safe_open(next((folder / "checkpoints" / f"step_{step:08d}").glob("*.safetensors")), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def learned(folder) -> list[dict]:
    """The records without what depends on the clock."""
    names = ("step", "loss", "mtp_loss/1", "mtp_loss/2", "val_loss", "mtp_acceptance/1", "mtp_acceptance/2")
    return [
        {name: record[name] for name in names if name in record} for record in read_metrics(folder / "metrics.jsonl")
    ]


def test_a_resumed_run_is_the_one_that_never_stopped_bit_for_bit(start, tmp_path):
    start(*RUN, f"run.dir={tmp_path}/straight", "train.recompute=layer")
    start(*RUN, "train.stop_at=3")
    start(*RUN)
    records, want = learned(tmp_path / "run"), learned(tmp_path / "straight")
    assert records == want
    assert [len(record) for record in records] == [4, 4, 4, 4, 4, 4], "a loss or an acceptance is missing"
    got, expected = saved(tmp_path / "run", 4), saved(tmp_path / "straight", 4)
    assert any("mtp.0.eh_proj" in name for name in got)
    assert [name for name in expected if not torch.equal(got[name], expected[name])] == []


def test_a_bad_number_in_a_draft_is_named(configure):
    trainer = Trainer(configure(*RUN), ALONE, [])
    projection = trainer.model.get_submodule("mtp.0.layers.0.mixer.out_proj")
    projection.register_forward_hook(lambda *call: call[2] * float("nan"))
    with pytest.raises(TrainingError, match=r"First bad tensor: the output of mtp\.0\.layers\.0\.mixer\.out_proj in"):
        trainer.train_step()


@pytest.mark.parametrize("reset", [True, False])
def test_the_batches_of_a_run_know_what_ends_a_document(configure, reset):
    """Without it, the label of an eod in the last column would count as one of its document."""
    trainer = Trainer(configure(*RUN, f"data.reset_documents={str(reset).lower()}"), ALONE, [])
    ((validation, _), *_) = trainer.data.validation_batches("", 2)
    for batch in (trainer.data.batch(1), validation):
        assert batch.eod == (trainer.data.tokenizer.eod if reset else None)


def test_rows_shorter_than_the_depths_are_refused(configure):
    with pytest.raises(ConfigError, match=r"data\.sequence_length=2: MTP depth 2 has nothing to predict.*3 or more"):
        configure(*RUN, "data.sequence_length=2")
    configure(*RUN, "data.sequence_length=3")


def test_the_small_super_learns_its_main_task_and_both_drafts(tmp_path, capsys):
    """Ten steps of the shipped model on the bundled text."""
    given = ["model=tiny_latent_mtp", "data=shakespeare", "data.sequence_length=32", "train.global_batch=4"]
    steps = ["train.steps=10", "train.evaluate_every=0", "optim.lr=3e-3", "schedule.warmup=1", "logging.picture=false"]
    assert main(["train", *given, *steps, f"run.dir={tmp_path}/run", "run.device=cpu"]) == 0
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    for name in ("loss", "mtp_loss/1", "mtp_loss/2"):
        assert records[-1][name] < records[0][name] - 0.5, f"{name}: {[round(r[name], 2) for r in records]}"
