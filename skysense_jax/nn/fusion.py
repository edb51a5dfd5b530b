"""The multi-modal temporal fusion transformer: the sequence of one grid cell in, the output at an extra token out."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from skysense_jax.nn.attention import dense, trunc_normal
from skysense_jax.nn.vit import TransformerStack


class Fusion(nn.Module):
    """SkySense release, models/transformer_encoder.py: projection, a learned token in front, pre-norm layers, no final
    norm.

    x: [N,n,D] sequences (N = batch x cells), mask: [N,n] bool or None, False = key not to be seen (the token is always
    seen; without masked keys the result is the reference's). Cells do not see each other: N can be cut anywhere.
    Returns (tokens [N,1+n,E], all layers' tokens [depth,N,1+n,E] if `emit` else None); with token_only the extra
    token's output alone, [N,1,E], which is all that the model uses. No position or modality embedding: the token does
    not depend on the order of x.
    """

    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4
    eps: float = 1e-5
    drop: float = 0.0
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        train: bool = False,
        emit: bool = False,
        token_only: bool = False,
    ) -> tuple[jax.Array, jax.Array | None]:
        x = dense(self.width, "proj", self.dtype)(x)
        token = self.param("cls_token", trunc_normal, (1, 1, self.width), jnp.float32)
        x = jnp.concatenate([jnp.broadcast_to(token.astype(self.dtype), (x.shape[0], 1, self.width)), x], axis=1)
        if mask is not None:
            mask = jnp.concatenate([jnp.ones_like(mask[:, :1]), mask], axis=1)
        return TransformerStack(
            self.depth, self.heads, self.mlp_ratio, self.eps, self.drop, self.remat, self.dtype, name="blocks"
        )(x, mask, train, emit, token_only)
