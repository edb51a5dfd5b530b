"""Heads on top of the encoders: the UP head that brings ViT maps to the common grid, and the DINO projection head."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from skysense_jax.nn.attention import dense, gelu, l2_normalise, trunc_normal, wide
from skysense_jax.nn.patch import kaiming_normal, pixel_shuffle


class UPHead(nn.Module):
    """1x1 convolution to width*scale^2 channels, then pixel shuffle: [B,h,w,Cin] -> [B,h*scale,w*scale,width]
    (SkySense release; SimMIM's decoder, which starts differently, is the same module).
    """

    width: int
    scale: int
    dtype: Any = jnp.float32
    kernel_init: Any = kaiming_normal
    bias_init: Any = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = dense(
            self.width * self.scale**2, "proj", self.dtype, kernel_init=self.kernel_init, bias_init=self.bias_init
        )(x)
        return pixel_shuffle(x, self.scale)


def unit_prototypes(v: jax.Array) -> jax.Array:
    """The last layer's weight with the gain fixed at 1: [bottleneck, prototypes] -> same, columns of length 1."""
    return v * jax.lax.rsqrt(jnp.sum(v * v, axis=0, keepdims=True))


class DINOHead(nn.Module):
    """MLP with exact GELU, L2 normalisation, weight-normalised linear layer (facebookresearch/dino,
    vision_transformer.DINOHead).

    x: [...,C] -> logits [...,prototypes] float32. layers: linear layers of the MLP (1: a single linear map to the
    bottleneck).
    Parameters mlp0.., last_layer_v [bottleneck, prototypes] and, with gain=True, last_layer_g [prototypes]; without it
    the weight norm's gain is fixed at 1, as DINO trains it. bottleneck=True stops before the last layer: normalised
    [...,bottleneck] float32, for a loss that never holds all logits. remat: see objectives.distillation.through_heads.
    """

    hidden: int
    bottleneck: int
    prototypes: int
    layers: int = 3
    gain: bool = False
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, bottleneck: bool = False) -> jax.Array:
        widths = [self.hidden] * (max(self.layers, 1) - 1) + [self.bottleneck]
        for i, width in enumerate(widths):
            # DINO's 0.02 is 0.9 / sqrt(inputs) at its width of 2048; without the gain the normalisation below divides
            # by almost nothing in narrow heads, and the first gradients are thousands of times the later ones.
            layer = dense(width, f"mlp{i}", self.dtype, kernel_init=nn.initializers.lecun_normal())
            x = layer(gelu(x) if i else x.astype(self.dtype))
        x = l2_normalise(x)
        if bottleneck:
            return x
        v = self.param("last_layer_v", trunc_normal, (self.bottleneck, self.prototypes), jnp.float32)
        weight = unit_prototypes(v.astype(wide(self.dtype)))
        if self.gain:
            weight = weight * self.param("last_layer_g", nn.initializers.ones, (self.prototypes,), jnp.float32)
        return jnp.einsum(
            "...c,ck->...k", x.astype(self.dtype), weight.astype(self.dtype), preferred_element_type=wide(self.dtype)
        )
