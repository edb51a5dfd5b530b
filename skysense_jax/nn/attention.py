"""Attention and its small companions: masked softmax attention, float32 LayerNorm, the MLP, DropPath."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from skysense_jax.core.shapes import Features, Key, Mask, Scalar, Tokens
from skysense_jax.core.sharding import gathered

MASKED = -1e30
"""Logit of a masked key: exp underflows to exactly 0 in float32, and a finite number keeps gradients finite."""


def wide(dtype: DTypeLike) -> jnp.dtype:
    """The dtype for logits, softmax and norms.

    Args:
        dtype: of the computation.

    Returns:
        float32 for bfloat16 and float32, float64 for float64 (parity runs).
    """
    return jnp.promote_types(dtype, jnp.float32)


trunc_normal = nn.initializers.truncated_normal(0.02)
tiny_normal = nn.initializers.normal(1e-6)
linear_init = nn.initializers.variance_scaling(0.41, "fan_in", "truncated_normal")
"""Truncated normal of deviation 0.64 / sqrt(inputs): the release's 0.02 at its width of 1024.

A fixed 0.02 leaves the branches of narrow models near zero: the fused token is then almost the same everywhere, and
self-distillation collapses.
"""


def dense(features: int, name: str, dtype: DTypeLike, **kwargs: Any) -> nn.Dense:
    """A linear layer that computes in `dtype` over float32 parameters.

    Args:
        features: width of the output.
        name: of the layer's parameters.
        dtype: of the computation.
        kwargs: other fields of flax's Dense. Defaults: `linear_init` for the kernel, a bias that starts at zero.

    Returns:
        The layer, [..., C] -> [..., features].
    """
    kwargs.setdefault("kernel_init", linear_init)
    return nn.Dense(features, dtype=dtype, param_dtype=jnp.float32, name=name, dot_general=rows_dot, **kwargs)


def rows_dot(
    x: Features, kernel: jax.Array, dims: jax.lax.DotDimensionNumbers, precision: jax.lax.PrecisionLike = None
) -> Features:
    """The product of a linear layer over rows, through two-dimensional operands (flax's `dot_general`).

    The numbers are the same as without the reshape. The kernel's gradient contracts over all leading axes; XLA's CPU
    backend has a fast product only where there is a single leading axis (3x less time of forward and backward, measured
    at widths 64 to 256).

    Args:
        x: [..., C].
        kernel: [C, F].
        dims: ignored: the last axis of x and the first of the kernel are contracted.
        precision: of the product (jax.lax.Precision).

    Returns:
        [..., F].
    """
    kernel = gathered(kernel, x)
    out = jax.lax.dot_general(x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())), precision=precision)
    return out.reshape(*x.shape[:-1], kernel.shape[-1])


def layer_norm(eps: float, name: str, remat: bool = False, **kwargs: Any) -> nn.LayerNorm:
    """LayerNorm over the last axis, in float32: its float32 parameters promote bfloat16.

    The variance is computed in two passes, which the eps probes need.

    Args:
        eps: added to the variance.
        name: of the layer's parameters.
        remat: keep the layer's input for the backward pass, not its float32 copies. Inside a rematerialised block there
            is nothing to gain.
        kwargs: other fields of flax's LayerNorm.

    Returns:
        The layer, [..., C] -> [..., C] float32 or wider.
    """
    return (nn.remat(nn.LayerNorm) if remat else nn.LayerNorm)(
        epsilon=eps, dtype=None, param_dtype=jnp.float32, use_fast_variance=False, name=name, **kwargs
    )


def gelu(x: jax.Array) -> jax.Array:
    """Exact (erf) GELU; the tanh form differs by up to 5e-4."""
    return jax.nn.gelu(x, approximate=False)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask | None = None) -> jax.Array:
    """Softmax attention, with logits and softmax in float32.

    Args:
        q: [..., n, heads, d] queries, already scaled.
        k: [..., n, heads, d] keys.
        v: [..., n, heads, d] values.
        mask: [..., n] bool, False = the key is not seen. At least one key of every row must be visible.

    Returns:
        [..., n, heads, d] in v's dtype.
    """
    logits = jnp.einsum("...qhd,...khd->...hqk", q, k, preferred_element_type=wide(q.dtype))
    if mask is not None:
        logits = jnp.where(mask[..., None, None, :], logits, MASKED)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("...hqk,...khd->...qhd", weights, v)


class SelfAttention(nn.Module):
    """Multi-head self-attention with biases on all projections, as torch.nn.MultiheadAttention.

    The columns of `qkv` are q, k, v, each made of `heads` contiguous blocks; q is scaled by 1 / sqrt(head width).

    Attributes:
        heads: number of heads.
        dtype: of the computation.
    """

    heads: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Tokens, mask: Mask | None = None, first_only: bool = False) -> Tokens:
        """Every token's output, or the first one's.

        Args:
            x: [..., n, C].
            mask: [..., n] bool or None, False = the key is not seen.
            first_only: only the output at the first token, which still sees all of them.

        Returns:
            [..., n, C] in `dtype`; [..., 1, C] with first_only.
        """
        width = x.shape[-1]
        qkv = jnp.split(dense(3 * width, "qkv", self.dtype)(x), 3, axis=-1)
        q, k, v = (columns.reshape(*x.shape[:-1], self.heads, width // self.heads) for columns in qkv)
        q = q[..., :1, :, :] if first_only else q
        out = attend(q * (width // self.heads) ** -0.5, k, v, mask)
        return dense(width, "proj", self.dtype)(out.reshape(*out.shape[:-2], width))


def drop_path(x: jax.Array, rate: Scalar | float, rng: Key | None) -> jax.Array:
    """Stochastic depth: some samples lose the whole branch, the others are scaled to make up for it.

    Args:
        x: [samples, ...] a branch.
        rate: probability that a sample's branch becomes 0; the rest is scaled by 1 / (1 - rate). It may be traced (a
            scanned input).
        rng: None = evaluation: the identity.

    Returns:
        The branch, in x's shape and dtype.
    """
    if rng is None:
        return x
    keep = 1.0 - jnp.asarray(rate, jnp.float32)
    kept = jax.random.bernoulli(rng, keep, (x.shape[0],) + (1,) * (x.ndim - 1))
    return jnp.where(kept, x / keep.astype(x.dtype), jnp.zeros((), x.dtype))


def drop_rates(rate: float, depth: int) -> jax.Array:
    """Stochastic depth of the blocks of an encoder: linear from 0 to the last block's.

    Args:
        rate: of the last block.
        depth: number of blocks.

    Returns:
        [depth] float32.
    """
    return jnp.linspace(0.0, rate, depth, dtype=jnp.float32)
