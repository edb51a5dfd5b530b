"""Mixture of experts in place of an MLP: each token goes to the one expert its gate prefers, as in Swin-MoE (Tutel).

Tokens are routed in groups, which stand for what one device holds in the reference: a group's experts have a limited
number of places, the tokens with the highest scores are served first, the others get nothing from the layer. Dispatch
sorts the tokens by expert and gathers; nothing is ever as large as tokens x experts x places.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from skysense_jax.core.sharding import by_expert, gathered
from skysense_jax.nn.attention import gelu, trunc_normal, wide

AUX = ("tutel", "vmoe", "gshard")
"""Forms of the auxiliary loss, see :func:`auxiliary_loss`."""


class Routing(NamedTuple):
    """Where the T tokens of a group go. expert [T]: the chosen one. gate [T]: its score. slot [T]: the token's place at
    its expert. kept [T]: False where there was none left. source [E,places]: the token at each place. taken
    [E,places]: whether there is one.
    """

    expert: jax.Array
    gate: jax.Array
    slot: jax.Array
    kept: jax.Array
    source: jax.Array
    taken: jax.Array


def route(scores: jax.Array, places: int) -> Routing:
    """Top-1 routing of [T,E] scores, batch-prioritised: an expert serves its tokens from the highest score down, equal
    scores in the order of the tokens.
    """
    tokens, experts = scores.shape
    expert, gate = jnp.argmax(scores, axis=-1).astype(jnp.int32), chosen(scores)[:, 0]
    index = jnp.arange(tokens, dtype=jnp.int32)
    _, _, order = jax.lax.sort((expert, -jax.lax.stop_gradient(gate), index), num_keys=3)
    count = jnp.sum(expert[:, None] == jnp.arange(experts), axis=0, dtype=jnp.int32)
    first = jnp.cumsum(count) - count
    slot = jnp.zeros_like(index).at[order].set(index - first[expert[order]])
    place = jnp.arange(places, dtype=jnp.int32)
    source = order[jnp.minimum(first[:, None] + place, tokens - 1)]
    return Routing(expert, gate, slot, slot < places, source, place < count[:, None])


def chosen(x: jax.Array) -> jax.Array:
    """The largest of each row, [T,E] -> [T,1]. By its place, not as a maximum: that one's gradient looks for values
    equal to it, and finds none (0 / 0) where a partitioned program computes `x` twice and rounds it otherwise.
    """
    return jnp.take_along_axis(x, jnp.argmax(x, axis=-1, keepdims=True), axis=-1)


def squared_variation(x: jax.Array) -> jax.Array:
    """Squared coefficient of variation of [E] numbers, with the unbiased variance."""
    return jnp.var(x, ddof=1) / (jnp.mean(x) ** 2 + 1e-10)


def auxiliary_loss(logits: jax.Array, noisy: jax.Array, noise: float, kind: str) -> jax.Array:
    """What keeps the experts of a group evenly used, a scalar. logits: [T,E]; noisy: the same with the gate's noise;
    noise: its deviation.

    "vmoe": half the squared variation of the importance (sum of probabilities) plus half that of the load (how probably
    each token would choose the expert under another noise); the load compares logits with the chosen noisy logit.
    "tutel": the same, but the load compares *probabilities* with the chosen logit, as Tutel's load_importance_loss
    does.
    "gshard": E x sum over experts of the share of tokens x the mean probability.
    """
    experts = logits.shape[-1]
    if kind == "gshard":
        scores = jax.nn.softmax(noisy, axis=-1)
        share = jnp.mean(jnp.argmax(scores, axis=-1)[:, None] == jnp.arange(experts), axis=0, dtype=scores.dtype)
        return experts * jnp.sum(share * jnp.mean(scores, axis=0))
    probabilities = jax.nn.softmax(logits, axis=-1)
    distance = (probabilities if kind == "tutel" else logits) - chosen(noisy)
    load = jnp.sum(jax.scipy.special.ndtr(distance / noise), axis=0)
    return (squared_variation(jnp.sum(probabilities, axis=0)) + squared_variation(load)) / 2


class MixtureOfExperts(nn.Module):
    """[B,h,w,C] -> (same, {"aux": scalar, "load": [E] share of the tokens each expert is chosen by, "dropped": share of
    the tokens no place was left for}), means over the groups.

    In training `group` images are routed together, an expert has int(capacity * ceil(tokens / E)) places, and the
    gate's logits get noise of deviation gate_noise / E ("gate" stream). In evaluation there is no noise and room for
    everybody, so that an image's result does not depend on its batch; that costs E times the products of one MLP. A
    token gets its score times its expert's output, the score not renormalised. Parameters: gate [C,E] without bias, fc1
    [E,C,h], fc1_bias, fc2 [E,h,C], fc2_bias; logits and scores in float32. Raises ValueError for an unknown `aux`, one
    that needs noise without it, and a batch that is no multiple of the group.
    """

    experts: int
    mlp_ratio: float
    capacity: float
    group: int
    gate_noise: float
    aux: str
    train: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
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
        """Raises ValueError where the fields or the batch do not fit."""
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

    def dispatched(self, tokens: jax.Array, routing: Routing) -> jax.Array:
        """The experts' outputs for [G,T,C] tokens: gathered into [G,E,places,C], through the MLPs, gathered back."""
        channels = tokens.shape[-1]

        def layer(name: str, x: jax.Array, features: int) -> jax.Array:
            shape, zeros = (self.experts, x.shape[-1], features), nn.initializers.zeros
            kernel = self.param(name, trunc_normal, shape, jnp.float32).astype(self.dtype)
            bias = self.param(f"{name}_bias", zeros, (self.experts, features), jnp.float32).astype(self.dtype)
            return by_expert(jnp.einsum("gepc,ecf->gepf", x, gathered(kernel, x, experts=True)) + bias[:, None], 1)

        pick = jax.vmap(lambda rows, at: rows[at])
        packed = pick(tokens, routing.source)
        packed = by_expert(jnp.where(routing.taken[..., None], packed, 0), 1)
        packed = layer("fc2", gelu(layer("fc1", packed, int(channels * self.mlp_ratio))), channels)
        slot = jnp.where(routing.kept, routing.slot, 0)  # a dropped token's is never used
        out = pick(packed.reshape(len(packed), -1, channels), routing.expert * packed.shape[2] + slot)
        return (out * jnp.where(routing.kept, routing.gate, 0)[..., None]).astype(self.dtype)
