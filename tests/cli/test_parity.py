"""`nemohybrid parity`: its words, what it compares, and the faults that it must see. `tests/parallel` proves the layouts."""

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch.distributed.device_mesh
import torch.distributed.fsdp
import torch.distributed.tensor  # slow imports, once, before ranks are forked
from forked import run_world
from layouts import Layout, run_config

from nemohybrid.cli.parity import completed, composed, parser
from nemohybrid.cli.parity_report import verdict
from nemohybrid.errors import ConfigError
from nemohybrid.parallel import gradients
from nemohybrid.parallel.context import Group, ParallelContext
from nemohybrid.train import parity
from nemohybrid.train.parity import Comparison, Difference, compare, off_by

TOLERANCE = 1e-5
SMALL = ["model=tiny", "model.hidden_size=32", "model.ssm_state_size=8", 'model.pattern="M-*"', "run.device=cpu"]
TP2_SP = Layout(tensor=2, sequence=True)


@pytest.fixture
def faults(tmp_path) -> Callable[..., list[str]]:
    """`faults(layout, plant)`: what every rank says of two steps under a layout, after `plant()` in each."""

    def run(layout: Layout, plant: Callable[[], object] = lambda: None) -> list[str]:
        world, told = tmp_path / "world", tmp_path / "told"
        world.mkdir()
        told.mkdir()
        config = layout.configured(run_config(rows=2 * layout.data))
        config.model = replace(config.model, pattern="M*-E", chunk_size=16)

        def member(rank: int) -> None:
            plant()
            comparison = compare(config, layout.of_this_rank(), steps=2)
            assert len(comparison.tensors) > 50
            (told / str(rank)).write_text(json.dumps(comparison.faults(TOLERANCE)))

        failures = run_world(layout.ranks, member, world)
        assert not failures, failures[0].read_text()
        first, *others = (json.loads(file.read_text()) for file in sorted(told.iterdir()))
        assert all(other == first for other in others), "ranks do not agree on what is wrong"
        return first

    return run


def test_the_command_starts_its_ranks_and_finds_that_the_layout_equals_one(fresh, empty_folder):
    words = [*SMALL, "parallel.tensor=2", "parallel.data=1", "data.sequence_length=16"]
    done = fresh("-m", "nemohybrid", "parity", *words, "--top", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    first, *lines, last = done.stdout.splitlines()
    assert first.startswith("parity: tiny (M-*) under tensor 2 (sequence parallel) against one rank, 3 steps of 2 x 16")
    assert first.endswith("float32 on 2 x cpu")
    assert [line for line in lines if line.startswith("loss of step 3")]
    assert len([line for line in lines if "  gradient." in line or "  weight." in line]) == 3
    assert "tensors compared, worst" in last
    assert last.endswith("tolerance 1e-05: the layout equals one rank")
    assert list(empty_folder.iterdir()) == []


def test_tensor_times_sharded_ranks_equal_one(faults):
    assert faults(Layout(tensor=2, data=2, shard=2, sequence=True)) == []


def test_gradients_of_norms_that_are_not_summed_are_seen(faults):
    def plant():
        gradients.is_partial = lambda layout, context: False

    found = faults(TP2_SP, plant)
    assert any(fault.startswith("gradient.layers.0.norm.weight: off by") for fault in found), found
    assert any(fault.startswith("gradient norm of step 1: ") for fault in found), found
    assert not any(fault.startswith("gradient.layers.0.mixer.out_proj.weight") for fault in found), found


def test_first_values_in_the_wrong_place_are_seen(faults):
    def plant():
        from nemohybrid.model import init

        real = init.draw

        def of_the_neighbour(box, target, seed, name):
            begin, rows = box.offsets[0], box.piece.shape[0]
            begin = (begin + rows // 2) % rows if name == "output.weight" and box.shape[0] * 2 <= rows else begin
            real(replace(box, offsets=(begin, *box.offsets[1:])), target, seed, name)

        init.draw = of_the_neighbour

    found = faults(Layout(data=2, shard=2), plant)
    assert any(fault.startswith("weight.output.weight: off by") for fault in found), found
    assert any(fault.startswith("loss of step 1: ") for fault in found), found


def test_a_gradient_that_is_missing_on_one_of_two_ranks_is_seen(faults):
    def plant():
        real = parity.logical_parts

        def without(key, owner, tensor):
            gone = key == "final_norm.weight" and torch.distributed.get_rank() == 1
            return {} if gone else real(key, owner, tensor)

        parity.logical_parts = without

    assert faults(Layout(data=2, shard=2), plant) == [
        "gradient.final_norm.weight: ranks hold 12 of 24 elements",
    ]


def part(*covered, error=0.0, scale=1.0, name="gradient.w") -> Difference:
    return Difference(name, error, scale, (4, 6), frozenset(covered))


def test_boxes_must_cover_every_element_once():
    whole, upper, lower = ((0, 0), (4, 6)), ((0, 0), (2, 6)), ((2, 0), (2, 6))
    assert part(whole).fault(TOLERANCE) is None
    assert part(upper, lower).fault(TOLERANCE) is None
    assert "12 of 24" in part(upper).fault(TOLERANCE)
    assert "18 of 24" in part(upper, ((1, 0), (2, 6))).fault(TOLERANCE), "as many elements as there are, some twice"
    assert "overlaps" in part(whole, upper).fault(TOLERANCE)
    assert "no gradient" in part(whole, scale=0.0).fault(TOLERANCE)
    assert part(whole, scale=0.0, name="weight.w").fault(TOLERANCE) is None
    assert "off by 2.0e-05" in part(whole, error=2e-5).fault(TOLERANCE)
    assert "off by inf" in part(whole, error=float("inf")).fault(TOLERANCE)


def test_losses_without_a_target_are_equal_and_others_are_not():
    nan = float("nan")
    assert off_by(nan, nan) == 0
    assert [off_by(*pair) for pair in ((nan, 1.0), (1.0, nan), (1.0, 0.0))] == [float("inf")] * 3
    assert Comparison({"loss": (1.0, 1.1)}, {}, ["weight.x"]).faults(TOLERANCE) == [
        "loss: 1 and not 1.1",
        "weight.x: one rank has no such tensor",
    ]


def test_the_verdict_names_the_first_faults_and_what_to_do():
    config, args = TP2_SP.configured(run_config()), parser().parse_args(["--top", "1"])
    context = ParallelContext(torch.device("cpu"), world_size=2, tensor=Group(2), sequence=True)
    wrong = {name: part(((0, 0), (4, 6)), error=0.5, name=name) for name in ("gradient.a", "gradient.b")}
    args.tolerance = TOLERANCE
    text = "\n".join(verdict(Comparison({}, wrong, []), context, config, args))
    assert "2 tensors compared, worst 5.0e-01, tolerance 1e-05: the layout does NOT equal one rank, 2 faults" in text
    assert "gradient.a: off by 5.0e-01" in text
    assert "gradient.b" not in text
    assert "parallel.sequence=false, parallel.tensor=1, fewer symbols in model.pattern" in text
    config.model.dtype = "bfloat16"
    assert "--dtype float32" in "\n".join(verdict(Comparison({}, wrong, []), context, config, args))


def test_what_is_not_given_is_small_and_what_is_given_counts():
    config, ranks = composed(completed(["experiment=tiny_nemotron3_ultra", "parallel.tensor=2"], "float32"), None)
    assert (ranks, config.train.global_batch, config.train.microbatch, config.data.sequence_length) == (4, 4, 1, 64)
    assert config.model.dtype == "float32"
    words = ["parallel.data=3", "train.microbatch=2", "data.sequence_length=32", "optim.lr=0.5", "schedule=wsd"]
    config, ranks = composed(completed(words, "bfloat16"), None)
    assert (ranks, config.train.global_batch, config.data.sequence_length, config.optim.lr) == (3, 12, 32, 0.5)
    assert config.model.dtype == "bfloat16"
    assert composed(completed(["train.global_batch=32"], "float32"), 8)[0].train.global_batch == 32


def test_every_rule_holds_but_those_that_need_a_corpus():
    with pytest.raises(ConfigError, match=r"(?s)problems.*foo=1.*parallel\.tensor=8.*global_batch=7"):
        composed(completed([*SMALL, "foo=1", "parallel.tensor=8", "train.global_batch=7"], "float32"), None)


def test_a_corpus_that_is_named_must_be_there():
    with pytest.raises(ConfigError, match=r"nowhere\.bin"):
        composed(completed([*SMALL, "data.train=nowhere"], "float32"), 2)


@pytest.mark.parametrize("words", [["--ranks", "1"], ["parallel.data=1"]], ids=" ".join)
def test_one_rank_has_nothing_to_compare(nemohybrid, words):
    code, out, _ = nemohybrid("parity", *SMALL, *words)
    assert code == 2
    assert "nothing to compare" in out


@pytest.mark.parametrize(
    ("words", "status", "complaint"),
    [
        (["--tolerance", "2"], 2, "'2' is not a number between 0 and 1"),
        (["--ranks", "0"], 2, "'0' is not a whole number above 0"),
        (["--dtype", "float16"], 2, "float16"),
        (["--ranks", "3", "parallel.tensor=2"], 1, "does not make the 3 processes"),
        (["parallel.tensro=2"], 1, "Did you mean 'parallel.tensor'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_word_is_answered_with_a_sentence(nemohybrid, words, status, complaint):
    code, _, err = nemohybrid("parity", *SMALL, *words)
    assert (code, complaint in err) == (status, True), err


@pytest.mark.parametrize(("world", "complaint"), [("2", "leave --ranks out"), ("two", "is no number of processes")])
def test_ranks_are_not_asked_for_twice(nemohybrid, monkeypatch, world, complaint):
    monkeypatch.setenv("WORLD_SIZE", world)
    code, _, err = nemohybrid("parity", *SMALL, "--ranks", "3")
    assert code == 1
    assert complaint in err


def test_fewer_gpus_than_ranks_are_refused_before_any_rank_starts(nemohybrid, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    code, _, err = nemohybrid("parity", *SMALL, "run.device=auto", "--ranks", "2")
    assert code == 1
    assert "2 ranks need as many GPUs, and this machine has 1. Compare on the CPU with run.device=cpu" in err


def test_help_says_what_rank_zero_must_hold(nemohybrid):
    code, out, _ = nemohybrid("parity", "--help")
    assert code == 0
    assert "rank 0 must hold the whole model" in out
    assert out.count("parity model=") == 3
