"""How often the main model accepts what its MTP modules draft, by domain of the text.

arXiv:2412.19437, section 5.4.3: 85 to 90 % of the second tokens are accepted, "across
various generation topics". `measure` counts in real speculative decoding, which
continues the beginnings of held-out documents. Small models fall into loops there that
any module predicts, so `agreement` counts on the documents' own text, too: how often a
module's most probable token is the main model's.

Errors are standard errors over prompts or documents, of a ratio of sums (Taylor's
approximation); two pieces of one text count as two.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from deepseek_jax.decode import engine, request
from deepseek_jax.decode.forward import Weights
from deepseek_jax.decode.sampling import sampling
from deepseek_jax.eval import logits
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.typing import Params

type Documents = Mapping[str, Sequence[Sequence[int]]]  # token ids by domain


class Ratio(NamedTuple):
    """A sum over prompts divided by another."""

    value: float  # NaN of nothing
    error: float  # its standard error; NaN where a single prompt counts
    of: int  # the divisor


class Measured(NamedTuple):
    """What speculation came to on some prompts."""

    prompts: int
    accepted: tuple[Ratio, ...]  # draft k = 1..J, as in `speculative.acceptance`
    tokens_per_step: Ratio


class Report(NamedTuple):
    domains: dict[str, Measured]
    together: Measured  # over all prompts
    mean: tuple[float, ...]  # of the domains' acceptance, for k = 1..J
    spread: tuple[float, ...]  # its standard deviation over domains; NaN of one


def ratio(parts: ArrayLike, wholes: ArrayLike) -> Ratio:
    """sum(parts) / sum(wholes), one of each a prompt; empty prompts count nothing."""
    part_N, whole_N = np.asarray(parts, float), np.asarray(wholes, float)
    part_N, whole_N = part_N[whole_N > 0], whole_N[whole_N > 0]
    count, whole = len(whole_N), whole_N.sum()
    if not count:
        return Ratio(math.nan, math.nan, 0)
    value = part_N.sum() / whole
    if count == 1:
        return Ratio(float(value), math.nan, int(whole))
    rest = ((part_N - value * whole_N) ** 2).sum() * count / (count - 1)
    return Ratio(float(value), float(np.sqrt(rest) / whole), int(whole))


def summarize(rows: Sequence[engine.Generation]) -> Measured:
    """Acceptance and tokens a step, with errors."""
    accepted_JN = zip(*(row.accepted for row in rows), strict=True)
    judged_JN = zip(*(row.judged for row in rows), strict=True)
    made, steps = [len(row.tokens) for row in rows], [row.steps for row in rows]
    accepted = tuple(map(ratio, accepted_JN, judged_JN))
    return Measured(len(rows), accepted, ratio(made, steps))


def measure(
    model: Transformer,
    weights: Weights,
    documents: Documents,
    *,
    prompt_tokens: int,
    max_tokens: int,
    depth: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    stop: Sequence[int] = (),
    context: int | None = None,
) -> Report:
    """Continues the first tokens of documents, each domain's in one batch.

    Args:
      weights: `forward.split` of a checkpoint's parameters.
      prompt_tokens: of each document; shorter ones are left out.
      max_tokens: to generate after each prompt, unless a token of `stop` comes.
      depth: MTP modules that draft; all of them by default.
      temperature: 0 is greedy.
      seed: of the first prompt; the others have the next seeds.

    Raises:
      ValueError: a domain has no document that is long enough, or as `request.check`
        and `sampling.sampling`; before anything is compiled.
    """
    depth = max(model.config.mtp.depth, 1) if depth is None else depth
    if depth < 1:
        raise ValueError(f"depth = {depth}: must be at least 1, drafts are needed")
    prompts = beginnings(documents, prompt_tokens)
    for each in prompts.values():
        request.check(model, each, max_tokens, depth=depth, context=context)
    rows: dict[str, list[engine.Generation]] = {}
    for domain, each in prompts.items():
        rule = sampling(len(each), temperature=temperature, seed=seed)
        rows[domain] = engine.generate(
            model,
            weights,
            each,
            max_tokens,
            rule=rule,
            stop=stop,
            depth=depth,
            context=context,
        ).rows
        seed += len(each)
    domains = {domain: summarize(each) for domain, each in rows.items()}
    values_DJ = np.array([[r.value for r in m.accepted] for m in domains.values()])
    spread = values_DJ.std(0, ddof=1) if len(domains) > 1 else [math.nan] * depth
    return Report(
        domains,
        summarize([row for each in rows.values() for row in each]),
        tuple(map(float, values_DJ.mean(0))),
        tuple(map(float, spread)),
    )


def beginnings(documents: Documents, size: int) -> dict[str, list[list[int]]]:
    """The first `size` tokens of the documents that have as many, by domain.

    Raises:
      ValueError: `size` is below 1, there is no domain, or one has no such document.
    """
    if size < 1:
        raise ValueError(f"prompt_tokens = {size}: must be at least 1")
    if not documents:
        raise ValueError("documents: there are none")
    found = {}
    for domain, each in documents.items():
        found[domain] = [list(one[:size]) for one in each if len(one) >= size]
        if not found[domain]:
            longest = f", the longest has {max(map(len, each))}" if each else ""
            raise ValueError(
                f"prompt_tokens = {size}: no held-out document of domain {domain!r} "
                f"has as many{longest}"
            )
    return found


def agreement(
    model: Transformer,
    params: Params,
    balance: Any,
    documents: Documents,
    *,
    length: int = 256,
) -> dict[str, tuple[Ratio, ...]]:
    """Share of positions of real text where module k = 1..J and the main model agree.

    Both name the most probable token at position i+k+1, from the text's tokens 0..i+k;
    in speculation modules 2..J read drafts instead.

    Args:
      balance: balancer state with a leading axis over the routers, as checkpoints have.
      length: tokens of a document that count, its first ones.

    Raises:
      ValueError: as `eval.logits.check`.
    """
    flat = [list(one[:length]) for each in documents.values() for one in each]
    size_N = np.array([len(one) for one in flat])
    tokens_NL = np.zeros((len(flat), max(map(len, flat), default=0)), np.int32)
    for row, one in zip(tokens_NL, flat):
        row[: len(one)] = one
    depth = model.config.mtp.depth
    best_JT = np.zeros((1 + depth, tokens_NL.size), np.int32)
    for block in logits.blocks(model, params, balance, tokens_NL, mtp=True):
        span = slice(block.start, block.start + len(block.logits_TV))
        best_JT[block.module, span] = block.logits_TV.argmax(-1)
    best_JNL = best_JT.reshape(1 + depth, *tokens_NL.shape)
    found: dict[str, tuple[Ratio, ...]] = {}
    start = 0
    for domain, each in documents.items():
        mine = slice(start, start + len(each))
        start += len(each)
        shares = []
        for k in range(1, depth + 1):
            same_NL = best_JNL[k, mine, :-k] == best_JNL[0, mine, k:]
            there_NL = np.arange(k, tokens_NL.shape[1]) < size_N[mine, None]
            shares.append(ratio((same_NL & there_NL).sum(1), there_NL.sum(1)))
        found[domain] = tuple(shares)
    return found
