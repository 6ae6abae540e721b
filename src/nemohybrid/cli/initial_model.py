"""`init_from=FOLDER` on a command line brings the settings of the model along."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemohybrid.config.section import leaves
from nemohybrid.config.yaml import read_config_yaml
from nemohybrid.errors import ConfigError

KEY = "init_from="


def with_initial_model(argv: Sequence[str]) -> list[str]:
    """The words, with `model.<key>=...` of what `init_from` names in front, so that keys given later win.

    As they are without `init_from`, and with a `model=NAME`, which then must be the same model.
    """
    folders = [word.removeprefix(KEY) for word in argv if word.startswith(KEY)]
    if not folders or any(word.startswith("model=") for word in argv):
        return list(argv)
    file = _config_file(Path(folders[-1].strip("'\"")))
    if file is None:  # whoever reads the checkpoint says what is wrong with it
        return list(argv)
    model = read_config_yaml(file).model
    return [f"model.{key}={_word(key, value)}" for key, _, value in leaves(model)] + list(argv)


def _config_file(folder: Path) -> Path | None:
    """That of a checkpoint, or of the newest one of a run folder."""
    from nemohybrid.checkpoint.folders import find_checkpoints  # torch takes seconds

    candidates = [folder, *find_checkpoints(folder / "checkpoints"), *find_checkpoints(folder)]
    return next((path / "config.yaml" for path in candidates if (path / "config.yaml").is_file()), None)


def _word(key: str, value: Any) -> str:
    """A value as Hydra reads it."""
    if isinstance(value, str) and "$" in value:  # Hydra would look something up
        raise ConfigError(f"init_from: its model.{key}={value!r} is refused: '$' has a meaning of its own")
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
