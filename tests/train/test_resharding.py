"""A run that is resumed under other layouts is the run of one rank; what is loaded is what was saved, to the last bit."""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint
import torch.distributed.device_mesh
import torch.distributed.fsdp
import torch.distributed.tensor
from forked import run_world
from layouts import Layout

from nemohybrid.checkpoint import load_checkpoint, read_metadata, read_state, save_checkpoint
from nemohybrid.config.compose import load_config
from nemohybrid.config.run_config import RunConfig
from nemohybrid.observe.metrics import read_metrics
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.parallel.layout import Parts
from nemohybrid.train.optimizer import start_state
from nemohybrid.train.random_streams import RandomStreams
from nemohybrid.train.run import run
from nemohybrid.train.state import model_tensors, run_tensors
from nemohybrid.train.trainer import Trainer

MODEL = [
    'model.pattern="M*E-/*E"',
    "model.num_attention_heads=8",
    "model.mamba_num_groups=4",
    "model.num_experts=4",
    "model.vocab_size=259",
    "train.microbatch=1",
    "train.evaluate_every=3",
    "checkpoint.keep=9",
    "optim.eps=1e-4",
]

CHAIN = [
    Layout(tensor=2, sequence=True),
    Layout(data=4, shard=4),
    Layout(tensor=4),
    Layout(data=4, shard=2, mode="hybrid"),
    Layout(context=2, data=2, shard=4, method="ring+states"),
    Layout(tensor=2, data=2, shard=2, sequence=True),
    Layout(pipeline=2, data=2, expert=2),
    Layout(tensor=2, sequence=True, data=2, expert=4),
    Layout(pipeline=2, virtual=2, tensor=2, sequence=True),
    Layout(data=4, shard=4, expert=2),
    Layout(),
    Layout(pipeline=4),
    Layout(data=4, expert=2, expert_tensor=2),
    Layout(data=2, shard=2, mode="shard_grad"),
]
"""One step each; every layout resumes what the one before it saved."""


def overrides(layout: Layout) -> list[str]:
    parallel = layout.configured(RunConfig()).parallel
    return [f"parallel.{name}={'null' if v is None else v}" for name, v in parallel.as_dict().items()]


@pytest.fixture
def under(tiny_run, tmp_path_factory):
    """`under(layout, action, *overrides)`: action(config, context) on the ranks of a layout, or here for a single one."""

    def act(layout: Layout, action, *words: str) -> None:
        config = load_config([*tiny_run, *MODEL, *overrides(layout), *words], layout.ranks)
        if layout.ranks == 1:
            action(config, ParallelContext.single())
            return
        failures = run_world(
            layout.ranks, lambda rank: action(config, layout.of_this_rank()), tmp_path_factory.mktemp("world")
        )
        assert not failures, f"{layout} {failures[0].name}:\n{failures[0].read_text()}"

    return act


def losses(folder: Path) -> dict[int | str, float]:
    """Of every step, and of every evaluation."""
    records = list(read_metrics(folder / "metrics.jsonl"))
    scores: dict[int | str, float] = {f"score {r['step']}": r["val_loss"] for r in records if "val_loss" in r}
    return scores | {r["step"]: r["loss"] for r in records if "loss" in r}


def whole(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Everything in a checkpoint but random states, assembled."""
    records = {n: r for n, r in read_metadata(checkpoint).items() if not n.startswith("random.")}
    tensors = {name: torch.empty(record.shape, dtype=record.dtype) for name, record in records.items()}
    load_checkpoint(checkpoint, tensors, allow_unexpected=("random.",))
    return tensors


def assert_same(first: Path, second: Path) -> None:
    got, wanted = whole(second), whole(first)
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(got[name], tensor), f"{name} changed between {first} and {second}"


def reload_and_save(folder: Path, copy: Path, misplaced=lambda held: held):
    """Load the newest checkpoint of a run under a layout and write down what every rank has then."""

    def action(config, context) -> None:
        trainer = Trainer(config, context, [])
        start_state(trainer.optimizer, 0)
        held = run_tensors(trainer.model, trainer.optimizer, trainer.parameters)
        path = max((folder / "checkpoints").glob("step_*"))
        load_checkpoint(path, misplaced(held), allow_unexpected=("random.",))
        save_checkpoint(copy, 1, held, {})

    return action


def test_every_layout_goes_on_where_another_ended(under, tmp_path):
    steps = len(CHAIN)
    one, chain = tmp_path / "one", tmp_path / "chain"
    under(Layout(), run, f"run.dir={one}", f"train.steps={steps}")
    for step, layout in enumerate(CHAIN, 1):
        if step > 1:
            under(layout, reload_and_save(chain, tmp_path / f"copy{step}"), f"run.dir={tmp_path}/unused{step}")
            newest = chain / "checkpoints" / f"step_{step - 1:08d}"
            assert_same(newest, tmp_path / f"copy{step}" / "step_00000001")
        under(layout, run, f"run.dir={chain}", f"train.steps={steps}", f"train.stop_at={step}")
    assert losses(chain).keys() == losses(one).keys()
    assert {*range(1, steps + 1), "score 3", f"score {steps}"} <= losses(one).keys()
    for what, loss in losses(one).items():
        assert losses(chain)[what] == pytest.approx(loss, rel=1e-5), f"{what}: one of {[*map(str, CHAIN)]}"
    last = f"checkpoints/step_{steps:08d}"
    got, wanted = whole(chain / last), whole(one / last)
    for name, tensor in wanted.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert any(name.endswith("expert_bias") and tensor.any() for name, tensor in wanted.items())


@pytest.mark.parametrize(
    "layout, recipe",
    [
        (Layout(tensor=2, sequence=True), "bf16"),
        (Layout(data=2, shard=2), "bf16"),
        (Layout(data=2), "nvfp4"),
        (Layout(tensor=2), "fp8_delayed"),
    ],
    ids=str,
)
def test_the_same_layout_twice_is_bitwise_the_same_and_so_is_a_resume(layout, recipe, under, tmp_path):
    """Also where gradients are rounded at random, and where scales are those of steps before."""
    rules = "" if recipe == "bf16" else '{name: "*.in_proj", recipe: bf16}'  # its widths are odd here
    how = [f"precision.recipe={recipe}", f"precision.rules=[{rules}]", "train.steps=4"]
    under(layout, run, f"run.dir={tmp_path}/first", *how)
    under(layout, run, f"run.dir={tmp_path}/second", *how, "train.stop_at=2")
    under(layout, run, f"run.dir={tmp_path}/second", *how)
    assert losses(tmp_path / "first") == losses(tmp_path / "second")
    assert_same(tmp_path / "first/checkpoints/step_00000004", tmp_path / "second/checkpoints/step_00000004")


def test_weights_of_another_run_start_a_new_one_under_any_layout(under, tmp_path):
    under(Layout(data=2, shard=2), run, f"run.dir={tmp_path}/first", "train.steps=1")

    def start(config, context) -> None:
        trainer = Trainer(config, context, [])
        trainer.resume()
        save_checkpoint(tmp_path / "copy", 1, model_tensors(trainer.model, trainer.parameters), {})

    under(Layout(tensor=2, sequence=True), start, f"run.dir={tmp_path}/second", f"init_from={tmp_path}/first")
    first = whole(tmp_path / "first/checkpoints/step_00000001")
    for name, tensor in whole(tmp_path / "copy/step_00000001").items():
        assert torch.equal(tensor, first[name]), name


def draws_after_resume(under, tmp_path: Path) -> None:
    """Every rank draws after a resume what it would have drawn without one, and no two places draw the same."""
    layout = Layout(tensor=2, data=2, sequence=True)

    def save(config, context) -> None:
        trainer = Trainer(config, context, [])
        trainer.checkpoints.random.start()
        torch.rand(5 + context.rank)
        start_state(trainer.optimizer, 0)
        trainer.step = 1
        trainer.save()
        (tmp_path / f"drawn{context.rank}").write_text(str(torch.rand(3).tolist()))

    def resume(config, context) -> None:
        trainer = Trainer(config, context, [])
        trainer.resume()
        assert str(torch.rand(3).tolist()) == (tmp_path / f"drawn{context.rank}").read_text(), "another rank's numbers"

    under(layout, save)
    assert len({file.read_text() for file in tmp_path.glob("drawn*")}) == layout.ranks
    under(layout, resume)


def test_random_numbers_go_on_for_every_rank(under, tmp_path):
    draws_after_resume(under, tmp_path)


def test_the_test_of_random_numbers_sees_a_wrong_rank_restored(under, tmp_path, monkeypatch):
    """A planted fault: data ranks are not told apart, so that all get the state of the first."""
    monkeypatch.setattr(RandomStreams, "place", property(lambda self: f"tensor{self.context.tensor.rank:05d}"))
    with pytest.raises(AssertionError, match="another rank's numbers"):
        draws_after_resume(under, tmp_path)


def test_the_test_of_resharding_sees_a_shard_in_the_wrong_place(under, tmp_path):
    """A planted fault: every tensor is loaded one row further down than it lies."""
    under(Layout(), run, f"run.dir={tmp_path}/one", "train.steps=1")

    def misplaced(held: dict) -> dict:
        def moved(offsets: tuple[int, ...], rows: int, whole: int) -> tuple[int, ...]:
            return ((offsets[0] + 1) % (whole - rows + 1), *offsets[1:])

        return {
            name: Parts(part.shape, tuple((moved(o, len(v), part.shape[0]), v) for o, v in part.boxes))
            if isinstance(part, Parts)
            else part
            for name, part in held.items()
        }

    action = reload_and_save(tmp_path / "one", tmp_path / "copy", misplaced)
    under(Layout(data=2, shard=2), action, f"run.dir={tmp_path}/unused")
    with pytest.raises(AssertionError, match="changed between"):
        assert_same(tmp_path / "one/checkpoints/step_00000001", tmp_path / "copy/step_00000001")


def test_other_cuts_of_the_pattern_are_the_same_run(under, tmp_path):
    """A `|` says who holds a layer, and changes no weight."""
    pattern = 'model.pattern="{}"'
    words = f"run.dir={tmp_path}/run", "train.steps=3"
    under(Layout(pipeline=2), run, *words, "train.stop_at=1", pattern.format("M*|E-/*E"))
    under(Layout(pipeline=4), run, *words, "train.stop_at=2", pattern.format("M|*|E-|/*E"))
    under(Layout(), run, *words, pattern.format("M*E-/*E"))
    under(Layout(), run, f"run.dir={tmp_path}/one", "train.steps=3", pattern.format("M*E-/*E"))
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_random_streams_are_seeded_anew_under_another_layout(under, tmp_path):
    under(Layout(data=2), run, f"run.dir={tmp_path}/run", "train.steps=2", "train.stop_at=1")
    path = tmp_path / "run/checkpoints/step_00000001"
    assert read_state(path)["layout"] == {"data": 2, "tensor": 1, "sequence": 0}

    def resume(config, context) -> None:
        Trainer(config, context, []).resume()
        drawn = torch.rand(2)
        RandomStreams(context, config.run.seed).start(1)
        assert torch.equal(drawn, torch.rand(2))

    under(Layout(tensor=2), resume, f"run.dir={tmp_path}/run", "train.steps=2")


def test_tensor_ranks_draw_the_same_numbers_and_data_ranks_others(under, tmp_path):
    def draw(config, context) -> None:
        RandomStreams(context, config.run.seed).start()
        (tmp_path / f"{context.data.rank}{context.tensor.rank}").write_text(str(torch.rand(2).tolist()))

    under(Layout(tensor=2, data=2, sequence=True), draw)
    drawn = {file.name: file.read_text() for file in tmp_path.iterdir() if file.is_file()}
    assert drawn["00"] == drawn["01"] != drawn["10"] == drawn["11"]
