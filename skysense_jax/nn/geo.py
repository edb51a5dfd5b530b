"""Geo-context: every cell of a fused map asks the prototypes of its place's region (SkySense paper: K = V = P_r)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from skysense_jax.core.shapes import FeatureMap, Features, Mask
from skysense_jax.nn.attention import attend, dense
from skysense_jax.ops.unit import unit


class GeoQuery(nn.Module):
    """Fused features in the space of the bank.

    A learned projection where the features are not `width` wide; otherwise the features themselves, and no parameters.

    Attributes:
        width: of the bank's prototypes.
        dtype: of the computation.
    """

    width: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Features) -> Features:
        """[..., E] -> [..., width]."""
        return x if x.shape[-1] == self.width else dense(self.width, "query", self.dtype)(x)


def geo_context(query: FeatureMap, prototypes: jax.Array, usable: Mask) -> FeatureMap:
    """The context of every cell: softmax(Q K^T / sqrt(D)) V over the prototypes of its place's region.

    The paper leaves the lengths open: queries and prototypes are brought to length sqrt(D), that is to entries of unit
    mean square, which is what the division by sqrt(D) presumes.

    Args:
        query: [B, h, w, D].
        prototypes: [B, P, D] of each place's region.
        usable: [B] bool, False = the place has no prototypes: its context is 0.

    Returns:
        [B, h, w, D] in query's dtype.
    """
    b, h, w, d = query.shape
    # `attend` takes scaled queries, and sqrt(D) / sqrt(D) is 1.
    scaled = unit(query, "zero").reshape(b, h * w, 1, d).astype(query.dtype)
    keys = (unit(prototypes, "zero") * d**0.5)[:, :, None].astype(query.dtype)
    out = attend(scaled, keys, keys).reshape(b, h, w, d)
    return jnp.where(usable[:, None, None, None], out, jnp.zeros((), out.dtype))
