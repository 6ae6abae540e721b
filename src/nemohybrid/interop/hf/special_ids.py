"""Ids of special tokens in `config.json`, for which our checkpoints have no place but a file of its own."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from nemohybrid.errors import CheckpointError
from nemohybrid.interop.hf.files import json_object

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
IDS_FILE = "special_ids.json"
"""In an imported checkpoint: what the folder said. Checkpoints of training go by their tokenizer."""
SpecialIds = Mapping[str, int | list[int]]
"""Field -> id; several ids may end a text."""
NO_IDS: SpecialIds = MappingProxyType({})


def special_ids(content: Mapping[str, Any]) -> SpecialIds:
    """Those of a `config.json` that are given. Raises CheckpointError for a value that is no id."""
    given = {name: content[name] for name in SPECIAL_IDS if content.get(name) is not None}
    for name, value in given.items():
        ids = value if isinstance(value, list) and value else [value]
        if any(type(number) is not int or number < 0 for number in ids):
            raise CheckpointError(f"{name}={value!r} is no id of a token, and no list of them")
    return given


def ids_file(ids: SpecialIds) -> dict[str, str]:
    """File name -> content for a checkpoint; nothing where no id is given."""
    return {IDS_FILE: json.dumps(dict(ids), indent=2) + "\n"} if ids else {}


def read_ids(checkpoint: Path) -> SpecialIds:
    """What `ids_file` put into a checkpoint."""
    path = checkpoint / IDS_FILE
    return special_ids(json_object(path)) if path.is_file() else NO_IDS
