"""The multi-modal temporal fusion transformer: the sequence of one grid cell in, the output at an extra token out."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from skysense_jax.core.shapes import Mask, Tokens
from skysense_jax.nn.attention import dense, trunc_normal
from skysense_jax.nn.vit import TransformerStack


class Fusion(nn.Module):
    """The fusion of the SkySense release (models/transformer_encoder.py).

    A projection, a learned token in front, pre-norm layers, no final norm. There is no position or modality embedding:
    the token's output does not depend on the order of the sequence. Cells do not see each other, so that the batch of
    sequences can be cut anywhere.

    Attributes:
        width, depth, heads, mlp_ratio: of the layers.
        eps: of their LayerNorms.
        drop: stochastic depth of the last layer.
        remat: recompute a layer in the backward pass.
        dtype: of the computation.
    """

    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4
    eps: float = 1e-5
    drop: float = 0.0
    remat: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Tokens, mask: Mask | None = None, train: bool = False, emit: bool = False, token_only: bool = False
    ) -> tuple[Tokens, jax.Array | None]:
        """Fuse the sequences.

        Args:
            x: [N, n, D] sequences, N = batch x cells.
            mask: [N, n] bool or None, False = the key is not seen. The token is always seen; without masked keys the
                result is the reference's.
            train: draw stochastic depth from the stream "drop_path".
            emit: return the tokens of all layers too.
            token_only: return the extra token's output alone, which is all that the model uses.

        Returns:
            (tokens [N, 1 + n, E], or [N, 1, E] with token_only; [depth, N, 1 + n, E] with emit, else None).
        """
        x = dense(self.width, "proj", self.dtype)(x)
        token = self.param("cls_token", trunc_normal, (1, 1, self.width), jnp.float32)
        x = jnp.concatenate([jnp.broadcast_to(token.astype(self.dtype), (x.shape[0], 1, self.width)), x], axis=1)
        if mask is not None:
            mask = jnp.concatenate([jnp.ones_like(mask[:, :1]), mask], axis=1)
        return TransformerStack(
            self.depth, self.heads, self.mlp_ratio, self.eps, self.drop, self.remat, self.dtype, name="blocks"
        )(x, mask, train, emit, token_only)
