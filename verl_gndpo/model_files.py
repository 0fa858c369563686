# SPDX-License-Identifier: Apache-2.0
"""Look at the files of a Hugging Face model folder before transformers does.

transformers often fails without the name of the damaged file, and believes every size: a config with a billion layers
takes all memory. Imports neither torch nor transformers.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from verl_gndpo.export.folders import DESCRIPTIONS

COUNTS = re.compile(r"(layers|^n_layer|blocks?|depths?|heads?|experts|_per_tok)$")
"""Settings of a config that are numbers of parts, each an object in memory. Any other `layer` is an index."""
MOST_PARTS = 100_000
WEIGHT_FILES = ("*.safetensors", "*.bin")
MODEL = "model.safetensors"
"""transformers' name for all weights in one file. It wins over an index."""
INDEX = "model.safetensors.index.json"


class DamagedModel(ValueError):
    """A file of a model folder can't be used. The message names the file."""


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        DamagedModel: the file can't be read, or holds no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DamagedModel(f"{path} can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DamagedModel(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise DamagedModel(f"{path} holds no JSON object")
    return content


def check_descriptions(folder: Path) -> None:
    """Check all that a folder has beside its weights: that each file is JSON, and that the config's sizes can be.

    Raises:
        DamagedModel: a file is no JSON object, the config asks for more parts than any model has, or several tokens
            share an id.
    """
    for name in DESCRIPTIONS:
        path = folder / name
        if not (path.exists() or path.is_symlink()):
            continue
        content = read_object(path)
        if name == "config.json":
            for key, value in _counts(content):
                if not 0 <= value <= MOST_PARTS:
                    raise DamagedModel(f"{path}: {key} is {value}, from 0 to {MOST_PARTS} are possible")
        elif name == "tokenizer.json":
            _check_ids(path, content)


def _counts(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _counts(value, f"{prefix}{key}.")
        elif COUNTS.search(key) and isinstance(value, int | float):
            yield f"{prefix}{key}", value


def _check_ids(path: Path, content: dict[str, Any]) -> None:
    """Raise DamagedModel if several tokens share an id. What else is wrong with a tokenizer it says itself."""
    model = content.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    tokens: dict[Any, str] = {}
    added = content.get("added_tokens")
    pairs = list(vocab.items()) if isinstance(vocab, dict) else []
    pairs += [
        (x.get("content"), x.get("id")) for x in (added if isinstance(added, list) else []) if isinstance(x, dict)
    ]
    for token, number in pairs:
        if isinstance(number, int) and tokens.setdefault(number, token) != token:
            raise DamagedModel(f"{path}: the tokens {tokens[number]!r} and {token!r} share the id {number}")


def code_of(folder: Path) -> dict[str, list[str]]:
    """Return the code of its own that a model folder asks for (`auto_map`), by the file that names it."""
    found = {}
    for name in DESCRIPTIONS:
        try:
            content = read_object(folder / name)
        # `check_descriptions` reports it.
        except DamagedModel:
            continue
        named = content.get("auto_map")
        if named:
            classes = named.values() if isinstance(named, dict) else [named]
            found[name] = sorted(
                {str(one) for value in classes for one in (value if isinstance(value, list) else [value])}
            )
    return found


def shards_of(folder: Path) -> dict[str, str]:
    """Return the file of each weight by the folder's indices; empty where there is none.

    Raises:
        DamagedModel: an index is damaged, or names a file that is not in the folder.
    """
    found: dict[str, str] = {}
    for index in sorted(folder.glob("*.index.json")):
        shards = read_object(index).get("weight_map", {})
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise DamagedModel(f"{index}: weight_map holds no names of files")
        files = set(shards.values())
        for shard in files:
            if not re.fullmatch(r"[^/\\\0]+", shard) or shard in (".", ".."):
                raise DamagedModel(f"{index} names {shard!r}, which leads out of the folder")
        missing = sorted(shard for shard in files if not (folder / shard).is_file())
        if missing:
            raise DamagedModel(
                f"folder {folder} is incomplete: {len(missing)} of the {len(files)} files named in {index.name} are "
                f"missing, first {missing[0]}"
            )
        found |= shards
    return found
