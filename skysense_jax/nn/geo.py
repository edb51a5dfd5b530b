"""Geo-context: every cell of a fused map asks the prototypes of its place's region (SkySense paper: K = V = P_r)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from skysense_jax.nn.attention import attend, dense, l2_normalise


class GeoQuery(nn.Module):
    """Fused features in the space of the bank: [..., E] -> [..., width]. A learned projection where E is not `width`,
    and otherwise the features themselves (no parameters).
    """

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x if x.shape[-1] == self.width else dense(self.width, "query", self.dtype)(x)


def geo_context(query: jax.Array, prototypes: jax.Array, usable: jax.Array) -> jax.Array:
    """softmax(Q K^T / sqrt(D)) V over the prototypes of each place's region.

    query: [B, h, w, D]; prototypes: [B, P, D]; usable: [B] bool, False = the place has no prototypes: zeros. The paper
    leaves the lengths open: queries and prototypes are brought to length sqrt(D), entries of unit mean square, which is
    what the division by sqrt(D) presumes. Returns [B, h, w, D] in query's dtype.
    """
    b, h, w, d = query.shape
    unit = l2_normalise(query).reshape(b, h * w, 1, d).astype(query.dtype)  # sqrt(D) / sqrt(D): attend wants q scaled
    keys = (l2_normalise(prototypes) * d**0.5)[:, :, None].astype(query.dtype)
    out = attend(unit, keys, keys).reshape(b, h, w, d)
    return jnp.where(usable[:, None, None, None], out, jnp.zeros((), out.dtype))
