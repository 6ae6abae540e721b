"""What importing nemohybrid must not import. import-linter cannot tell an import at the top of a file from one inside a
function, so the promise "imported where used" is kept here, by looking at what a fresh interpreter has loaded."""

import subprocess
import sys

import pytest

OPTIONAL = {"megatron", "wandb", "tensorboard", "transformers", "mamba_ssm", "causal_conv1d", "flash_attn", "apex"}
OPTIONAL |= {"transformer_engine"}

IMPORT_EVERYTHING_UNDER = """
import importlib, pkgutil, sys
for name in sys.argv[1:]:
    module = importlib.import_module(name)
    for found in pkgutil.walk_packages(getattr(module, "__path__", []), f"{name}."):
        importlib.import_module(found.name)
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def loaded_after_importing(*packages: str) -> set[str]:
    """Top-level packages in a fresh interpreter once `packages` and all their submodules are imported."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_EVERYTHING_UNDER, *packages], text=True, capture_output=True, timeout=120
    )
    assert done.returncode == 0, f"importing {packages} failed:\n{done.stderr}"
    return set(done.stdout.split())


def test_no_module_of_ours_imports_an_optional_or_slow_package_at_start_up():
    early = loaded_after_importing("nemohybrid") & OPTIONAL
    assert not early, f"import {', '.join(sorted(early))} inside the functions that use it"


@pytest.mark.parametrize("package", ["nemohybrid.pattern", "nemohybrid.errors", "nemohybrid.config"])
def test_reading_a_configuration_does_not_import_torch(package):
    early = loaded_after_importing(package) & (OPTIONAL | {"torch"})
    assert not early, f"{package} must answer a wrong configuration at once; it imports {', '.join(sorted(early))}"
