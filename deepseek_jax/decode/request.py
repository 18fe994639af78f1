"""What a request to generate must be like: refused here before anything is compiled.

Ours.
"""

from collections.abc import Sequence

from deepseek_jax.model.transformer import Transformer


def check(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    *,
    depth: int = 0,
    context: int | None = None,
    page: int = 0,
    chunk: int | None = None,
) -> None:
    """Refuses a request that cannot be served.

    Raises:
      ValueError: names the argument, its value and what would be right.
    """
    config = model.config
    if config.attention.kind != "mla":
        raise ValueError(
            f"model.attention.kind = {config.attention.kind!r}: decoding needs 'mla', "
            "whose latents the cache holds"
        )
    if page < 0:
        raise ValueError(f"page = {page}: must be at least 0 (0 is no pages)")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk = {chunk}: must be at least 1, or None")
    if max_tokens < 1:
        raise ValueError(f"max_tokens = {max_tokens}: must be at least 1")
    if depth and not config.mtp.depth:
        raise ValueError(
            f"depth = {depth}: speculation needs MTP modules, the model has none "
            "(model.mtp.depth = 0)"
        )
    if not 0 <= depth <= config.mtp.depth:
        raise ValueError(
            f"depth = {depth}: must be from 0 to {config.mtp.depth}, the MTP modules "
            "that the model was trained with (model.mtp.depth)"
        )
    check_rows(len(prompts), model.rt.devices, page)
    for row, prompt in enumerate(prompts):
        check_prompt(row, prompt, max_tokens, config.vocab_size, context)


def check_rows(rows: int, devices: int, page: int) -> None:
    """Refuses a batch that cannot be split over the devices.

    Raises:
      ValueError: as `check`.
    """
    if not rows:
        raise ValueError("prompts: there are none; give at least one")
    if rows % devices:
        raise ValueError(
            f"prompts: there are {rows}; must be a multiple of the {devices} devices "
            "of the mesh, each of which has rows of its own"
        )
    if page and devices > 1:
        raise ValueError(
            f"page = {page}: must be 0 on a mesh of {devices} devices, since pages are "
            "not split over them"
        )


def check_prompt(
    row: int,
    prompt: Sequence[int],
    max_tokens: int,
    vocab_size: int,
    context: int | None,
) -> None:
    """Refuses a prompt that the model cannot continue.

    Raises:
      ValueError: as `check`.
    """
    if not len(prompt):
        raise ValueError(f"prompt {row} is empty: give at least one token")
    outside = [t for t in prompt if not 0 <= t < vocab_size]
    if outside:
        raise ValueError(
            f"prompt {row} has token {outside[0]}: must be 0 to {vocab_size - 1}, the "
            f"vocab_size is {vocab_size}"
        )
    if context is not None and len(prompt) + max_tokens > context:
        room, most = context - len(prompt), context - max_tokens
        shorter = f"give a prompt of at most {most} tokens"
        raise ValueError(
            f"prompt {row} has {len(prompt)} tokens and max_tokens is {max_tokens}: "
            f"the model's context is {context}; "
            + (f"ask for at most {room}" if room > 0 else shorter)
        )
