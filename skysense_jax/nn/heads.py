"""Heads on top of the encoders: the UP head that brings ViT maps to the common grid, and the DINO projection head."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Initializer
from jax.typing import DTypeLike

from skysense_jax.core.shapes import FeatureMap, Features, Logits
from skysense_jax.nn.attention import dense, gelu, trunc_normal, wide
from skysense_jax.nn.patch import kaiming_normal, pixel_shuffle
from skysense_jax.ops.unit import unit


class UPHead(nn.Module):
    """1x1 convolution to width * scale^2 channels, then pixel shuffle.

    The SkySense release's UP head. SimMIM's decoder, which starts differently, is the same module.

    Attributes:
        width: channels of the result.
        scale: cells of the result along one cell of the input.
        dtype: of the computation.
        kernel_init, bias_init: how the convolution starts.
    """

    width: int
    scale: int
    dtype: DTypeLike = jnp.float32
    kernel_init: Initializer = kaiming_normal
    bias_init: Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: FeatureMap) -> FeatureMap:
        """[B, h, w, Cin] -> [B, h * scale, w * scale, width]."""
        x = dense(
            self.width * self.scale**2, "proj", self.dtype, kernel_init=self.kernel_init, bias_init=self.bias_init
        )(x)
        return pixel_shuffle(x, self.scale)


def unit_prototypes(v: jax.Array) -> jax.Array:
    """The last layer's weight with the gain fixed at 1: [bottleneck, prototypes] -> same, columns of length 1.

    Weight decay on v therefore changes nothing: the length of its columns is normalised away.
    """
    return unit(v, "zero", axis=0)


class DINOHead(nn.Module):
    """DINO's projection head (facebookresearch/dino, vision_transformer.DINOHead).

    An MLP with exact GELU, L2 normalisation, a weight-normalised linear layer. Parameters: mlp0.., last_layer_v
    [bottleneck, prototypes] and, with gain, last_layer_g [prototypes].

    Attributes:
        hidden: width of the MLP's hidden layers.
        bottleneck: width of the normalised vectors.
        prototypes: number of logits.
        layers: linear layers of the MLP; 1: a single linear map to the bottleneck.
        gain: learn the weight norm's gain; without it the gain is fixed at 1, as DINO trains it.
        remat: see objectives.distillation.through_heads.
        dtype: of the computation.
    """

    hidden: int
    bottleneck: int
    prototypes: int
    layers: int = 3
    gain: bool = False
    remat: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Features, bottleneck: bool = False) -> Features | Logits:
        """Logits of features, or the vectors in front of the last layer.

        Args:
            x: [..., C].
            bottleneck: stop before the last layer, for a loss that never holds all logits.

        Returns:
            [..., prototypes] float32, or [..., bottleneck] float32 vectors of length 1.
        """
        widths = [self.hidden] * (max(self.layers, 1) - 1) + [self.bottleneck]
        for i, width in enumerate(widths):
            # DINO's 0.02 is 0.9 / sqrt(inputs) at its width of 2048; without the gain the normalisation below divides
            # by almost nothing in narrow heads, and the first gradients are thousands of times the later ones.
            layer = dense(width, f"mlp{i}", self.dtype, kernel_init=nn.initializers.lecun_normal())
            x = layer(gelu(x) if i else x.astype(self.dtype))
        x = unit(x, "zero")
        if bottleneck:
            return x
        v = self.param("last_layer_v", trunc_normal, (self.bottleneck, self.prototypes), jnp.float32)
        weight = unit_prototypes(v.astype(wide(self.dtype)))
        if self.gain:
            weight = weight * self.param("last_layer_g", nn.initializers.ones, (self.prototypes,), jnp.float32)
        return jnp.einsum(
            "...c,ck->...k", x.astype(self.dtype), weight.astype(self.dtype), preferred_element_type=wide(self.dtype)
        )
