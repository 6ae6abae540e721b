"""Compiling recorded launches for a GPU that is not there, and reading off what they take of it.

A launch is specialised by Triton's own launcher, so what is compiled here is what a GPU would be given. Registers and spills
are those that ptxas reports for the very binary. Nothing here works under TRITON_INTERPRET=1, which leaves no compiler.
"""

import hashlib
import io
import json
import os
import re
import tempfile
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from nemohybrid_kernels.launching import Config, Launch, compiler_options, interpreted

INSTRUCTIONS = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
"""The fastest product of matrices of an architecture."""

SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes a program may have. An A100 has 163 KB, but the column of sm_80 also serves sm_86, sm_89 and sm_120, with 99 KB (CUDA C
Programming Guide, table of compute capabilities)."""


@dataclass(frozen=True)
class Compilation:
    """All that decides the binary of a kernel, as plain data: `kernel` is "module:name"."""

    kernel: str
    architecture: int
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any] = field(repr=False)
    attributes: dict[tuple[int, ...], Any] = field(repr=False)
    config: Config

    @property
    def name(self) -> str:
        return self.kernel.partition(":")[2]

    @property
    def dtype(self) -> str:
        """The type of the inputs, as the table calls it: bf16 wherever there is any."""
        return "bf16" if "*bf16" in self.signature.values() else "fp32"

    @property
    def sizes(self) -> dict[str, int]:
        """The constexpr arguments that are numbers: tiles, and widths of the call."""
        names = list(self.signature)
        constants = {names[path[0]]: value for path, value in self.constants.items()}
        return {name: value for name, value in constants.items() if name.isupper() and type(value) is int}

    @cached_property
    def key(self) -> str:
        """Of the binary: the source of the kernel and of all that it calls, the specialisation, and the compiler."""
        options = [self.architecture, compiler_options(self.config), triton.__version__, FORMAT]
        return hashlib.sha256(f"{_source(self).hash()} {options}".encode()).hexdigest()


@dataclass(frozen=True)
class Resources:
    """Of one program (`shared`) and one thread (`registers`, and spills: bytes in the code, not bytes moved).

    `dots` are the products in Triton's own representation, `instructions` the tensor-core instructions in the PTX. Triton
    turns fp32 products, three of TF32 each, into wgmma or tcgen05 where tiles are large enough, and into mma.sync elsewhere:
    for fp32 any will do.
    """

    registers: int
    spill_stores: int
    spill_loads: int
    shared: int
    dots: int
    instructions: dict[str, int]

    def faults(self, architecture: int, dtype: str) -> list[str]:
        """Why a configuration with these must not be shipped."""
        found = []
        if self.spill_stores or self.spill_loads:
            found.append(f"it spills registers: {self.spill_stores} bytes stored, {self.spill_loads} loaded")
        if self.shared > SHARED_LIMIT[architecture]:
            found.append(f"it takes {self.shared} bytes of shared memory, of {SHARED_LIMIT[architecture]}")
        wanted = [INSTRUCTIONS[architecture]] if dtype == "bf16" else list(INSTRUCTIONS.values())
        if self.dots and not any(self.instructions[name] for name in wanted):
            found.append(f"its {self.dots} products became no {' or '.join(wanted)}")
        return found


FORMAT = 1
"""Of what is kept on disk."""


def compilation_of(launch: Launch, architecture: int) -> Compilation:
    """What Triton would compile for a launch on sm_`architecture`."""
    if interpreted() or not isinstance(launch.kernel, JITFunction):
        raise RuntimeError("Kernels cannot be compiled under TRITON_INTERPRET=1; start the process without it.")
    backend = make_backend(GPUTarget("cuda", architecture, 32))
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    given = {**launch.arguments, **launch.config.tiles, **compiler_options(launch.config)}
    bound, specialization, rest = bind(**given)
    _, signature, constants, attributes = launch.kernel._pack_args(backend, given, bound, specialization, rest)
    kernel = f"{launch.kernel.fn.__module__}:{launch.kernel.fn.__qualname__}"
    return Compilation(kernel, architecture, signature, constants, attributes, launch.config)


def compile_launch(launch: Launch, architecture: int) -> Resources:
    return resources_of(compilation_of(launch, architecture))


def resources_of(compilation: Compilation) -> Resources:
    """From the folder of earlier results, or by compiling: 1 to 20 s."""
    file = cache_folder() / f"{compilation.key}.json"
    if file.exists():
        return Resources(**json.loads(file.read_text(encoding="utf-8")))
    found = _compile(compilation)
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as out:
        json.dump(asdict(found), out)
    Path(out.name).replace(file)
    return found


def cache_folder() -> Path:
    """NEMOHYBRID_COMPILED, or a folder of the user's cache."""
    if folder := os.environ.get("NEMOHYBRID_COMPILED"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nemohybrid" / "compiled"


def _compile(compilation: Compilation) -> Resources:
    """What Triton keeps of it is thrown away: ptxas must speak."""
    log = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope(), knobs.nvidia.scope(), redirect_stdout(log):
        knobs.cache.dir, knobs.nvidia.dump_ptxas_log = folder, True
        target = GPUTarget("cuda", compilation.architecture, 32)
        kernel = triton.compile(_source(compilation), target=target, options=compiler_options(compilation.config))
        return _read(kernel, log.getvalue())


def _read(kernel: Any, log: str) -> Resources:
    """The log has a line for every function; most kernels are one."""
    ptx, ttir = kernel.asm["ptx"], str(kernel.asm["ttir"])
    return Resources(
        registers=max(_numbers(r"Used (\d+) registers", log)),
        spill_stores=sum(_numbers(r"(\d+) bytes spill stores", log)),
        spill_loads=sum(_numbers(r"(\d+) bytes spill loads", log)),
        shared=kernel.metadata.shared,
        dots=len(re.findall(r"\btt\.dot\b", ttir)),
        instructions={name: len(re.findall(re.escape(name) + r"[.\s]", ptx)) for name in INSTRUCTIONS.values()},
    )


def _numbers(pattern: str, log: str) -> list[int]:
    found = [int(number) for number in re.findall(pattern, log)]
    if not found:
        raise RuntimeError(f"ptxas said nothing like {pattern!r}:\n{log}")
    return found


def _source(compilation: Compilation) -> ASTSource:
    return ASTSource(_kernel(compilation.kernel), compilation.signature, compilation.constants, compilation.attributes)


@cache
def _kernel(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)
