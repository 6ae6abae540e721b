"""The run's side of the kernel canary: what is compared when, that a fault ends the run on every rank, what is remembered.

The "Triton" kernels here are the twins, with and without a fault; tests/kernels has the real ones.
"""

import json
import os
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nemohybrid.config.kernels import KernelsSection
from nemohybrid.config.model import AttentionConfig
from nemohybrid.config.run_config import RunConfig
from nemohybrid.errors import TrainingError
from nemohybrid.model import HybridModel
from nemohybrid.model.attention import Attention
from nemohybrid.model.kernels import bind_kernels
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.train import canary, canary_cases
from nemohybrid.train.canary_cases import Calls, cases_of
from nemohybrid.train.run import run
from nemohybrid_kernels import activation, conv1d, launching, mixer, norm, packages, ssd
from nemohybrid_kernels import canary as kernel_canary
from nemohybrid_kernels.attention import blocks, flex, parts
from nemohybrid_kernels.backend import Backend
from nemohybrid_kernels.canary import check
from nemohybrid_kernels.conv1d.reference import causal_conv1d_torch
from nemohybrid_kernels.documents import document_starts
from nemohybrid_kernels.mixer.reference import mamba2_mixer_torch
from nemohybrid_kernels.norm import reference as norm_reference
from nemohybrid_kernels.ssd.reference import ssd_chunked

pytest.importorskip("triton")  # backends that are to be replaced exist only then
CPU = torch.device("cpu")
FUSED = ("kernels.mixer_backend=separate", "kernels.ssd_backend=triton")
ALL_TRITON = {f"{name}_backend": "triton" for name in ("ssd", "conv1d", "norm", "activation")}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """The user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/nemohybrid/canary"


@pytest.fixture(autouse=True)
def kernels_that_are_right(monkeypatch):
    """And fast: the interpreter is for tests/kernels."""
    monkeypatch.setattr(ssd, "_triton", ssd_chunked)
    monkeypatch.setattr(conv1d, "_triton", causal_conv1d_torch)
    monkeypatch.setattr(mixer, "_triton", lambda *given, recompute, **more: mamba2_mixer_torch(*given, **more))
    monkeypatch.setattr(activation, "_triton", activation.squared_relu_torch)
    twins = {"rms_norm_triton": norm_reference.rms_norm, "gated_rms_norm_triton": norm_reference.gated_rms_norm}
    monkeypatch.setattr(norm, "_triton", lambda name, *sizes: Backend(twins[name], reluctance=launching.reluctance))


@pytest.fixture
def break_scan(monkeypatch) -> Callable[[], None]:
    def wrong(*given: Tensor, **more: Tensor) -> tuple[Tensor, Tensor]:
        y, state = ssd_chunked(*given, **more)
        return y * 1.3, state

    return lambda: monkeypatch.setattr(ssd, "_triton", wrong)


@pytest.fixture
def checked(monkeypatch) -> list[str]:
    """Names of the cases that were compared."""
    names: list[str] = []

    def counted(case: kernel_canary.Case, device: torch.device) -> None:
        names.append(case.operator)
        check(case, device)

    monkeypatch.setattr(canary, "check", counted)
    return names


def cases(model: HybridModel, device=CPU, packed=True, **backends: str) -> list[kernel_canary.Case]:
    bind_kernels(model, KernelsSection(**backends), CPU, torch.float32, packed)
    return cases_of(model, Calls.of(torch.float32, device, packed, 8))


def test_a_run_compares_its_fused_kernels_once_and_says_so(configure, checked, cache, capsys):
    run(configure(*FUSED), ParallelContext.single())
    assert checked == ["ssd_scan"]
    assert "kernels agree with their twins: ssd_scan triton (" in capsys.readouterr().out
    (file,) = cache.iterdir()
    record = json.loads(file.read_text())
    assert record["machine"]["torch"] == torch.__version__
    (name,) = record["passed"]
    assert name.startswith("ssd_scan triton: ")
    run(configure(*FUSED, "resume=never", "run.dir=" + str(cache / "again")), ParallelContext.single())
    assert checked == ["ssd_scan"], "the second run asked again"
    assert "twins" not in capsys.readouterr().out


def test_nothing_is_compared_and_nothing_said_where_all_is_pytorch(configure, checked, cache, capsys):
    run(configure("train.steps=1", "kernels.canary=always"), ParallelContext.single())
    run(configure("train.steps=2", "kernels.canary=skip"), ParallelContext.single())
    told = capsys.readouterr().out
    assert not checked
    assert not cache.exists()
    assert "twin" not in told
    assert "canary" not in told


def test_a_wrong_kernel_ends_the_run_before_its_first_step(configure, break_scan, cache, tmp_path):
    break_scan()
    with pytest.raises(TrainingError) as caught:
        run(configure(*FUSED), ParallelContext.single())
    told = str(caught.value)
    assert "ssd_scan triton: " in told
    assert "output is off by 0.3 of its largest entry, where" in told
    assert "kernels.ssd_backend=torch trains without it" in told
    assert f"torch {torch.__version__}" in told
    assert not list(tmp_path.glob("run/checkpoints/step*")), "a step was trained"
    assert not cache.exists(), "what failed must be asked again"


def test_what_was_passed_does_not_hide_a_new_version(configure, checked, break_scan, monkeypatch):
    run(configure(*FUSED, "train.steps=1"), ParallelContext.single())
    monkeypatch.setattr(canary, "machine", lambda device: {"kernels": "edited since"})
    break_scan()
    with pytest.raises(TrainingError, match="kernels edited since"):
        run(configure(*FUSED, "train.steps=2"), ParallelContext.single())
    assert checked == ["ssd_scan"] * 2


def test_only_cases_that_are_new_are_compared(tiny_model, checked, configure):
    config = configure(*FUSED)
    model = tiny_model("M")
    cases(model, ssd_backend="triton", mixer_backend="separate")
    canary.check_kernels(model, config, CPU)
    cases(model, ssd_backend="triton", conv1d_backend="triton", mixer_backend="separate")
    canary.check_kernels(model, config, CPU)
    assert checked == ["ssd_scan", "causal_conv1d"]


def test_always_compares_again(configure, checked):
    for steps in (1, 2):
        run(configure(*FUSED, "kernels.canary=always", f"train.steps={steps}"), ParallelContext.single())
    assert checked == ["ssd_scan"] * 2


def test_skip_trains_with_a_wrong_kernel_and_warns(configure, break_scan, checked, capsys):
    break_scan()
    trainer = run(configure(*FUSED, "kernels.canary=skip", "train.steps=1"), ParallelContext.single())
    assert trainer.step == 1
    assert not checked
    assert "warning: kernels.canary=skip: nobody knows whether ssd_scan triton compute" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "{", '{"passed": 1, "machine": 2}', "[]", "null", b"\xff\xfe"], ids=repr)
def test_a_damaged_record_counts_as_none(content, cache):
    passed = canary.Passed({"device": "one"})
    passed.add(["a case"])
    passed.file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert passed.names() == []
    assert passed.add(["a case"]) == []
    assert passed.names() == ["a case"]


def test_a_cache_that_cannot_be_written_is_a_warning(configure, cache, capsys):
    cache.parent.parent.mkdir()
    cache.parent.write_text("a file where the folder should be")
    assert run(configure(*FUSED, "train.steps=1"), ParallelContext.single()).step == 1
    assert "warning: they will be compared again next time" in capsys.readouterr().out


def test_many_processes_may_write_one_record(cache, run_child):
    passed = canary.Passed({"device": "one"})
    children = [lambda n=n: passed.add([f"case {n}"]) for n in range(4)]
    assert [run_child(child) for child in children] == [0] * 4
    assert passed.names() == [f"case {n}" for n in range(4)]
    assert [file.suffix for file in cache.iterdir()] == [".json"]
    assert canary.Passed({"device": "another"}).names() == []


def test_the_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        assert canary.cache_folder() == tmp_path / ".cache/nemohybrid/canary"


def test_a_kernel_that_is_wrong_on_one_rank_ends_all(tiny_model, configure, break_scan, run_ranks, capfd):
    config: RunConfig = configure(*FUSED)
    model = tiny_model("M")
    cases(model, ssd_backend="triton", mixer_backend="separate")

    def member(context: ParallelContext) -> None:
        os.environ["XDG_CACHE_HOME"] += f"/{context.rank}"
        if context.rank == 1:
            break_scan()
        with pytest.raises(TrainingError, match=r"^rank 1: a kernel computes something else[^$]*ssd_scan triton"):
            canary.check_kernels(model, config, CPU)

    assert run_ranks(member) == ["", ""]
    assert "a kernel computes something else" in capfd.readouterr().err, "the rank itself says it too"


def attention_through_a_package(model: HybridModel, packed: bool) -> kernel_canary.Case:
    """Of a package that is not here."""
    layer = next(module for module in model.modules() if isinstance(module, Attention))
    layer.backend = "flash3"
    return canary_cases.attention_case(layer, Calls.of(torch.float32, CPU, packed, 8))


def loss_of_another_backend(model: HybridModel, packed: bool) -> kernel_canary.Case:
    """Whose cases are made for fused kernels only; the chunked one in PyTorch takes their place."""
    model.output.backend = "torch"
    return canary_cases.loss_case(model.output, Calls.of(torch.float32, CPU, packed, 8))


def test_every_fused_operator_of_a_model_has_a_case_that_its_twin_passes(tiny_model):
    """With and without documents; sizes of the model are those of the case."""
    model = tiny_model("M*-ME")
    for packed in (True, False):
        fused = cases(model, packed=packed, mixer_backend="triton", **ALL_TRITON)
        fused.append(attention_through_a_package(model, packed))
        fused.append(loss_of_another_backend(model, packed))
        named = {case.operator: case for case in fused}
        assert {*named} == {"rms_norm", "mamba2_mixer", "squared_relu", "attention", "cross_entropy"}
        assert len(fused) == len(named) + 2, "two layers of one size are one case"
        widths = [case.sizes.partition(" ")[0] for case in fused if case.operator == "squared_relu"]
        assert widths == ["40", "14", "18"], "of the MLP, the experts and the shared expert"
        parts = {c.operator: c for c in cases(model, packed=packed, mixer_backend="separate", **ALL_TRITON)}
        assert {*parts} == {"rms_norm", "ssd_scan", "causal_conv1d", "gated_rms_norm", "squared_relu"}
        assert parts["ssd_scan"].sizes.startswith("4 heads of 6, 2 groups, state 5")
        for case in (named | parts).values():
            check(case if case.operator != "attention" else replace(case, run=case.twin), CPU)
        with_documents = {name for name, case in (named | parts).items() if "document_ids" in case.inputs()}
        assert with_documents == ({"mamba2_mixer", "ssd_scan", "causal_conv1d", "attention"} if packed else set())


def test_a_mixer_that_recomputes_is_compared_recomputing(tiny_model, monkeypatch):
    asked = []

    def recording(*given: Tensor, recompute: bool, **more) -> Tensor:
        asked.append(recompute)
        return mamba2_mixer_torch(*given, **more)

    monkeypatch.setattr(mixer, "_triton", recording)
    model, names = tiny_model("M"), set()
    for recompute in (False, True):
        found = cases(model, mixer_backend="triton", mixer_recompute=recompute, **ALL_TRITON)
        (case,) = [case for case in found if case.operator == "mamba2_mixer"]
        check(case, CPU)
        names.add(case.name)
    assert asked == [False, True]
    assert len(names) == 2, "who passed one has not passed the other"


def test_on_a_gpu_the_kernels_of_pytorch_are_compared_too(tiny_model):
    model = tiny_model("*E", moe_top_k=2)
    assert not cases(model)
    found = {case.operator: case for case in cases(model, device=torch.device("cuda"), attention_backend="sdpa")}
    assert {*found} == {"attention", "expert_mlp"}
    for case in found.values():
        check(case, CPU)
    ids = found["expert_mlp"].inputs()["expert_ids"]
    assert len(ids.unique()) == 5, "one of six experts is to have no tokens"


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
def test_a_ring_is_compared_by_what_it_joins(tiny_model, packed, monkeypatch):
    """In place of attention at once, which its training steps do not call."""
    model = tiny_model("*")
    for layer in (module for module in model.modules() if isinstance(module, Attention)):
        layer.rings = True
    (case,) = cases(model, torch.device("cuda"), packed)
    assert case.name.startswith("ring_attention sdpa: 4 heads of 10, 2 of keys, rows of ")
    check(case, CPU)
    real = parts.GRADIENTS["sdpa"]
    monkeypatch.setitem(parts.GRADIENTS, "sdpa", lambda q, keys, *whole: (*real(q, keys, *whole)[:2], keys.v))
    with pytest.raises(kernel_canary.KernelMismatch, match="gradient of v is off"):
        check(case, CPU)


def test_a_wrong_activation_is_found_in_feed_forward_layers_and_in_experts(tiny_model, monkeypatch):
    monkeypatch.setattr(activation, "_triton", lambda h: 1.3 * activation.squared_relu_torch(h))
    chosen = {"activation_backend": "triton", "moe_backend": "grouped"}
    found = cases(tiny_model("-E"), device=torch.device("cuda"), **chosen)
    suspects = [case for case in found if case.operator in ("squared_relu", "expert_mlp")]
    assert len(suspects) == 4
    for case in suspects:
        with pytest.raises(kernel_canary.KernelMismatch, match=r"output is off by 0\.3"):
            check(case, CPU)


def flex_by_definition(q, k, v, *, score_mod, block_mask, scale, enable_gqa, kernel_options):
    """FlexAttention, with the backward pass that PyTorch's has on GPUs alone. Blocks that are not listed are not seen, and
    the mask is asked only in those listed as cut."""
    _, H, L, P = q.shape
    see = torch.zeros(block_mask.shape[0], 1, L, L, dtype=torch.bool)
    cut = block_mask.kv_num_blocks, block_mask.kv_indices, block_mask.mask_mod
    whole = block_mask.full_kv_num_blocks, block_mask.full_kv_indices, lambda *_: True
    for counts, indices, mask in (cut, whole):
        for b, _, i in torch.cartesian_prod(*map(torch.arange, counts.shape)).tolist():
            for j in indices[b, 0, i, : counts[b, 0, i]].tolist():
                at, seen = (slice(block * blocks.BLOCK, (block + 1) * blocks.BLOCK) for block in (i, j))
                see[b, 0, at, seen] = mask(b, 0, torch.arange(L)[at, None], torch.arange(L)[seen])
    k, v = (heads.repeat_interleave(H // heads.shape[1], 1) for heads in (k, v))
    scores = q @ k.mT * (scale or P**-0.5)
    scores = scores if score_mod is None else score_mod(scores, 0, 0, 0, 0)
    return scores.masked_fill(~see, -torch.inf).softmax(-1) @ v


@pytest.fixture
def flex_case(tiny_model, monkeypatch):
    """Of a model whose backend is what "auto" takes on a GPU without packages."""
    packages.forget()
    monkeypatch.setattr(packages, "find_spec", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(launching, "TRITON", True)

    def made(packed: bool, softcap: float | None, row: int) -> kernel_canary.Case:
        model = tiny_model("*", head_dim=16, attention=AttentionConfig(softcap=softcap))
        bind_kernels(model, KernelsSection(), torch.device("cuda"), torch.float32, packed)
        calls = Calls.of(torch.float32, torch.device("cuda"), packed, 8, row)
        (case,) = (case for case in cases_of(model, calls) if case.operator == "attention")
        monkeypatch.setattr(flex, "obstacle", lambda case, device: None)
        monkeypatch.setattr(flex, "_attend", lambda compiled: (flex_by_definition, None))
        return case

    yield made
    packages.forget()


@pytest.mark.parametrize("packed, softcap", [(True, None), (True, 2.0), (False, 2.0)])
@pytest.mark.parametrize("row, length", [(4096, 384), (1000, 301)])
def test_flexattention_is_compared_over_blocks_of_each_kind(flex_case, packed, softcap, row, length):
    case = flex_case(packed, softcap, row)
    assert case.backend == "flex"
    inputs = case.inputs()
    assert inputs["q"].shape[1] == length
    assert (length % blocks.BLOCK == 0) == (row % blocks.BLOCK == 0)
    if packed:
        listed = blocks.block_mask(document_starts(inputs["document_ids"]))
        cut, whole = listed.kv_num_blocks.sum(), listed.full_kv_num_blocks.sum()
        assert cut > 0
        assert whole > 0
        assert cut + whole < 2 * 6, "none of the pairs of blocks is skipped"
    check(case, CPU)


def test_flexattention_that_forgets_documents_is_found(flex_case, monkeypatch):
    case, right = flex_case(True, None, 4096), blocks.block_mask
    monkeypatch.setattr(blocks, "block_mask", lambda starts: right(torch.zeros_like(starts)))
    with pytest.raises(kernel_canary.KernelMismatch, match=r"attention flex: .* output is off by"):
        check(case, CPU)


def test_the_key_that_avoids_a_kernel_is_named_for_every_operator():
    section = KernelsSection()
    for key, instead in canary.KEYS.values():
        setattr(section, key, instead)
    source = canary_cases.__file__
    for operator in (
        "mamba2_mixer",
        "ssd_scan",
        "causal_conv1d",
        "rms_norm",
        "gated_rms_norm",
        "squared_relu",
        "attention",
        "ring_attention",
        "expert_mlp",
    ):
        assert operator in canary.KEYS, f"{source} makes cases of it"


def test_large_models_are_cut_down(tiny_config):
    """Memory of a case must not follow the number of experts."""
    config = tiny_config("E", num_experts=64, moe_top_k=3)
    with torch.device("meta"):
        model = HybridModel(config, ParallelContext.single())
    found = cases_of(model, Calls.of(torch.float32, torch.device("cuda"), False, 8))
    (case,) = (case for case in found if case.operator == "expert_mlp")
    assert case.inputs()["up"].shape[0] == canary_cases.MOST_EXPERTS
