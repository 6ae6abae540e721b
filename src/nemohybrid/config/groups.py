"""Where the config groups lie, and which options they have."""

from pathlib import Path

import nemohybrid
from nemohybrid.errors import ConfigError


def configs_dir() -> Path:
    """The folder of config groups: inside the installed package, or at the top of a checkout."""
    package = Path(nemohybrid.__file__).parent
    for folder in (package / "configs", package.parent.parent / "configs"):
        if (folder / "train.yaml").is_file():
            return folder
    raise ConfigError(f"configs/ is neither in {package} nor two folders above it: the installation is incomplete")


def groups() -> dict[str, list[str]]:
    """Config groups and their options, as found in `configs/`."""
    return {
        folder.name: sorted(f.stem for f in folder.glob("*.yaml"))
        for folder in sorted(configs_dir().iterdir())
        if folder.is_dir()
    }
