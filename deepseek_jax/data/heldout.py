"""Documents that training never sees, one by one as token ids, by domain.

The losses of `pipeline.validation` come from rows that run across documents. What is
measured on single texts, such as prompts that a model continues, takes them from here.
Ours.
"""

from collections import Counter
from typing import Any

import numpy as np

from deepseek_jax.data.corpus import Corpus, Index


def documents(
    corpus: Corpus, tokenizer: Any, count: int, least: int = 1
) -> dict[str, list[list[int]]]:
    """Up to `count` held-out documents of every domain, in an order of no meaning.

    Each is bos, its tokens, eos. Pieces of different texts come first, then a second
    piece of each, and so on: a domain may have a dozen long texts only.

    Args:
      corpus: its `val_fraction` says how much is held out.
      least: tokens that a document must have, bos and eos included.
    """
    index = Index.of(corpus)
    (numbers,) = np.nonzero(index.held_out(corpus.val_fraction))
    held = set(numbers.tolist())
    texts = {i: item.text for i, item in enumerate(corpus.documents()) if i in held}
    found: dict[str, list[list[int]]] = {name: [] for name in corpus.domains}
    for number in _in_turn(index, np.random.default_rng(0).permutation(numbers)):
        mine = found[corpus.domains[index.domain_N[number]]]
        if len(mine) == count:
            continue
        tokens = tokenizer.encode(texts[number])
        if len(tokens) + 2 >= least:
            mine.append([tokenizer.bos_id, *tokens, tokenizer.eos_id])
    return found


def _in_turn(index: Index, numbers: np.ndarray) -> list[int]:
    """The numbers, those first that are the first of their text among them."""
    before: Counter[int] = Counter()
    turns = []
    for number in numbers.tolist():
        digest = int(index.digest_N[number])
        turns.append((before[digest], number))
        before[digest] += 1
    return [number for _, number in sorted(turns, key=lambda turn: turn[0])]
