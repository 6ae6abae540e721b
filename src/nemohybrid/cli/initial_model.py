"""`init_from=FOLDER` on a command line brings along the settings of the model that its weights need."""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from nemohybrid.config.compose import compose_raw
from nemohybrid.config.model import ModelConfig
from nemohybrid.config.yaml import read_config_yaml
from nemohybrid.errors import ConfigError

KEY = "init_from="


def with_initial_model(argv: Sequence[str]) -> list[str]:
    """The words, with `model.<key>=...` of what the weights of `init_from` need in front, so that keys given later win.

    How a model is trained (losses, balancing, dtype, first values) is left to the recipe and the command line.
    As they are without `init_from`, and with a `model=NAME`, which then must be the same model.
    """
    folders = [word.removeprefix(KEY) for word in argv if word.startswith(KEY)]
    if not folders or any(word.startswith("model=") for word in argv):
        return list(argv)
    file = _config_file(Path(folders[-1].strip("'\""))) or _config_of_run(argv)
    if file is None:  # whoever reads the checkpoint says what is wrong with it
        return list(argv)
    settings = _carried(read_config_yaml(file).model, [word for word in argv if word.startswith("experiment=")])
    return [f"model.{key}={_word(key, value)}" for key, value in settings.items()] + list(argv)


def _carried(model: ModelConfig, recipe: Sequence[str]) -> dict[str, Any]:
    """Settings by key. A recipe with the same layers may cut them and repeat an MTP block as it likes."""
    from nemohybrid.train.initial import settings_of_weights, stored_layers  # torch takes seconds

    settings, repeats = {"name": model.name} | settings_of_weights(model), model.mtp.repeat_block
    with suppress(ConfigError):  # whoever composes the whole says what is wrong with the recipe
        theirs = str(compose_raw(recipe).model.pattern) if recipe else model.pattern
        if stored_layers(theirs, repeats) == stored_layers(model.pattern, repeats):
            settings["pattern"] = theirs
    return settings


def _config_file(folder: Path) -> Path | None:
    """That of a checkpoint, or of the newest one of a run folder."""
    from nemohybrid.checkpoint.folders import find_checkpoints  # torch takes seconds

    candidates = [folder, *find_checkpoints(folder / "checkpoints"), *find_checkpoints(folder)]
    return next((path / "config.yaml" for path in candidates if (path / "config.yaml").is_file()), None)


def _config_of_run(argv: Sequence[str]) -> Path | None:
    """That of the run itself, which goes on when the weights it began with are gone."""
    with suppress(ConfigError):  # whoever composes the whole says what is wrong
        return _config_file(Path(str(compose_raw([word for word in argv if not word.startswith("-")]).run.dir)))
    return None


def _word(key: str, value: Any) -> str:
    """A value as Hydra reads it."""
    if isinstance(value, str) and "$" in value:  # Hydra would look something up
        raise ConfigError(f"init_from: its model.{key}={value!r} is refused: '$' has a meaning of its own")
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
