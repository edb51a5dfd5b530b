"""Attention and its small companions: masked softmax attention, float32 LayerNorm, the MLP, DropPath."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from skysense_jax.core.sharding import gathered

MASKED = -1e30
"""Logit of a masked key: exp underflows to exactly 0 in float32, and a finite number keeps gradients finite."""


def wide(dtype: Any) -> Any:
    """The dtype for logits, softmax, norms: float32 for bfloat16 and float32 computation, float64 for float64 (parity
    runs).
    """
    return jnp.promote_types(dtype, jnp.float32)


trunc_normal = nn.initializers.truncated_normal(0.02)
tiny_normal = nn.initializers.normal(1e-6)
linear_init = nn.initializers.variance_scaling(0.41, "fan_in", "truncated_normal")
"""Truncated normal of deviation 0.64 / sqrt(inputs): the release's 0.02 at its width of 1024. A fixed 0.02 leaves the
branches of narrow models near zero: a fused token that is almost the same everywhere, a self-distillation that
collapses.
"""


def dense(features: int, name: str, dtype: Any, **kwargs: Any) -> nn.Dense:
    """A linear layer computing in `dtype` over float32 parameters (`linear_init` and zero bias unless told)."""
    kwargs.setdefault("kernel_init", linear_init)
    return nn.Dense(features, dtype=dtype, param_dtype=jnp.float32, name=name, dot_general=rows_dot, **kwargs)


def rows_dot(x: jax.Array, kernel: jax.Array, dims: Any, precision: Any = None) -> jax.Array:
    """The product of a linear layer over rows: [..., C] x [C, F] -> [..., F], through two-dimensional operands.

    The same numbers as without the reshape. The kernel's gradient contracts over all leading axes; XLA's CPU backend
    has a fast product only where that is a single one (3x less time of forward and backward, measured at widths 64 to
    256).
    """
    kernel = gathered(kernel, x)
    out = jax.lax.dot_general(x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())), precision=precision)
    return out.reshape(*x.shape[:-1], kernel.shape[-1])


def layer_norm(eps: float, name: str, remat: bool = False, **kwargs: Any) -> nn.LayerNorm:
    """LayerNorm over the last axis, in float32 (its float32 parameters promote bfloat16); two-pass variance, as the
    eps probes need. remat: keep its input for the backward pass, not its float32 copies; inside a rematerialised block
    there is nothing to gain.
    """
    return (nn.remat(nn.LayerNorm) if remat else nn.LayerNorm)(
        epsilon=eps, dtype=None, param_dtype=jnp.float32, use_fast_variance=False, name=name, **kwargs
    )


def gelu(x: jax.Array) -> jax.Array:
    """Exact (erf) GELU; the tanh form differs by up to 5e-4."""
    return jax.nn.gelu(x, approximate=False)


def l2_normalise(x: jax.Array, eps: float = 1e-12) -> jax.Array:
    """x / max(|x|, eps) over the last axis, in float32.

    A zero vector stays zero *and gets a zero gradient*: torch's F.normalize gives it g / eps, which is multiplied by
    exact zeros wherever the reference meets one (padding) and would explode a bias wherever it is not.
    """
    x = x.astype(wide(x.dtype))
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    alive = square > eps * eps
    return jnp.where(alive, x * jax.lax.rsqrt(jnp.where(alive, square, 1.0)), 0.0)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Softmax attention. q, k, v: [..., n, heads, d], q already scaled; mask: [..., n] bool, False = key not to be
    seen.

    Logits and softmax in float32. Returns [..., n, heads, d] in v's dtype. At least one key of every row must be
    visible.
    """
    logits = jnp.einsum("...qhd,...khd->...hqk", q, k, preferred_element_type=wide(q.dtype))
    if mask is not None:
        logits = jnp.where(mask[..., None, None, :], logits, MASKED)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("...hqk,...khd->...qhd", weights, v)


class SelfAttention(nn.Module):
    """Multi-head self-attention with biases on all projections (torch.nn.MultiheadAttention; q scaled by 1/sqrt(head
    width)).

    x: [..., n, C] -> [..., n, C] in `dtype`, or [..., 1, C] with first_only: the output at the first token alone, which
    still sees all of them. The columns of `qkv` are q, k, v, each made of `heads` contiguous blocks.
    """

    heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None, first_only: bool = False) -> jax.Array:
        width = x.shape[-1]
        qkv = jnp.split(dense(3 * width, "qkv", self.dtype)(x), 3, axis=-1)
        q, k, v = (part.reshape(*x.shape[:-1], self.heads, width // self.heads) for part in qkv)
        q = q[..., :1, :, :] if first_only else q
        out = attend(q * (width // self.heads) ** -0.5, k, v, mask)
        return dense(width, "proj", self.dtype)(out.reshape(*out.shape[:-2], width))


def drop_path(x: jax.Array, rate: jax.Array | float, rng: jax.Array | None) -> jax.Array:
    """Stochastic depth: zero the whole branch of a sample (leading axis) with probability `rate`, scale the rest by
    1/(1-rate).

    rate may be traced (a scanned input). rng None = evaluation: the identity.
    """
    if rng is None:
        return x
    keep = 1.0 - jnp.asarray(rate, jnp.float32)
    kept = jax.random.bernoulli(rng, keep, (x.shape[0],) + (1,) * (x.ndim - 1))
    return jnp.where(kept, x / keep.astype(x.dtype), jnp.zeros((), x.dtype))


def drop_rates(rate: float, depth: int) -> jax.Array:
    """[depth] float32: 0 to `rate` linearly over the blocks of an encoder."""
    return jnp.linspace(0.0, rate, depth, dtype=jnp.float32)
