"""Evaluation of drafts: what share of them the model itself would accept."""

import pytest
import torch

from nemohybrid.model import SequenceContext
from nemohybrid.observe.metrics import flat, read_metrics, scalars
from nemohybrid.observe.picture import draw_loss
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.train.batch import Batch
from nemohybrid.train.evaluation import Evaluation, Score, evaluate, score_batch
from nemohybrid.train.trainer import Trainer

DOCUMENTS = [[0] * 7 + [1] * 5, [3] * 2 + [4] * 10]


@torch.no_grad()
def test_a_draft_counts_when_it_and_all_shallower_ones_are_what_the_model_chooses(tiny_model, token_rows):
    """Counted with loops; a vocabulary of few tokens, so that drafts are right now and then."""
    model, ids = tiny_model("M*-/*-/*-/*-", vocab_size=2), token_rows(2, 13) % 2
    mask = (torch.rand(2, 12, generator=torch.Generator().manual_seed(0)) < 0.8).float()
    batch = Batch(ids[:, :-1], ids[:, 1:], mask, torch.tensor(DOCUMENTS, dtype=torch.int32))
    seq = SequenceContext(2, 12, batch.document_ids)
    logits, drafts = model(batch.tokens, seq), model.forward_mtp(batch.tokens, seq)
    want = [0] * 6
    for row, documents in enumerate(DOCUMENTS):
        for depth in range(3):
            for t in range(12 - depth - 1):
                last = (
                    t + depth + 1
                )  # whose label is drafted; the label of the row's last token goes on with its document
                beyond = documents[last + 1] if last < 11 else documents[last]
                if documents[t] == documents[last] == beyond and mask[row, last]:
                    chosen = [logits[row, t + 1 + k].argmax() for k in range(depth + 1)]
                    drafted = [drafts[k][row, t].argmax() for k in range(depth + 1)]
                    want[2 * depth] += chosen == drafted
                    want[2 * depth + 1] += 1
    nats, tokens, *got = score_batch(model, batch).tolist()
    assert got == want
    assert all(0 < accepted < of for accepted, of in zip(want[::2], want[1::2], strict=True)), "the case is too easy"
    losses = -logits.log_softmax(-1).gather(2, batch.labels[..., None])[..., 0]
    assert (nats, tokens) == pytest.approx(((losses * mask).sum().item(), mask.sum().item()), rel=1e-5)


def test_the_records_of_an_evaluation_name_depth_and_set():
    evaluation = Evaluation(3, 2.0, 3.0, {"web": Score(1.0, 1.5, (0.5,))}, (0.8,))
    assert evaluation.lines == [
        "validation loss 2.0000, 3.0000 bits per byte, drafts accepted 80.0%",
        "  web  loss 1.0000, 1.5000 bits per byte, drafts accepted 50.0%",
    ]
    assert scalars(evaluation) == {
        "val_loss": 2.0,
        "val_bits_per_byte": 3.0,
        "mtp_acceptance/1": 0.8,
        "val_loss/web": 1.0,
        "val_bits_per_byte/web": 1.5,
        "mtp_acceptance/1/web": 0.5,
    }
    assert "mtp_acceptance" not in " ".join(flat(Evaluation(3, 2.0, 3.0)))


def test_two_ranks_find_the_acceptance_of_one(configure, run_ranks, tmp_path):
    config = configure('model.pattern="M/*-/*-"')

    def write(context: ParallelContext) -> None:
        trainer = Trainer(config, context, [])
        found = evaluate(trainer.model, trainer.data, 8, 0)
        assert found is not None
        numbers = [found.val_loss, *found.mtp_acceptance]
        (tmp_path / f"{context.data.size}.{context.rank}").write_text(" ".join(map(str, numbers)))

    write(ParallelContext.single())
    assert run_ranks(write) == ["", ""]
    one, *two = ([float(n) for n in (tmp_path / name).read_text().split()] for name in ("1.0", "2.0", "2.1"))
    assert len(one) == 3
    assert two[0] == two[1] == pytest.approx(one, rel=1e-6)


def test_a_run_with_named_sets_is_scored_written_and_drawn(start, corpus, tmp_path):
    start('model.pattern="M/*-"', f"data.valid={{web: {corpus}/valid}}", "train.steps=2", "train.evaluate_every=2")
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    names = [name for name in records[-1] if name.startswith("mtp_acceptance")]
    assert names == ["mtp_acceptance/1", "mtp_acceptance/1/web"]
    assert 0 <= records[-1][names[0]] == records[-1][names[1]] <= 1
    draw_loss(records, tmp_path / "loss.png", "title")
    assert (tmp_path / "loss.png").is_file()
