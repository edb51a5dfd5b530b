"""Mixture of experts in place of an MLP: each token goes to the one expert its gate prefers, as in Swin-MoE (Tutel).

Tokens are routed in groups, which stand for what one device holds in the reference: a group's experts have a limited
number of places, the tokens with the highest scores are served first, the others get nothing from the layer. Dispatch
sorts the tokens by expert and gathers; nothing is ever as large as tokens x experts x places.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from skysense_jax.core.shapes import FeatureMap, Scalar, Tokens
from skysense_jax.core.sharding import by_expert, gathered
from skysense_jax.nn.attention import gelu, trunc_normal, wide

AUX = ("tutel", "vmoe", "gshard")
"""Forms of the auxiliary loss, see :func:`auxiliary_loss`."""


class Routing(NamedTuple):
    """Where the T tokens of a group go.

    Attributes:
        expert: [T] int32, the expert of each token.
        gate: [T] the expert's score.
        slot: [T] int32, the token's place at its expert.
        kept: [T] bool, False where the expert had no place left.
        source: [E, places] int32, the token at each place.
        taken: [E, places] bool, whether a token is at the place.
    """

    expert: jax.Array
    gate: jax.Array
    slot: jax.Array
    kept: jax.Array
    source: jax.Array
    taken: jax.Array


def route(scores: jax.Array, places: int) -> Routing:
    """Top-1 routing, batch-prioritised: an expert serves its tokens from the highest score down.

    Args:
        scores: [T, E]. Tokens with equal scores are served in their order.
        places: of each expert.

    Returns:
        The routing.
    """
    tokens, experts = scores.shape
    expert, gate = jnp.argmax(scores, axis=-1).astype(jnp.int32), largest(scores)[:, 0]
    index = jnp.arange(tokens, dtype=jnp.int32)
    _, _, order = jax.lax.sort((expert, -jax.lax.stop_gradient(gate), index), num_keys=3)
    count = jnp.sum(expert[:, None] == jnp.arange(experts), axis=0, dtype=jnp.int32)
    first = jnp.cumsum(count) - count
    slot = jnp.zeros_like(index).at[order].set(index - first[expert[order]])
    place = jnp.arange(places, dtype=jnp.int32)
    source = order[jnp.minimum(first[:, None] + place, tokens - 1)]
    return Routing(expert, gate, slot, slot < places, source, place < count[:, None])


def largest(x: jax.Array) -> jax.Array:
    """The largest entry of each row, [T, E] -> [T, 1], taken by its index.

    Not as a maximum: the gradient of a maximum looks for entries equal to it, and there are none (0 / 0) where a
    partitioned program computes `x` twice and rounds it differently.
    """
    return jnp.take_along_axis(x, jnp.argmax(x, axis=-1, keepdims=True), axis=-1)


def squared_variation(x: jax.Array) -> jax.Array:
    """Squared coefficient of variation of [E] numbers, with the unbiased variance: a scalar."""
    return jnp.var(x, ddof=1) / (jnp.mean(x) ** 2 + 1e-10)


def auxiliary_loss(logits: jax.Array, noisy: jax.Array, noise: float, kind: str) -> Scalar:
    """What keeps the experts of a group evenly used.

    "vmoe"    half the squared variation of the importance (sum of probabilities) plus half that of the load (how
              probably each token would choose the expert under another noise); the load compares logits with the noisy
              logit of the chosen expert
    "tutel"   the same, but the load compares *probabilities* with that logit, as Tutel's load_importance_loss does
    "gshard"  E x sum over experts of the share of tokens x the mean probability

    Args:
        logits: [T, E] of the gate.
        noisy: [T, E] the same with the gate's noise.
        noise: deviation of the noise.
        kind: one of AUX.

    Returns:
        A scalar.
    """
    experts = logits.shape[-1]
    if kind == "gshard":
        scores = jax.nn.softmax(noisy, axis=-1)
        share = jnp.mean(jnp.argmax(scores, axis=-1)[:, None] == jnp.arange(experts), axis=0, dtype=scores.dtype)
        return experts * jnp.sum(share * jnp.mean(scores, axis=0))
    probabilities = jax.nn.softmax(logits, axis=-1)
    distance = (probabilities if kind == "tutel" else logits) - largest(noisy)
    load = jnp.sum(jax.scipy.special.ndtr(distance / noise), axis=0)
    return (squared_variation(jnp.sum(probabilities, axis=0)) + squared_variation(load)) / 2


class MixtureOfExperts(nn.Module):
    """Experts in place of an MLP, on a map.

    In training `group` images are routed together, an expert has int(capacity * ceil(tokens / E)) places, and the
    gate's logits get noise of deviation gate_noise / E (from the stream "gate"). In evaluation there is no noise and
    room for every token, so that an image's result does not depend on its batch; that costs E times the products of one
    MLP. A token gets its score times its expert's output; the scores are not renormalised. Parameters: gate [C, E]
    without bias, fc1 [E, C, h], fc1_bias, fc2 [E, h, C], fc2_bias; logits and scores in float32.

    Attributes:
        experts: their number E.
        mlp_ratio: hidden width h / C.
        capacity: factor on the places of an expert.
        group: images that are routed together.
        gate_noise: deviation of the gate's noise, times E.
        aux: kind of the auxiliary loss, one of AUX.
        train: training or evaluation.
        dtype: of the computation.
    """

    experts: int
    mlp_ratio: float
    capacity: float
    group: int
    gate_noise: float
    aux: str
    train: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: FeatureMap) -> tuple[FeatureMap, dict[str, jax.Array]]:
        """Route the map's tokens through the experts.

        Args:
            x: [B, h, w, C].

        Returns:
            (the same shape; means over the groups: {"aux": scalar, "load": [E] share of the tokens each expert is
            chosen by, "dropped": share of the tokens for which no place was left}).

        Raises:
            ValueError: the kind of the auxiliary loss is unknown, or needs noise and there is none; the batch is no
                multiple of the group.
        """
        batch, height, width, channels = x.shape
        group = self.group if self.train else 1
        count = group * height * width
        places = int(self.capacity * -(-count // self.experts)) if self.train else count
        self.check(batch, group, places)
        tokens = x.reshape(batch // group, count, channels)
        gate = self.param("gate", trunc_normal, (channels, self.experts), jnp.float32)
        logits = jnp.einsum("gtc,ce->gte", tokens.astype(wide(self.dtype)), gate, precision=jax.lax.Precision.HIGHEST)
        noise, noisy = self.gate_noise / self.experts, logits
        if self.train and noise:
            noisy = logits + noise * jax.random.normal(self.make_rng("gate"), logits.shape, logits.dtype)
        routing = jax.vmap(lambda scores: route(scores, places))(jax.nn.softmax(noisy, axis=-1))
        out = self.dispatched(tokens, routing)
        stats = {
            "aux": jnp.mean(jax.vmap(lambda a, b: auxiliary_loss(a, b, noise, self.aux))(logits, noisy)),
            "load": jnp.mean(routing.expert[..., None] == jnp.arange(self.experts), axis=(0, 1), dtype=jnp.float32),
            "dropped": jnp.mean(~routing.kept, dtype=jnp.float32),
        }
        return out.reshape(x.shape), stats

    def check(self, batch: int, group: int, places: int) -> None:
        """Refuse fields or a batch that do not fit.

        Args:
            batch: images of the batch.
            group: images that are routed together.
            places: of each expert.

        Raises:
            ValueError: they do not fit.
        """
        if self.aux not in AUX:
            raise ValueError(f"model.moe.aux must be one of {', '.join(AUX)}, got {self.aux!r}")
        if self.aux != "gshard" and (self.gate_noise <= 0 or self.experts < 2):
            raise ValueError(
                f"model.moe.aux {self.aux!r} compares experts under noise: it needs model.moe.gate_noise "
                "> 0 and two experts or more"
            )
        if places < 1:
            raise ValueError(f"model.moe.capacity {self.capacity} leaves an expert no place")
        if batch % group:
            raise ValueError(f"a batch of {batch} images is no multiple of model.moe.group = {group}")

    def dispatched(self, tokens: Tokens, routing: Routing) -> Tokens:
        """The experts' outputs: tokens gathered into [G, E, places, C], through the MLPs, gathered back.

        Args:
            tokens: [G, T, C] of G groups.
            routing: of all groups, each field with G in front.

        Returns:
            [G, T, C] in `dtype`, 0 for tokens without a place.
        """
        channels = tokens.shape[-1]

        def layer(name: str, x: jax.Array, features: int) -> jax.Array:
            shape, zeros = (self.experts, x.shape[-1], features), nn.initializers.zeros
            kernel = self.param(name, trunc_normal, shape, jnp.float32).astype(self.dtype)
            bias = self.param(f"{name}_bias", zeros, (self.experts, features), jnp.float32).astype(self.dtype)
            return by_expert(jnp.einsum("gepc,ecf->gepf", x, gathered(kernel, x, experts=True)) + bias[:, None], 1)

        pick = jax.vmap(lambda array, index: array[index])
        packed = pick(tokens, routing.source)
        packed = by_expert(jnp.where(routing.taken[..., None], packed, 0), 1)
        packed = layer("fc2", gelu(layer("fc1", packed, int(channels * self.mlp_ratio))), channels)
        slot = jnp.where(routing.kept, routing.slot, 0)  # the slot of a dropped token is never used
        out = pick(packed.reshape(len(packed), -1, channels), routing.expert * packed.shape[2] + slot)
        return (out * jnp.where(routing.kept, routing.gate, 0)[..., None]).astype(self.dtype)
