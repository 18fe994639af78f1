"""A Hugging Face checkpoint folder: its index and shards, or its single file."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from deepseek_jax.convert.tensorfile import Stored, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"


class Folder(NamedTuple):
    """An opened checkpoint; nothing but headers has been read."""

    root: Path
    config: dict[str, Any]
    tensors: dict[str, Stored]
    shards: dict[str, Any] | None  # the index of a sharded one


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
      ValueError: it is missing or damaged.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is missing or damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object")
    return content


def open_folder(root: Path) -> Folder:
    """Opens a checkpoint folder and checks its files against its index.

    Raises:
      ValueError: no such folder, config.json or safetensors; a shard that is missing or
        damaged; a tensor that the index places elsewhere than where it is.
    """
    if not root.is_dir():
        raise ValueError(f"{root} is no folder")
    config = read_json(root / CONFIG)
    if (root / INDEX).exists():
        index = read_json(root / INDEX)
        return Folder(root, config, _sharded(root, index), index)
    if (root / SINGLE).is_file():
        return Folder(root, config, read_header(root / SINGLE), None)
    there = sorted(path.name for path in root.glob("*.safetensors"))
    why = f"there are {', '.join(there[:3])}" if there else "there is none of the kind"
    raise ValueError(f"{root} has neither {INDEX} nor {SINGLE}; {why}")


def _sharded(root: Path, index: dict[str, Any]) -> dict[str, Stored]:
    places = index.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{root / INDEX} is damaged: it has no weight_map")
    found: dict[str, Stored] = {}
    for shard in sorted({str(place) for place in places.values()}):
        first = next(name for name, place in places.items() if place == shard)
        if Path(shard).name != shard or not (root / shard).is_file():
            raise ValueError(
                f"{root / shard} is not there, though {INDEX} places {first} in it"
            )
        for name, stored in read_header(root / shard).items():
            if places.get(name) != shard:
                raise ValueError(
                    f"{root / shard} holds {name}, which {INDEX} "
                    + (f"places in {places[name]}" if name in places else "omits")
                )
            found[name] = stored
    for name, shard in places.items():
        if name not in found:
            raise ValueError(
                f"{root / str(shard)} has no {name}, though {INDEX} places it there"
            )
    return found
