"""Swin-V2 as the SkySense release builds it: cosine window attention, residual post-norm, extra norms.

The semantics are those of mmcls 0.25.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from skysense_jax.core.shapes import FeatureMap, Image, Scalar, Windows
from skysense_jax.nn.attention import dense, drop_path, drop_rates, gelu, layer_norm, wide
from skysense_jax.nn.patch import PatchEmbed, PatchMerging, torch_linear
from skysense_jax.nn.windows import in_windows, region_bias, relative_coords, relative_index
from skysense_jax.ops.unit import unit

BIAS_HIDDEN = 512  # hidden width of the log-CPB network
MAX_LOGIT_SCALE = math.log(100.0)


def stage_plan(depth: int, extra_norm_every: int) -> list[tuple[str, int, int]]:
    """How the blocks of a stage are laid out.

    Between two extra norms, runs of (unshifted, shifted) pairs are scanned; a block without its partner stands alone.

    Args:
        depth: number of blocks.
        extra_norm_every: an extra norm follows block i where (i + 1) % extra_norm_every == 0; 0: never.

    Returns:
        Steps in order, each ("pairs", first block, number of pairs), ("block", i, 1) or ("norm", i, 1).
    """
    plan: list[tuple[str, int, int]] = []
    start = 0
    while start < depth:
        end = depth
        if extra_norm_every:
            end = min(depth, (start // extra_norm_every + 1) * extra_norm_every)
        if start % 2 and start < end:
            plan.append(("block", start, 1))
            start += 1
        if end - start >= 2:
            plan.append(("pairs", start, (end - start) // 2))
            start += (end - start) // 2 * 2
        if start < end:
            plan.append(("block", start, 1))
        if extra_norm_every and end % extra_norm_every == 0:
            plan.append(("norm", end - 1, 1))
        start = end
    return plan


class WindowAttention(nn.Module):
    """Scaled cosine attention with the log-CPB bias, inside windows.

    Parameters as in the release: qkv without bias, q_bias, v_bias (keys have none), logit_scale [heads, 1, 1] clamped
    at ln 100 (no gradient above), cpb1 and cpb2 the bias network, proj.

    Attributes:
        heads: number of heads.
        window: side w of a window in cells.
        pretrained_window: see :func:`nn.windows.relative_coords`.
        dtype: of the computation.
    """

    heads: int
    window: int
    pretrained_window: int = 0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Windows, regions: np.ndarray | None) -> Windows:
        """Attend inside each window.

        Args:
            x: [B, windows, w*w, C].
            regions: [windows, w*w] of :func:`nn.windows.shift_regions`, or None.

        Returns:
            The same shape.
        """
        width = x.shape[-1]
        zeros = nn.initializers.zeros
        q_bias = self.param("q_bias", zeros, (width,), jnp.float32)
        v_bias = self.param("v_bias", zeros, (width,), jnp.float32)
        scale = self.param("logit_scale", nn.initializers.constant(math.log(10.0)), (self.heads, 1, 1), jnp.float32)
        qkv = dense(3 * width, "qkv", self.dtype, use_bias=False, kernel_init=torch_linear)(x)
        qkv = qkv + jnp.concatenate([q_bias, jnp.zeros_like(q_bias), v_bias]).astype(self.dtype)
        qkv = qkv.reshape(*x.shape[:-1], 3, self.heads, width // self.heads)
        q, k, v = qkv[..., 0, :, :], qkv[..., 1, :, :], qkv[..., 2, :, :]

        q, k = unit(q, "zero").astype(self.dtype), unit(k, "zero").astype(self.dtype)
        logits = jnp.einsum("bnqhd,bnkhd->bnhqk", q, k, preferred_element_type=wide(self.dtype))
        # where, not minimum: the reference's clamp has gradient exactly 0 above the limit.
        scale = scale.astype(logits.dtype)
        scale = jnp.exp(jnp.where(scale > MAX_LOGIT_SCALE, MAX_LOGIT_SCALE, scale))
        logits = logits * scale + self.position_bias()
        if regions is not None:
            logits = logits + region_bias(regions)
        weights = jax.nn.softmax(logits, axis=-1).astype(self.dtype)
        out = jnp.einsum("bnhqk,bnkhd->bnqhd", weights, v).reshape(x.shape)
        return dense(width, "proj", self.dtype, kernel_init=torch_linear)(out)

    def position_bias(self) -> jax.Array:
        """The bias of the logits, [heads, w*w, w*w] float32 or wider: 16 sigmoid(network(log coordinates)).

        Computed for each relative offset once, then gathered.
        """
        coords = jnp.asarray(relative_coords(self.window, self.pretrained_window))
        hidden = nn.relu(dense(BIAS_HIDDEN, "cpb1", wide(self.dtype), kernel_init=torch_linear)(coords))
        table = dense(self.heads, "cpb2", wide(self.dtype), use_bias=False, kernel_init=torch_linear)(hidden)
        table = 16.0 * jax.nn.sigmoid(table)
        return table[relative_index(self.window)].transpose(2, 0, 1)


class SwinBlock(nn.Module):
    """Residual post-norm block on a map: x + norm1(attn x), x + norm2(mlp x).

    The map is zero-padded to multiples of the window inside the attention; padded cells are *not* masked.

    Attributes:
        heads: number of heads.
        window: side w of a window in cells.
        shifted: roll by half a window, unless the smaller side equals the window and pad_small_map is False.
        mlp_ratio: hidden width of the MLP / C.
        pretrained_window: see :func:`nn.windows.relative_coords`.
        pad_small_map: allow a side smaller than the window.
        before_norm: stochastic depth acts on the branch before its norm (the reference: a dropped branch still adds the
            norm's bias) instead of after it.
        stochastic: draw stochastic depth from the stream "drop_path".
        branch_scale: initial scale of norm1 and norm2; Swin-V2 advises 0.
        eps: of the LayerNorms.
        dtype: of the computation.
    """

    heads: int
    window: int
    shifted: bool
    mlp_ratio: float = 4
    pretrained_window: int = 0
    pad_small_map: bool = False
    before_norm: bool = True
    stochastic: bool = False
    branch_scale: float = 0.0
    eps: float = 1e-5
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: FeatureMap, rate: Scalar | float = 0.0) -> FeatureMap:
        """[B, H, W, C] -> the same shape; rate: of stochastic depth."""
        h = self.windowed(x)
        h = self.norm("norm1", h, rate)
        x = x + h
        h = gelu(dense(int(x.shape[-1] * self.mlp_ratio), "fc1", self.dtype, kernel_init=torch_linear)(x))
        h = dense(x.shape[-1], "fc2", self.dtype, kernel_init=torch_linear)(h)
        return x + self.norm("norm2", h, rate)

    def norm(self, name: str, h: FeatureMap, rate: Scalar | float) -> FeatureMap:
        """LayerNorm of a branch, with stochastic depth before or after it (`before_norm`).

        Args:
            name: of the LayerNorm's parameters.
            h: [B, H, W, C] the branch.
            rate: of stochastic depth.

        Returns:
            The same shape, in `dtype`.
        """
        rng = self.make_rng("drop_path") if self.stochastic else None
        layer = layer_norm(self.eps, name, scale_init=nn.initializers.constant(self.branch_scale))
        if self.before_norm:
            return layer(drop_path(h, rate, rng)).astype(self.dtype)
        return drop_path(layer(h).astype(self.dtype), rate, rng)

    def windowed(self, x: FeatureMap) -> FeatureMap:
        """The attention branch, [B, H, W, C] -> the same shape.

        Raises:
            ValueError: a side is smaller than the window, without pad_small_map.
        """
        _, height, width, _ = x.shape
        window, smaller = self.window, min(height, width)
        if smaller < window and not self.pad_small_map:
            raise ValueError(
                f"a {height}x{width} map is smaller than the window {window}: use a larger input, or pad_small_map"
            )
        shift = window // 2 if self.shifted and (smaller != window or self.pad_small_map) else 0
        attention = WindowAttention(self.heads, window, self.pretrained_window, self.dtype, name="attn")
        return in_windows(x, window, shift, attention)


class SwinPair(nn.Module):
    """An unshifted and a shifted block: the body of the scan.

    Attributes:
        block: fields of SwinBlock.
        remat: recompute a block in the backward pass.
        looped: the scan has more than one step. A loop of one step is compiled as no loop, and then only prevent_cse
            keeps XLA from sharing the recomputed values with the forward pass and so holding all of them (2.7 GiB of
            stage 0).
    """

    block: dict[str, Any]
    remat: bool = False
    looped: bool = True

    @nn.compact
    def __call__(self, x: FeatureMap, rates: jax.Array) -> tuple[FeatureMap, None]:
        """(map, stochastic depth of the two blocks [2]) -> (map, None)."""
        cls = nn.remat(SwinBlock, prevent_cse=not self.looped) if self.remat else SwinBlock
        x = cls(shifted=False, name="plain", **self.block)(x, rates[0])
        return cls(shifted=True, name="shifted", **self.block)(x, rates[1]), None


class SwinStage(nn.Module):
    """Optional merging, then blocks laid out by :func:`stage_plan`.

    Attributes:
        block: fields of SwinBlock.
        merge: begin with the merging.
        extra_norm_every: see :func:`stage_plan`.
        eps: of the merging's and the extra LayerNorms.
        remat: recompute a block in the backward pass.
        dtype: of the computation.
    """

    block: dict[str, Any]
    merge: bool
    extra_norm_every: int = 0
    eps: float = 1e-5
    remat: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: FeatureMap, rates: jax.Array) -> FeatureMap:
        """([B, H, W, C], stochastic depth of each block [depth]) -> the stage's map."""
        if self.merge:
            x = (nn.remat(PatchMerging) if self.remat else PatchMerging)(self.eps, self.dtype, name="downsample")(x)
        single = nn.remat(SwinBlock) if self.remat else SwinBlock
        for kind, first, count in stage_plan(rates.shape[0], self.extra_norm_every):
            if kind == "pairs":
                pairs = nn.scan(
                    SwinPair,
                    variable_axes={"params": 0},
                    split_rngs={"params": True, "drop_path": True},
                    length=count,
                    metadata_params={nn.PARTITION_NAME: "layers"},
                )
                x, _ = pairs(self.block, self.remat, count > 1, name=f"pairs{first}")(
                    x, rates[first : first + 2 * count].reshape(count, 2)
                )
            elif kind == "block":
                x = single(shifted=bool(first % 2), name=f"block{first}", **self.block)(x, rates[first])
            else:
                x = layer_norm(self.eps, f"extra_norm{first}", self.remat)(x).astype(self.dtype)
        return x


class SwinTransformerV2(nn.Module):
    """The HR encoder.

    Attributes:
        width: channels of the first stage; each stage doubles them.
        patch: side of a patch in pixels.
        depths, heads, windows, pretrained_windows: one value per stage.
        drop: stochastic depth of the last block, linear from 0 over all blocks.
        outputs: indices of the stages to return.
        eps: of the LayerNorms.
        remat: recompute blocks in the backward pass.
        dtype: of the computation.
        mlp_ratio, extra_norm_every, pad_small_map, before_norm, branch_scale: see SwinBlock and :func:`stage_plan`.
    """

    width: int
    patch: int
    depths: Sequence[int]
    heads: Sequence[int]
    windows: Sequence[int]
    pretrained_windows: Sequence[int]
    mlp_ratio: float = 4
    extra_norm_every: int = 0
    pad_small_map: bool = False
    drop: float = 0.0
    before_norm: bool = True
    branch_scale: float = 0.0
    outputs: Sequence[int] = (0, 1, 2, 3)
    eps: float = 1e-5
    remat: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Image, train: bool = False) -> tuple[FeatureMap, ...]:
        """Encode images.

        Args:
            x: [B, H, W, Cin].
            train: draw stochastic depth from the stream "drop_path".

        Returns:
            One map [B, H_i, W_i, width * 2^i] per index of `outputs`, each through its norm.
        """
        x = PatchEmbed(self.width, self.patch, self.dtype, name="patch_embed")(x)
        x = layer_norm(self.eps, "patch_norm", self.remat)(x).astype(self.dtype)
        rates = drop_rates(self.drop, sum(self.depths))
        maps = []
        for stage, depth in enumerate(self.depths):
            block = {
                "heads": self.heads[stage],
                "window": self.windows[stage],
                "mlp_ratio": self.mlp_ratio,
                "pretrained_window": self.pretrained_windows[stage],
                "pad_small_map": self.pad_small_map,
                "before_norm": self.before_norm,
                "branch_scale": self.branch_scale,
                "stochastic": train and self.drop > 0,
                "eps": self.eps,
                "dtype": self.dtype,
            }
            done = sum(self.depths[:stage])
            layers = SwinStage(
                block, stage > 0, self.extra_norm_every, self.eps, self.remat, self.dtype, name=f"stage{stage}"
            )
            x = layers(x, rates[done : done + depth])
            if stage in self.outputs:
                maps.append(layer_norm(self.eps, f"norm{stage}", self.remat)(x).astype(self.dtype))
        return tuple(maps)
