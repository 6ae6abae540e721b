"""Transformer Engine 2.20 as we call it: its recipes, `autocast` and `Linear` with their real signatures, on a CPU.

It refuses what the real one refuses, and computes what it is given in plain numbers. `calls` is what was multiplied, with the
recipes of the regions around it, the outermost first; `renewed` counts ends of outermost regions.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class _Maxima(NamedTuple):
    max_fwd: float
    max_bwd: float


class Format(Enum):
    E2M1 = _Maxima(6, 6)
    E4M3 = _Maxima(448, 448)
    E5M2 = _Maxima(57344, 57344)
    HYBRID = _Maxima(448, 57344)


@dataclass(frozen=True)
class MMParams:
    use_split_accumulator: bool = True


@dataclass(frozen=True)
class QParams:
    power_2_scale: bool = False
    amax_epsilon: float = 0.0
    random_hadamard_transform: bool = False
    stochastic_rounding: bool = False
    fp4_2d_quantization: bool = False


class Recipe:
    pass


# Defaults are such as an environment may have set: whoever leaves a field to them is found out.


@dataclass
class DelayedScaling(Recipe):
    margin: int = 7
    fp8_format: Format = Format.E4M3
    amax_history_len: int = 1
    amax_compute_algo: str | Callable = "most_recent"
    scaling_factor_compute_algo: Callable | None = len
    reduce_amax: bool = True
    fp8_dpa: bool = True
    fp8_mha: bool = True
    backward_override: str | None = "dequantized"

    def __post_init__(self) -> None:
        assert self.backward_override is None, "Delayed scaling only supports backward_override=None."


@dataclass
class Float8CurrentScaling(Recipe):
    use_power_2_scales: bool = True
    fp8_format: Format = Format.E4M3
    fp8_quant_fwd_inp = QParams(power_2_scale=True)
    fp8_quant_fwd_weight = QParams(power_2_scale=True)
    fp8_quant_bwd_grad = QParams(power_2_scale=True)
    fp8_gemm_fprop: MMParams = MMParams(True)
    fp8_gemm_dgrad: MMParams = MMParams(False)
    fp8_gemm_wgrad: MMParams = MMParams(False)
    fp8_dpa: bool = True
    fp8_mha: bool = True
    backward_override: str | None = "dequantized"


@dataclass
class Float8BlockScaling(Recipe):
    use_f32_scales: bool = True
    fp8_format: Format = Format.HYBRID
    fp8_quant_fwd_inp = QParams()
    fp8_quant_fwd_weight = QParams()
    fp8_quant_bwd_grad = QParams()
    x_block_scaling_dim: int = 2
    w_block_scaling_dim: int = 1
    grad_block_scaling_dim: int = 2
    fp8_gemm_fprop: MMParams = MMParams(False)
    fp8_gemm_dgrad: MMParams = MMParams(False)
    fp8_gemm_wgrad: MMParams = MMParams(False)
    fp8_dpa: bool = True
    fp8_mha: bool = True
    backward_override: str | None = "dequantized"

    def __post_init__(self) -> None:
        twos = [self.x_block_scaling_dim, self.w_block_scaling_dim, self.grad_block_scaling_dim].count(2)
        assert twos < 2, "2D by 2D block gemm not supported."
        for product in (self.fp8_gemm_fprop, self.fp8_gemm_dgrad, self.fp8_gemm_wgrad):
            assert product.use_split_accumulator, "Split accumulator required."
        assert not self.fp8_dpa
        assert not self.fp8_mha


@dataclass
class MXFP8BlockScaling(Recipe):
    margin: int = 7
    fp8_format: Format = Format.HYBRID
    enable_2d_quantization: bool = True
    fp8_dpa: bool = True
    fp8_mha: bool = True
    backward_override: str | None = "dequantized"


@dataclass
class NVFP4BlockScaling(Recipe):
    disable_rht: bool = True
    disable_stochastic_rounding: bool = True
    disable_2d_quantization: bool = True
    row_scaled_activation: bool = True
    nvfp4_4over6: str = "all"
    nvfp4_4over6_e4m3_use_256: str = "none"
    nvfp4_4over6_err_mode: str = "MSE"
    fp4_format: Format = Format.E2M1
    fp8_format: Format = Format.E4M3
    fp8_dpa: bool = True
    fp8_mha: bool = True
    backward_override: str | None = "dequantized"


class Call(NamedTuple):
    regions: tuple[Recipe, ...]
    is_first_microbatch: bool | None
    rows: int
    dtype: torch.dtype
    trains: bool


class Engine:
    """One fake installation. `lacking`: predicates -> why the hardware does not have it."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.regions: list[Recipe] = []
        self.renewed = 0
        self.lacking: dict[str, str] = {}
        self.linears: list[torch.nn.Module] = []

    def predicate(self, name: str) -> Callable[..., Any]:
        def available(return_reason: bool = False) -> bool | tuple[bool, str]:
            answer = name not in self.lacking, self.lacking.get(name, "")
            return answer if return_reason else answer[0]

        return available

    @contextmanager
    def autocast(
        self,
        enabled: bool = True,
        calibrating: bool = False,
        recipe: Recipe | None = None,
        amax_reduction_group: Any = None,
        _graph: bool = False,
    ) -> Iterator[None]:
        assert enabled
        assert not calibrating
        assert isinstance(recipe, Recipe), "a default recipe depends on the machine"
        self.regions.append(recipe)
        try:
            yield
        finally:
            self.regions.pop()
            self.renewed += not self.regions

    @contextmanager
    def fp8_autocast(
        self,
        enabled: bool = True,
        calibrating: bool = False,
        fp8_recipe: Recipe | None = None,
        fp8_group: Any = None,
        _graph: bool = False,
    ) -> Iterator[None]:
        with self.autocast(enabled, calibrating, fp8_recipe, fp8_group, _graph):
            yield

    def linear(self) -> type[torch.nn.Module]:
        engine = self

        class Linear(torch.nn.Module):
            def __init__(
                self,
                in_features: int,
                out_features: int,
                sequence_parallel: bool = False,
                fuse_wgrad_accumulation: bool = False,
                tp_group: Any = None,
                tp_size: int = 1,
                get_rng_state_tracker: Callable | None = None,
                rng_tracker_name: str | None = None,
                init_method: Callable | None = None,
                bias: bool = True,
                return_bias: bool = False,
                params_dtype: torch.dtype | None = None,
                parallel_mode: str | None = None,
                parameters_split: Any = None,
                device: torch.device | str = "cuda",
                ub_overlap_ag: bool = False,
                ub_overlap_rs: bool = False,
                ub_overlap_rs_dgrad: bool = False,
                ub_bulk_dgrad: bool = False,
                ub_bulk_wgrad: bool = False,
                ub_name: str | None = None,
                delay_wgrad_compute: bool = False,
                symmetric_ar_type: str | None = None,
                save_original_input: bool = False,
                name: str | None = None,
            ) -> None:
                super().__init__()
                assert str(device) == "meta", "there is no GPU, and no memory to spare"
                assert not bias
                assert not fuse_wgrad_accumulation
                self.weight_names, self.quantized, self.trained = ["weight"], None, False
                self.weight = torch.nn.Parameter(torch.empty(out_features, in_features, device=device))
                engine.linears.append(self)

            def forward(
                self,
                inp: Tensor,
                is_first_microbatch: bool | None = None,
                fp8_output: bool | None = False,
                fp8_grad: bool | None = False,
            ) -> Tensor:
                (weight,) = (getattr(self, name) for name in self.weight_names)
                for parameter in self.parameters():
                    assert parameter.dtype == inp.dtype, "Data types for parameters must match"
                assert len(inp) % 16 == 0, "FP8 needs multiples of 16"
                assert engine.regions, "not quantized"
                trains = torch.is_grad_enabled()
                if is_first_microbatch is None or is_first_microbatch:
                    self.quantized, self.trained = weight.detach().clone(), trains
                assert self.trained or not trains, "what was quantized without gradients has no transpose"
                assert torch.equal(self.quantized, weight), "an old weight is multiplied"
                engine.calls.append(Call(tuple(engine.regions), is_first_microbatch, len(inp), weight.dtype, trains))
                return F.linear(inp, weight)

        return Linear

    def install(self, monkeypatch: Any, old: bool = False) -> None:
        """old: before 2.10, with `fp8_autocast`."""
        recipes: dict[str, Any] = {
            thing.__name__: thing
            for thing in (
                Format,
                MMParams,
                QParams,
                DelayedScaling,
                Float8CurrentScaling,
                Float8BlockScaling,
                MXFP8BlockScaling,
                NVFP4BlockScaling,
            )
        }
        names = ("is_fp8_available", "is_mxfp8_available", "is_fp8_block_scaling_available", "is_nvfp4_available")
        pytorch = {name: self.predicate(name) for name in names} | {"Linear": self.linear()}
        pytorch |= {"fp8_autocast": self.fp8_autocast} if old else {"autocast": self.autocast}
        contents = {"": {"__version__": "2.20.2"}, ".pytorch": pytorch, ".common": {}, ".common.recipe": recipes}
        for suffix, things in contents.items():
            module = ModuleType(f"transformer_engine{suffix}")
            module.__spec__, module.__path__ = ModuleSpec(module.__name__, None), []
            vars(module).update(things)
            monkeypatch.setitem(sys.modules, module.__name__, module)
