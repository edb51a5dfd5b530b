"""Cutting a map into patches: corner padding, patch embedding, patch merging and its inverse, pixel shuffle."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Initializer
from jax.typing import DTypeLike

from skysense_jax.core.shapes import FeatureMap, Image
from skysense_jax.nn.attention import dense, layer_norm, trunc_normal

kaiming_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
torch_linear = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""torch.nn.Linear's default: uniform within 1/sqrt(fan in)."""


def conv_bias(fan_in: int) -> Initializer:
    """Initial bias of a torch convolution: uniform within 1/sqrt(fan in)."""
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)


def pad_corner(x: Image, multiple: int) -> Image:
    """An image zero-padded at the bottom and the right (mmcv AdaptivePadding "corner").

    Args:
        x: [B, H, W, C].
        multiple: of which the sides shall be multiples.

    Returns:
        [B, H', W', C].
    """
    bottom, right = -x.shape[1] % multiple, -x.shape[2] % multiple
    return jnp.pad(x, ((0, 0), (0, bottom), (0, right), (0, 0))) if bottom or right else x


def to_patches(x: Image, patch: int) -> jax.Array:
    """An image cut into square patches.

    Args:
        x: [B, H, W, C]; H and W must be multiples of the patch.
        patch: side p of a patch.

    Returns:
        [B, H/p, W/p, p, p, C].
    """
    b, h, w, c = x.shape
    return x.reshape(b, h // patch, patch, w // patch, patch, c).transpose(0, 1, 3, 2, 4, 5)


def pixel_shuffle(x: FeatureMap, scale: int) -> Image:
    """Channels laid out as pixels (torch.nn.PixelShuffle): out[s*y+i, s*x+j, c] = in[y, x, s*s*c + s*i + j].

    Args:
        x: [B, h, w, C*s*s].
        scale: pixels s along one cell.

    Returns:
        [B, h*s, w*s, C].
    """
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, c // scale**2, scale, scale).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(b, h * scale, w * scale, c // scale**2)


class PatchEmbed(nn.Module):
    """Convolution with kernel = stride = patch over the corner-padded input.

    `kernel` is stored HWIO. Computed as a matrix product over patches, which is the same thing and compiles faster.

    Attributes:
        width: of the features.
        patch: side p of a patch in pixels.
        dtype: of the computation.
        kernel_init: how the kernel starts.
    """

    width: int
    patch: int
    dtype: DTypeLike = jnp.float32
    kernel_init: Initializer = kaiming_normal

    @nn.compact
    def __call__(self, x: Image) -> FeatureMap:
        """[B, H, W, Cin] -> [B, ceil(H/p), ceil(W/p), width]."""
        kernel = self.param("kernel", self.kernel_init, (self.patch, self.patch, x.shape[-1], self.width), jnp.float32)
        # As torch's convolution. Not zeros: an invalid region (0 after normalisation) would be the zero vector through
        # the whole encoder, and every LayerNorm multiplies a gradient there by 1 / sqrt(eps), up to infinity.
        bias = self.param("bias", conv_bias(self.patch**2 * x.shape[-1]), (self.width,), jnp.float32)
        patches = to_patches(pad_corner(x.astype(self.dtype), self.patch), self.patch)
        out = patches.reshape(-1, kernel[..., 0].size) @ kernel.astype(self.dtype).reshape(-1, self.width)
        return out.reshape(*patches.shape[:3], self.width) + bias.astype(self.dtype)


class PatchMerging(nn.Module):
    """Swin-V2 downsampling as in mmcv: 2x2 unfold, linear without bias, then LayerNorm.

    The channels of the unfolded vector are ordered c*4 + 2*dy + dx (torch Unfold), unlike Microsoft's concatenation.

    Attributes:
        eps: of the LayerNorm.
        dtype: of the computation.
    """

    eps: float = 1e-5
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: FeatureMap) -> FeatureMap:
        """[B, H, W, C] -> [B, ceil(H/2), ceil(W/2), 2C]."""
        width = 2 * x.shape[-1]
        x = to_patches(pad_corner(x, 2), 2).transpose(0, 1, 2, 5, 3, 4)
        x = x.reshape(*x.shape[:3], 2 * width)
        x = dense(width, "reduction", self.dtype, use_bias=False, kernel_init=torch_linear)(x)
        return layer_norm(self.eps, "norm")(x).astype(self.dtype)


class ConcatMerging(nn.Module):
    """Swin-V1 downsampling as in Microsoft's code: 2x2 concatenation, LayerNorm, linear without bias.

    The channels of the concatenated vector are ordered (2*dx + dy)*C + c, unlike PatchMerging's.

    Attributes:
        eps: of the LayerNorm.
        dtype: of the computation.
    """

    eps: float = 1e-5
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: FeatureMap) -> FeatureMap:
        """[B, H, W, C] -> [B, ceil(H/2), ceil(W/2), 2C]."""
        width = 2 * x.shape[-1]
        x = to_patches(pad_corner(x, 2), 2).transpose(0, 1, 2, 4, 3, 5)
        x = layer_norm(self.eps, "norm")(x.reshape(*x.shape[:3], 2 * width)).astype(self.dtype)
        return dense(width, "reduction", self.dtype, use_bias=False, kernel_init=trunc_normal)(x)
