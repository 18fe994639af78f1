"""The attention implementations a Runtime may name; the mathematics lies with the
kernels.

All take (q_nope_BLHN, q_rope_BLHR, k_nope_BSGN, k_rope_BSgR, v_BSGO, segment_BL, *,
scale) and return [B, L, H, O]; see `pallas_kernels.flash_mla.reference`.
"""

from collections.abc import Callable

from deepseek_jax.typing import Array
from pallas_kernels.flash_mla.reference import attention, chunked_attention

ATTENTION: dict[str, Callable[..., Array]] = {
    "plain": attention,
    "chunked": chunked_attention,
}
