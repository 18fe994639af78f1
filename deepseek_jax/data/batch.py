"""What one step trains on: rows of tokens with the marks that training needs."""

from typing import Any, NamedTuple


class Batch(NamedTuple):
    """Arrays of shape [B, L+1+J]: L inputs, the token after them, J more for MTP.

    With `data.packing` "concat" a row starts at token L of the row before it in its
    lane: rows overlap by 1+J, so that every token is predicted exactly once, at every
    depth (in section 2.2 of arXiv:2412.19437 the deeper modules predict fewer tokens;
    here all have full targets), and so that a step's inputs don't depend on J.
    """

    tokens: Any  # int32
    segment: (
        Any  # int32: documents of a row from 1, all 1 without segment_mask; 0 = pad
    )
    position: Any  # int32: from 0 in each segment
    mask: Any  # bool: the token counts as a target; False only on padding
    domain: Any  # int32: index into corpus.domains; -1 = padding
