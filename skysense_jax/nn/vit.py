"""Plain transformers: the pre-norm layer, a scanned stack of it, and the ViT of the S2 and S1 encoders."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from skysense_jax.core.sharding import gathered
from skysense_jax.nn.attention import (
    SelfAttention,
    dense,
    drop_path,
    drop_rates,
    gelu,
    layer_norm,
    tiny_normal,
    trunc_normal,
    wide,
)
from skysense_jax.nn.patch import PatchEmbed
from skysense_jax.nn.position import positions_for


class TransformerLayer(nn.Module):
    """Pre-norm layer x + attn(ln1 x), x + mlp(ln2 x) of the SkySense release's ViT and fusion transformer.

    Stochastic depth acts on the MLP branch only, as there. Called as a scan body: (x [N,n,C], rate, mask [N,n] or None)
    -> (x, x if emit else None); with first_only x becomes [N,1,C], the layer's output at the first token.
    """

    heads: int
    mlp_ratio: float = 4
    eps: float = 1e-6
    stochastic: bool = False
    emit: bool = False
    dtype: Any = jnp.float32
    first_only: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, rate: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        width = x.shape[-1]
        rng = self.make_rng("drop_path") if self.stochastic else None
        h = layer_norm(self.eps, "ln1")(x).astype(self.dtype)
        branch = SelfAttention(self.heads, self.dtype, name="attn")(h, mask, self.first_only)
        x = x[:, : branch.shape[1]] + branch
        h = layer_norm(self.eps, "ln2")(x).astype(self.dtype)
        h = gelu(dense(int(width * self.mlp_ratio), "fc1", self.dtype, bias_init=tiny_normal)(h))
        h = dense(width, "fc2", self.dtype, bias_init=tiny_normal)(h)
        x = x + drop_path(h, rate, rng)
        return x, (x if self.emit else None)


class TransformerStack(nn.Module):
    """`depth` equal layers under one scan; parameters are stacked on a leading axis under "layers".

    x: [N,n,C], mask: [N,n] bool or None. Returns (x, all) where all is [depth,N,n,C] if `emit` (outputs of every
    layer), else None. drop: the last layer's stochastic depth. remat: recompute a layer in the backward pass.
    first_only: the last layer computes the first token alone, x is [N,1,C].
    """

    depth: int
    heads: int
    mlp_ratio: float = 4
    eps: float = 1e-6
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
        first_only: bool = False,
    ) -> tuple[jax.Array, jax.Array | None]:
        if first_only and not self.is_initializing():
            return self.first_token(x, mask, train), None
        layer = nn.remat(TransformerLayer, prevent_cse=False) if self.remat else TransformerLayer
        scanned = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "drop_path": True},
            in_axes=(0, nn.broadcast),
            length=self.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        stack = scanned(self.heads, self.mlp_ratio, self.eps, train and self.drop > 0, emit, self.dtype, name="layers")
        return stack(x, drop_rates(self.drop, self.depth), mask)

    def first_token(self, x: jax.Array, mask: jax.Array | None, train: bool) -> jax.Array:
        """[N,1,C]: the scan over all layers but the last, then that one for the first token: three quarters of its
        products saved. The parameters are those of the scan over all of them.
        """
        params, rates = self.variables["params"]["layers"], drop_rates(self.drop, self.depth)
        stochastic = train and self.drop > 0
        keys = jax.random.split(self.make_rng("drop_path"), self.depth) if stochastic else rates  # not used then

        def run(x: jax.Array, step: Any, first_only: bool = False) -> tuple[jax.Array, None]:
            weights, rate, key = step
            layer = TransformerLayer(
                self.heads, self.mlp_ratio, self.eps, stochastic, False, self.dtype, first_only, parent=None
            )
            rngs = {"drop_path": key} if stochastic else {}
            return layer.apply({"params": weights}, x, rate, mask, rngs=rngs)

        body, last = run, functools.partial(run, first_only=True)
        if self.remat:
            body, last = jax.checkpoint(body, prevent_cse=False), jax.checkpoint(last)
        x, _ = jax.lax.scan(body, x, jax.tree.map(lambda leaf: leaf[:-1], (params, rates, keys)))
        return last(x, jax.tree.map(lambda leaf: leaf[-1], (params, rates, keys)))[0]


class VisionTransformer(nn.Module):
    """ViT with a learned position table and no final norm (SkySense release, models/vision_transformer.py).

    [B,H,W,Cin] -> tuple of [B,ceil(H/p),ceil(W/p),width], one per index of `outputs` (layers; negative counts from the
    end).
    The class token is always a parameter; cls_token=False adds it with its position row and drops it before the first
    layer, which is what the released configurations do. table_grid: (rows, columns) of the position table.
    """

    width: int
    patch: int
    depth: int
    heads: int
    table_grid: tuple[int, int]
    mlp_ratio: float = 4
    eps: float = 1e-6
    drop: float = 0.0
    cls_token: bool = False
    outputs: Sequence[int] = (-1,)
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> tuple[jax.Array, ...]:
        x = PatchEmbed(self.width, self.patch, self.dtype, name="patch_embed")(x)
        b, h, w, c = x.shape
        rows = 1 + self.table_grid[0] * self.table_grid[1]
        token = self.param("cls_token", trunc_normal, (1, 1, c), jnp.float32)
        table = self.param("pos_embed", trunc_normal, (1, rows, c), jnp.float32)
        positions = positions_for(gathered(table.astype(wide(self.dtype))), self.table_grid, (h, w))
        x = x.reshape(b, h * w, c) + positions[:, 1:].astype(self.dtype)
        if self.cls_token:
            first = jnp.broadcast_to((token + positions[:, :1]).astype(self.dtype), (b, 1, c))
            x = jnp.concatenate([first, x], axis=1)
        wanted = [i % self.depth for i in self.outputs]
        emit = any(i != self.depth - 1 for i in wanted)
        x, every = TransformerStack(
            self.depth, self.heads, self.mlp_ratio, self.eps, self.drop, self.remat, self.dtype, name="blocks"
        )(x, None, train, emit)
        maps = [every[i] if emit else x for i in wanted]
        return tuple(m[:, int(self.cls_token) :].reshape(b, h, w, c) for m in maps)
