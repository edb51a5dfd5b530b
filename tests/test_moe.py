"""The mixture of experts against a numpy twin that serves one token after the other: routing, drops, auxiliary losses,
gradients.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from skysense_jax.nn.attention import gelu
from skysense_jax.nn.moe import AUX, MixtureOfExperts, auxiliary_loss, route

FIELDS = {"experts": 4, "mlp_ratio": 2, "capacity": 1.25, "group": 2, "gate_noise": 1.0, "aux": "tutel"}
PHI = np.vectorize(lambda x: 0.5 * (1 + math.erf(x / math.sqrt(2))))
ERF = np.vectorize(math.erf)


# --------------------------------------------------------------------------------------------------------- numpy twin
def np_softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def np_route(scores, places):
    """(expert, slot, kept) of each token: tokens come up by their best score, and take their expert's next place."""
    expert = scores.argmax(-1)
    slot, served = np.zeros(len(scores), int), dict.fromkeys(range(scores.shape[1]), 0)
    for token in sorted(range(len(scores)), key=lambda t: (-scores[t].max(), t)):
        slot[token] = served[expert[token]]
        served[expert[token]] += 1
    return expert, slot, slot < places


def np_variation(x):
    return x.var(ddof=1) / (x.mean() ** 2 + 1e-10)


def np_aux(logits, noisy, noise, kind):
    experts = logits.shape[1]
    p, s, expert = np_softmax(logits), np_softmax(noisy), noisy.argmax(-1)
    if kind == "gshard":
        return experts * sum((expert == e).mean() * s[:, e].mean() for e in range(experts))
    threshold = noisy[np.arange(len(noisy)), expert][:, None]
    load = PHI(((p if kind == "tutel" else logits) - threshold) / noise).sum(0)
    return (np_variation(p.sum(0)) + np_variation(load)) / 2


def np_expert(params, e, x):
    hidden = x @ params["fc1"][e] + params["fc1_bias"][e]
    return (hidden * 0.5 * (1 + ERF(hidden / math.sqrt(2)))) @ params["fc2"][e] + params["fc2_bias"][e]


def np_layer(params, x, places):
    """Outputs [T,C] of a group without noise."""
    logits = x @ params["gate"]
    scores = np_softmax(logits)
    expert, _, kept = np_route(scores, places)
    out = [
        scores[t, e] * np_expert(params, e, x[t]) if k else 0 * x[t]
        for t, (e, k) in enumerate(zip(expert, kept, strict=True))
    ]
    return np.stack(out), expert, kept, logits


# ---------------------------------------------------------------------------------------------------------------- data
def tokens(batch=4, side=3, channels=6, seed=0):
    return np.random.default_rng(seed).standard_normal((batch, side, side, channels)).astype(np.float32)


def parameters(layer, x, seed=1):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: layer.init({"params": jax.random.key(0), "gate": jax.random.key(0)}, x))["params"]
    return jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(np.float32), shapes)


def wide(params):
    return jax.tree.map(lambda p: p.astype(np.float64), params)


def close(a, b, tol=2e-5):
    np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=tol, atol=tol)


# --------------------------------------------------------------------------------------------------------------- tests
@pytest.mark.parametrize("count, experts, places", [(1, 3, 1), (24, 4, 3), (24, 4, 24), (17, 2, 9)])
def test_routing_serves_the_highest_scores_first(count, experts, places):
    scores = np_softmax(np.random.default_rng(count).standard_normal((count, experts))).astype(np.float32)
    scores[count // 2] = scores[0]  # equal scores: the earlier token
    routing = jax.jit(route, static_argnums=1)(scores, places)
    expert, slot, kept = np_route(scores, places)
    np.testing.assert_array_equal(routing.expert, expert)
    np.testing.assert_array_equal(routing.slot, slot)
    np.testing.assert_array_equal(routing.kept, kept)
    close(routing.gate, scores.max(-1), 0)
    filled = {(e, s): t for t, (e, s, k) in enumerate(zip(expert, slot, kept, strict=True)) if k}
    taken = np.asarray(routing.taken)
    assert {(e, s): int(routing.source[e, s]) for e, s in zip(*np.nonzero(taken), strict=True)} == filled


@pytest.mark.parametrize("kind", AUX)
def test_auxiliary_losses(kind):
    rng = np.random.default_rng(0)
    logits = 0.3 * rng.standard_normal((24, 4))
    noisy = logits + 0.25 * rng.standard_normal((24, 4))
    ours = auxiliary_loss(jnp.asarray(logits, jnp.float32), jnp.asarray(noisy, jnp.float32), 0.25, kind)
    close(ours, np_aux(logits, noisy, 0.25, kind))


def test_evaluation_drops_nothing_and_does_not_depend_on_the_batch():
    x, layer = tokens(), MixtureOfExperts(**FIELDS)
    params = parameters(layer, x)
    run = jax.jit(lambda x: layer.apply({"params": params}, x))
    out, stats = run(x)
    groups = [np_layer(wide(params), image, 9) for image in x.reshape(4, 9, 6).astype(np.float64)]
    close(out.reshape(4, 9, 6), [g[0] for g in groups])
    close(stats["aux"], np.mean([np_aux(g[3], g[3], 0.25, "tutel") for g in groups]))
    close(stats["load"], [np.mean([g[1] == e for g in groups]) for e in range(4)])
    assert stats["dropped"] == 0
    close(out[2:3], run(x[2:3])[0], 1e-6)


@pytest.mark.parametrize("capacity, places", [(1.25, 6), (0.5, 2)])
def test_training_routes_groups_and_drops_what_finds_no_place(capacity, places):
    """Without noise, which leaves the gshard loss; ceil(18 / 4) = 5 tokens an expert."""
    x, fields = tokens(), {"capacity": capacity, "gate_noise": 0, "aux": "gshard"}
    layer = MixtureOfExperts(**FIELDS | fields, train=True)
    params = parameters(layer, x)
    out, stats = jax.jit(lambda x: layer.apply({"params": params}, x))(x)
    groups = [np_layer(wide(params), group, places) for group in x.reshape(2, 18, 6).astype(np.float64)]
    kept = np.concatenate([g[2] for g in groups])
    assert 0 < (~kept).sum() < 36
    close(out.reshape(2, 18, 6), [g[0] for g in groups])
    assert not np.any(np.asarray(out).reshape(36, 6)[~kept])
    close(stats["dropped"], (~kept).mean(), 1e-6)
    close(stats["aux"], np.mean([np_aux(g[3], g[3], None, "gshard") for g in groups]))


def test_gradients_are_those_of_every_expert_run_on_every_token():
    x, layer = tokens(2), MixtureOfExperts(**FIELDS | {"gate_noise": 0, "aux": "gshard", "capacity": 0.8}, train=True)
    params = parameters(layer, x)
    cotangent = tokens(2, seed=5)
    _, expert, kept, _ = np_layer(wide(params), x.reshape(18, 6).astype(np.float64), 4)
    assert not kept.all()

    def sparse(params, x):
        out, stats = layer.apply({"params": params}, x)
        return jnp.sum(out * cotangent) + stats["aux"]

    def dense(params, x):
        flat = x.reshape(-1, 6)
        logits = flat @ params["gate"]
        scores = jax.nn.softmax(logits)
        hidden = gelu(jnp.einsum("tc,ech->teh", flat, params["fc1"]) + params["fc1_bias"])
        every = jnp.einsum("teh,ehc->tec", hidden, params["fc2"]) + params["fc2_bias"]
        chosen = every[np.arange(18), expert] * scores[np.arange(18), expert][:, None] * kept[:, None]
        return jnp.sum(chosen.reshape(x.shape) * cotangent) + auxiliary_loss(logits, logits, 0, "gshard")

    ours, wanted = (jax.jit(jax.grad(f, argnums=(0, 1)))(params, x) for f in (sparse, dense))
    jax.tree.map(lambda a, b: close(a, b, 1e-4), ours, wanted)


def test_one_expert_is_the_dense_mlp_and_equal_experts_are_too_up_to_the_gate():
    x = tokens(1)
    one = MixtureOfExperts(**FIELDS | {"experts": 1, "aux": "gshard"})
    params = parameters(one, x)
    dense = np_expert(wide(params), 0, x.reshape(9, 6).astype(np.float64))
    close(one.apply({"params": params}, x)[0].reshape(9, 6), dense)
    equal = {k: np.repeat(v, 4, 0) for k, v in params.items() if k != "gate"}
    equal["gate"] = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    gate = np_softmax(x.reshape(9, 6) @ equal["gate"]).max(-1, keepdims=True)
    close(MixtureOfExperts(**FIELDS).apply({"params": equal}, x)[0].reshape(9, 6), gate * dense)


def test_noise_changes_the_routing_in_training_only_and_repeats_with_its_key():
    x, layer = tokens(), MixtureOfExperts(**FIELDS, train=True)
    params = parameters(layer, x)
    params["gate"] *= 0.01
    run = jax.jit(lambda key: layer.apply({"params": params}, x, rngs={"gate": key}))
    first, again, other = (run(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first[0], again[0])
    assert np.abs(first[0] - other[0]).max() > 0
    assert np.isfinite(first[1]["aux"])


def test_nothing_is_as_large_as_tokens_times_experts_times_places():
    x, layer = tokens(2, 8, 2), MixtureOfExperts(**FIELDS, train=True)  # 128 tokens, 4 experts of 40 places
    params = parameters(layer, x)

    def loss(params):
        out, stats = layer.apply({"params": params}, x, rngs={"gate": jax.random.key(0)})
        return jnp.sum(out) + stats["aux"]

    largest = max(
        math.prod(variable.aval.shape)
        for jaxpr in every_jaxpr(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)
        for equation in jaxpr.eqns
        for variable in equation.outvars
    )
    assert 4 * 40 * 4 <= largest < 128 * 4 * 40 / 4


def every_jaxpr(jaxpr):
    yield jaxpr
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from every_jaxpr(inner)


def test_experts_over_a_mesh_give_the_same():
    """Groups over one axis, experts over the other: the same outputs and gradients as on one device."""
    x, layer = tokens(), MixtureOfExperts(**FIELDS, train=True)
    params = parameters(layer, x)

    def loss(params, x):
        out, stats = layer.apply({"params": params}, x, rngs={"gate": jax.random.key(0)})
        return jnp.sum(out**2) + stats["aux"], stats

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    mesh = jax.make_mesh((2, 4), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
    spread = {
        name: jax.device_put(p, NamedSharding(mesh, PartitionSpec(None if name == "gate" else "expert")))
        for name, p in params.items()
    }
    sharded = step(spread, jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))))
    jax.tree.map(lambda a, b: close(np.linalg.norm(a - b) / np.linalg.norm(b), 0, 1e-5), sharded, step(params, x))


@pytest.mark.parametrize(
    "fields, train, message",
    [
        ({"aux": "switch"}, False, "model.moe.aux must be one of tutel, vmoe, gshard, got 'switch'"),
        ({"gate_noise": 0}, True, "model.moe.aux 'tutel' compares experts under noise"),
        ({"experts": 1}, False, "two experts or more"),
        ({"group": 3}, True, "a batch of 4 images is no multiple of model.moe.group = 3"),
        ({"capacity": 0.1}, True, "model.moe.capacity 0.1 leaves an expert no place"),
    ],
)
def test_what_is_refused(fields, train, message):
    layer = MixtureOfExperts(**FIELDS | fields, train=train)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: layer.init({"params": jax.random.key(0), "gate": jax.random.key(0)}, tokens()))
