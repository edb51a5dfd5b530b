"""Plain transformers: the pre-norm layer, a scanned stack of it, and the ViT of the S2 and S1 encoders."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from skysense_jax.core.shapes import FeatureMap, Image, Mask, Scalar, Tokens
from skysense_jax.core.sharding import gathered
from skysense_jax.core.trees import Tree
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

    Stochastic depth acts on the MLP branch only, as in the release.

    Attributes:
        heads: number of heads.
        mlp_ratio: hidden width of the MLP / C.
        eps: of the LayerNorms.
        stochastic: draw stochastic depth from the stream "drop_path".
        emit: return the tokens a second time, for the scan to stack.
        dtype: of the computation.
        first_only: compute the output at the first token alone.
    """

    heads: int
    mlp_ratio: float = 4
    eps: float = 1e-6
    stochastic: bool = False
    emit: bool = False
    dtype: DTypeLike = jnp.float32
    first_only: bool = False

    @nn.compact
    def __call__(self, x: Tokens, rate: Scalar, mask: Mask | None) -> tuple[Tokens, Tokens | None]:
        """The layer as the body of a scan.

        Args:
            x: [N, n, C].
            rate: of stochastic depth.
            mask: [N, n] bool or None, False = the key is not seen.

        Returns:
            (tokens [N, n, C], or [N, 1, C] with first_only; the same with emit, else None).
        """
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

    Attributes:
        depth: number of layers.
        heads, mlp_ratio, eps: of each layer.
        drop: stochastic depth of the last layer.
        remat: recompute a layer in the backward pass.
        dtype: of the computation.
    """

    depth: int
    heads: int
    mlp_ratio: float = 4
    eps: float = 1e-6
    drop: float = 0.0
    remat: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Tokens, mask: Mask | None = None, train: bool = False, emit: bool = False, first_only: bool = False
    ) -> tuple[Tokens, jax.Array | None]:
        """All layers.

        Args:
            x: [N, n, C].
            mask: [N, n] bool or None, False = the key is not seen.
            train: draw stochastic depth from the stream "drop_path".
            emit: return the tokens of all layers too.
            first_only: the last layer computes the first token alone.

        Returns:
            (tokens [N, n, C], or [N, 1, C] with first_only; [depth, N, n, C] with emit, else None).
        """
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

    def first_token(self, x: Tokens, mask: Mask | None, train: bool) -> Tokens:
        """The output at the first token alone.

        The scan runs over all layers but the last, which then computes the first token only: three quarters of its
        products are saved. The parameters are those of the scan over all layers.

        Args:
            x: [N, n, C].
            mask: [N, n] bool or None, False = the key is not seen.
            train: draw stochastic depth from the stream "drop_path".

        Returns:
            [N, 1, C].
        """
        params, rates = self.variables["params"]["layers"], drop_rates(self.drop, self.depth)
        stochastic = train and self.drop > 0
        keys = jax.random.split(self.make_rng("drop_path"), self.depth) if stochastic else rates  # not used then

        def apply_layer(x: Tokens, step: tuple[Tree, Scalar, jax.Array], first_only: bool) -> tuple[Tokens, None]:
            weights, rate, key = step
            layer = TransformerLayer(
                self.heads, self.mlp_ratio, self.eps, stochastic, False, self.dtype, first_only, parent=None
            )
            rngs = {"drop_path": key} if stochastic else {}
            return cast(tuple[Tokens, None], layer.apply({"params": weights}, x, rate, mask, rngs=rngs))

        body: Callable[..., tuple[Tokens, None]] = functools.partial(apply_layer, first_only=False)
        last: Callable[..., tuple[Tokens, None]] = functools.partial(apply_layer, first_only=True)
        if self.remat:
            body, last = jax.checkpoint(body, prevent_cse=False), jax.checkpoint(last)
        x, _ = jax.lax.scan(body, x, jax.tree.map(lambda leaf: leaf[:-1], (params, rates, keys)))
        return last(x, jax.tree.map(lambda leaf: leaf[-1], (params, rates, keys)))[0]


class VisionTransformer(nn.Module):
    """ViT with a learned position table and no final norm (SkySense release, models/vision_transformer.py).

    Attributes:
        width: of the features.
        patch: side p of a patch in pixels.
        depth, heads, mlp_ratio, eps: of the layers.
        table_grid: (rows, columns) of the position table.
        drop: stochastic depth of the last layer.
        cls_token: send the class token through the layers. It is always a parameter; without cls_token it is added with
            its position row and dropped before the first layer, which is what the released configurations do.
        outputs: indices of the layers to return; negative ones count from the end.
        remat: recompute a layer in the backward pass.
        dtype: of the computation.
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
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Image, train: bool = False) -> tuple[FeatureMap, ...]:
        """Encode images.

        Args:
            x: [B, H, W, Cin].
            train: draw stochastic depth from the stream "drop_path".

        Returns:
            One map [B, ceil(H/p), ceil(W/p), width] per index of `outputs`.
        """
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
        layers = [i % self.depth for i in self.outputs]
        emit = any(i != self.depth - 1 for i in layers)
        x, of_layers = TransformerStack(
            self.depth, self.heads, self.mlp_ratio, self.eps, self.drop, self.remat, self.dtype, name="blocks"
        )(x, None, train, emit)
        maps = [x if of_layers is None else of_layers[i] for i in layers]
        return tuple(m[:, int(self.cls_token) :].reshape(b, h, w, c) for m in maps)
