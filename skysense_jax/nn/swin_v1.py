"""Swin-V1 as SimMIM and GFM use it: pre-norm blocks and window attention, some MLPs replaced by mixtures of experts.

The attention is scaled dot-product attention with a table of relative biases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from skysense_jax.core.shapes import FeatureMap, Scalar, Windows
from skysense_jax.nn.attention import dense, drop_path, drop_rates, gelu, layer_norm, trunc_normal, wide
from skysense_jax.nn.moe import MixtureOfExperts
from skysense_jax.nn.patch import ConcatMerging
from skysense_jax.nn.swin import stage_plan
from skysense_jax.nn.windows import in_windows, region_bias, relative_index

Stats = dict[str, jax.Array]
"""What a mixture of experts reports (nn.moe); empty for a dense block."""


class Encoded(NamedTuple):
    """What the encoder makes of its tokens.

    Attributes:
        stages: map [B, H_i, W_i, width * 2^i] after the blocks of each stage, before merging.
        final: the last of them, normalised.
        moe: {"stage<i>": what the mixtures of a stage report, one row per layer} of the stages that have them.
        merged: what the last stage's blocks begin with, the map after the last merging (where GFM compares with its
            teacher).
    """

    stages: tuple[FeatureMap, ...]
    final: FeatureMap
    moe: dict[str, Stats]
    merged: FeatureMap


def position_bias(table: jax.Array, window: int, table_window: int) -> jax.Array:
    """The bias of the logits of every pair of cells.

    Args:
        table: [(2 * table_window - 1)^2, heads], dy outer, dx inner.
        window: side w of a window in cells, at most table_window.
        table_window: side of the window that the table is made for.

    Returns:
        [heads, w*w, w*w].
    """
    return table[relative_index(window, table_window)].transpose(2, 0, 1)


class TableAttention(nn.Module):
    """Multi-head attention inside windows, biased by relative position.

    Attributes:
        heads: number of heads.
        window: side of the window that the table is made for.
        dtype: of the computation.
    """

    heads: int
    window: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Windows, regions: np.ndarray | None) -> Windows:
        """Attend inside each window.

        Args:
            x: [B, windows, n*n, C]; an n smaller than `window` uses the table's central part.
            regions: [windows, n*n] of nn.windows.shift_regions, or None.

        Returns:
            The same shape.
        """
        width, used = x.shape[-1], round(x.shape[-2] ** 0.5)
        table = self.param("table", trunc_normal, ((2 * self.window - 1) ** 2, self.heads), jnp.float32)
        qkv = dense(3 * width, "qkv", self.dtype, kernel_init=trunc_normal)(x)
        qkv = qkv.reshape(*x.shape[:-1], 3, self.heads, width // self.heads)
        q, k, v = qkv[..., 0, :, :], qkv[..., 1, :, :], qkv[..., 2, :, :]
        q = q * (width // self.heads) ** -0.5
        logits = jnp.einsum("bnqhd,bnkhd->bnhqk", q, k, preferred_element_type=wide(self.dtype))
        logits = logits + position_bias(table, used, self.window)
        if regions is not None:
            logits = logits + region_bias(regions)
        weights = jax.nn.softmax(logits, axis=-1).astype(self.dtype)
        out = jnp.einsum("bnhqk,bnkhd->bnqhd", weights, v).reshape(x.shape)
        return dense(width, "proj", self.dtype, kernel_init=trunc_normal)(out)


class Block(nn.Module):
    """Pre-norm block on a map: x + attn(norm1 x), x + mlp(norm2 x).

    A map whose smaller side is at most the window is not shifted, and attends in windows of that side. Other maps are
    zero-padded to multiples of the window, which the reference refuses; padding is not masked.

    Attributes:
        heads: number of heads.
        window: side of the window that the bias table is made for.
        shifted: roll by half a window.
        moe: fields of nn.moe.MixtureOfExperts, which takes the MLP's place; empty = a plain MLP.
        mlp_ratio: hidden width of the MLP / C.
        stochastic: draw stochastic depth from the stream "drop_path".
        eps: of the LayerNorms.
        dtype: of the computation.
    """

    heads: int
    window: int
    shifted: bool
    moe: Mapping[str, Any]
    mlp_ratio: float = 4
    stochastic: bool = False
    eps: float = 1e-5
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: FeatureMap, rate: Scalar | float = 0.0) -> tuple[FeatureMap, Stats]:
        """([B, H, W, C], stochastic depth) -> (the same shape, what the mixture reports)."""
        smaller = min(x.shape[1:3])
        shift = self.window // 2 if self.shifted and smaller > self.window else 0
        attention = TableAttention(self.heads, self.window, self.dtype, name="attn")
        h = layer_norm(self.eps, "norm1")(x).astype(self.dtype)
        x = x + self.thinned(in_windows(h, min(self.window, smaller), shift, attention), rate)
        h = layer_norm(self.eps, "norm2")(x).astype(self.dtype)
        stats: Stats = {}
        if self.moe:
            h, stats = MixtureOfExperts(mlp_ratio=self.mlp_ratio, dtype=self.dtype, name="moe", **self.moe)(h)
        else:
            h = gelu(dense(int(x.shape[-1] * self.mlp_ratio), "fc1", self.dtype, kernel_init=trunc_normal)(h))
            h = dense(x.shape[-1], "fc2", self.dtype, kernel_init=trunc_normal)(h)
        return x + self.thinned(h, rate), stats

    def thinned(self, h: FeatureMap, rate: Scalar | float) -> FeatureMap:
        """A branch under stochastic depth.

        Args:
            h: [B, H, W, C] the branch.
            rate: of stochastic depth.

        Returns:
            The same shape.
        """
        return drop_path(h, rate, self.make_rng("drop_path") if self.stochastic else None)


class Pair(nn.Module):
    """An unshifted and a shifted block, the body of the scan; experts are in the shifted block.

    Attributes:
        block: fields of Block.
        moe: of the shifted block, see Block.
        remat: recompute a block in the backward pass.
    """

    block: Mapping[str, Any]
    moe: Mapping[str, Any]
    remat: bool = False

    @nn.compact
    def __call__(self, x: FeatureMap, rates: jax.Array) -> tuple[FeatureMap, Stats]:
        """(map, stochastic depth of the two blocks [2]) -> (map, what the mixture reports)."""
        cls = nn.remat(Block, prevent_cse=False) if self.remat else Block
        x, _ = cls(shifted=False, moe={}, name="plain", **self.block)(x, rates[0])
        return cls(shifted=True, moe=self.moe, name="shifted", **self.block)(x, rates[1])


class Stage(nn.Module):
    """Optional merging, then blocks laid out by nn.swin.stage_plan.

    Attributes:
        block: fields of Block, but shifted and moe.
        moe: of the odd blocks, see Block.
        merge: begin with the merging.
        remat: recompute a block in the backward pass.
    """

    block: Mapping[str, Any]
    moe: Mapping[str, Any]
    merge: bool
    remat: bool = False

    @nn.compact
    def __call__(self, x: FeatureMap, rates: jax.Array) -> tuple[FeatureMap, FeatureMap, Stats]:
        """Merging and blocks.

        Args:
            x: [B, H, W, C].
            rates: [depth] stochastic depth of each block.

        Returns:
            (map of the stage, map in front of its blocks, what the mixtures report, one row for each).
        """
        stats: Stats = {}
        if self.merge:
            x = ConcatMerging(self.block["eps"], self.block["dtype"], name="downsample")(x)
        merged = x
        for kind, first, count in stage_plan(rates.shape[0], 0):
            if kind == "pairs":
                pairs = nn.scan(
                    Pair,
                    variable_axes={"params": 0},
                    split_rngs={"params": True, "drop_path": True, "gate": True},
                    length=count,
                    metadata_params={nn.PARTITION_NAME: "layers"},
                )
                x, stats = pairs(self.block, self.moe, self.remat, name=f"pairs{first}")(
                    x, rates[first : first + 2 * count].reshape(count, 2)
                )
            else:  # the last block of an odd number of them: its index is even, it is unshifted
                single = nn.remat(Block) if self.remat else Block
                x, _ = single(shifted=False, moe={}, name=f"block{first}", **self.block)(x, rates[first])
        return x, merged, stats


class SwinTransformerV1(nn.Module):
    """The encoder behind a patch embedding.

    Attributes:
        depths, heads: blocks and heads of each stage.
        windows: of each stage's bias table.
        moe_stages: those whose odd blocks are mixtures of experts.
        moe: fields of nn.moe.MixtureOfExperts, but mlp_ratio, train and dtype.
        mlp_ratio: hidden width of the MLPs / C.
        drop: stochastic depth of the last block, linear from 0 over all blocks.
        eps: of the LayerNorms.
        remat: recompute blocks in the backward pass.
        dtype: of the computation.
    """

    depths: Sequence[int]
    heads: Sequence[int]
    windows: Sequence[int]
    moe_stages: Sequence[int]
    moe: Mapping[str, Any]
    mlp_ratio: float = 4
    drop: float = 0.0
    eps: float = 1e-5
    remat: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: FeatureMap, train: bool = False) -> Encoded:
        """Encode tokens.

        Args:
            x: [B, h, w, width].
            train: draw from the stream "drop_path" where `drop` is positive, and from "gate" with mixtures.

        Returns:
            The maps of the stages, and what the mixtures report.
        """
        rates = drop_rates(self.drop, sum(self.depths))
        maps: list[jax.Array] = []
        reports: dict[str, Stats] = {}
        for stage, depth in enumerate(self.depths):
            block = {
                "heads": self.heads[stage],
                "window": self.windows[stage],
                "mlp_ratio": self.mlp_ratio,
                "stochastic": train and self.drop > 0,
                "eps": self.eps,
                "dtype": self.dtype,
            }
            moe = {**self.moe, "train": train} if stage in self.moe_stages else {}
            done = sum(self.depths[:stage])
            layers = Stage(block, moe, stage > 0, self.remat, name=f"stage{stage}")
            x, merged, stats = layers(x, rates[done : done + depth])
            maps.append(x)
            if stats:
                reports[f"stage{stage}"] = stats
        return Encoded(tuple(maps), layer_norm(self.eps, "norm")(x).astype(self.dtype), reports, merged)
