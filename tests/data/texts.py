"""Small corpora for the tests of `deepseek_jax.data`."""

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from deepseek_jax.config import DataConfig
from deepseek_jax.data.corpus import Corpus
from deepseek_jax.data.sources import open_corpus
from deepseek_jax.tokenizer.bytes import Bytes

BYTES = Bytes()


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def small_corpus(
    folder: Path, documents: int = 120, longest: int = 90, **settings: Any
) -> tuple[DataConfig, Corpus]:
    """Different texts of 1 to `longest` letters, of three domains of unequal size."""
    rng = random.Random(documents)
    rows = [
        {
            "text": f"{number} "
            + "".join(rng.choices("abc \n", k=rng.randrange(longest))),
            "domain": rng.choice(["few", "some", "some", "many", "many", "many"]),
        }
        for number in range(documents)
    ]
    path = write_jsonl(folder / "small.jsonl", rows)
    chosen = {"batch": 4, "length": 16, "val_fraction": 0.2, **settings}
    config = DataConfig(source=str(path), tokenizer="bytes", **chosen)
    return config, open_corpus(config, folder / "cache")
