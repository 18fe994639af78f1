"""The shape legend: capital suffixes of array names, logical dimensions only.

B batch · L query length · S key/cache length · T tokens (B*L) · D model · H heads ·
N no-position head dim · R rotary head dim · X = N + R · O value head dim · Q query
latent · C kv latent · F ffn · E experts · G groups · K top-k · M routed slots (T*K) · V
vocab · J mtp depth. Lower case is the local shard (`e` = E/ep). Einsums use the same
letters.
"""

from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
Params = dict[str, Any]


def at_least_f32(x: Array) -> Array:
    """Upcasts 16-bit floats to float32 and leaves float64 alone."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
