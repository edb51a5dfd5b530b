"""The msGFM objective: its loss against numpy, who reconstructs whom, what a sensor's learning rate changes, GFM's
distillation, any mesh, new sensors on old weights, its FLOPs, and that it learns.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skysense_jax import recipes, sensors
from skysense_jax.core import flops, trees, xla_flags
from skysense_jax.core import mesh as meshes
from skysense_jax.data.batches import spec
from skysense_jax.models import msgfm
from skysense_jax.objectives import flops as objective_flops
from skysense_jax.objectives import gfm
from skysense_jax.objectives import msgfm as msgfm_objective
from skysense_jax.run import checkpoint, init_from, metrics, optim, state, step
from skysense_jax.run import plan as plans
from tests.helpers import msgfm_places
from tests.helpers.toy_objective import same

NAMES = msgfm_places.SENSORS
PAIRS = {"hr": "dsm", "dsm": "hr", "s2": "s1", "s1": "s2"}


def config(**objective: Any) -> Any:
    c = msgfm_places.config("")
    for name, value in objective.items():
        c.objective[name] = value
    return c


def batch_of(c: Any, sensor: str, seed: int = 0, paired: Any = None) -> dict[str, Any]:
    """A batch of noise in raw units; some pixels and one band are not measured."""
    contract, rng = plans.make_contract(c), np.random.default_rng(seed)
    shapes = recipes.recipe_of(c).batch_spec(c, contract)
    zeros = lambda leaf: np.zeros(leaf.shape, leaf.dtype)
    batch = jax.tree.map(zeros, shapes, is_leaf=lambda leaf: isinstance(leaf, spec.Leaf))
    batch["sensor"][:] = list(contract["sensors"]).index(sensor)
    batch["paired"][:] = (rng.random(c.data.batch) < 0.7) if paired is None else paired
    for part, name in (("own", sensor), ("pair", PAIRS[sensor])):
        rule = contract["sensors"][name]
        count, one = len(rule["bands"]), batch[part]
        noise = rng.standard_normal((*one["valid"].shape, count))
        one["image"][..., :count] = np.array(rule["mean"]) + np.array(rule["std"]) * noise
        one["valid"][:] = rng.random(one["valid"].shape) < 0.9
        one["bands"][:, :count] = 1
        one["bands"][0, : count - 1] = 0
    batch["place"]["index"][:] = np.arange(c.data.batch)
    return batch


jit = functools.partial(jax.jit, compiler_options=xla_flags.ONCE["cpu"])
"""Programs that run a few times: compiled in less time than optimised."""


def objective_of(c: Any) -> tuple[Any, Any, Any, Any]:
    """(objective, params, teacher, jitted loss(params, teacher, batch, keys))."""
    objective = msgfm_objective.make_objective(c, plans.make_contract(c))
    params, teacher, memory = jit(lambda: objective.init(jax.random.key(1), None))()
    assert memory == {}
    return (
        objective,
        params,
        teacher,
        jit(lambda params, teacher, batch, keys: objective.loss(params, teacher, {}, batch, keys, {})),
    )


@functools.cache
def crossing(cross: float) -> tuple[Any, Any, Any, Any, Any]:
    """(configuration, *objective_of it) for a probability of reconstructing the partner."""
    c = config(cross=cross)
    return c, *objective_of(c)


def keys(seed: int = 0) -> dict[str, jax.Array]:
    return {name: jax.random.fold_in(jax.random.key(seed), i) for i, name in enumerate(("mask", "cross", "encoder"))}


# ---------------------------------------------------------------- the loss


def np_normalised(contract: Any, name: str, part: Any) -> tuple[np.ndarray, np.ndarray]:
    rule = contract["sensors"][name]
    count = len(rule["bands"])
    measured = part["valid"][..., None] * part["bands"][:, None, None, :count]
    image = part["image"][..., :count].astype(np.float64)
    if "datum" in rule:
        for one, use in zip(image, measured > 0):
            one -= np.percentile(one[use], 50, method="lower") if use.any() else 0
    return np.where(measured > 0, (image - rule["mean"]) / np.array(rule["std"]), 0), measured


def np_mask(c: Any, drawn: Any) -> np.ndarray:
    """[B, cells, cells]: the cells whose draws are the lowest are hidden."""
    cells = c.model.img_size // c.objective.mask_cell
    noise = np.asarray(jax.random.uniform(drawn["mask"], (c.data.batch, cells**2)))
    mask = np.zeros(noise.shape, int)
    for row, order in zip(mask, np.argsort(noise, axis=1)):
        row[order[: math.ceil(c.objective.mask_ratio * cells**2)]] = 1
    return mask.reshape(-1, cells, cells)


def np_loss(c: Any, params: Any, batch: Any, drawn: Any) -> dict[str, float]:
    """The pseudo-code of objectives.msgfm in numpy, the network itself from the model."""
    contract, o = plans.make_contract(c), c.objective
    name = list(contract["sensors"])[batch["sensor"][0]]
    model, mask = msgfm.make_model(c.model, contract), np_mask(c, drawn)
    coins = np.asarray(jax.random.bernoulli(drawn["cross"], o.cross, (c.data.batch,)))
    images = {
        name: np_normalised(contract, name, batch["own"]),
        PAIRS[name]: np_normalised(contract, PAIRS[name], batch["pair"]),
    }
    grown = lambda side: np.kron(mask, np.ones((1, side, side), int))

    @jit
    def network(encoder: Any, image: Any, hidden: Any, rng: Any) -> tuple[Any, Any]:
        encoded = model.encode(encoder, model.embed(encoder, name, image, hidden), train=True, rng=rng)
        return {one: model.decode(encoder, one, encoded.final) for one in images}, encoded.moe["stage1"]

    guesses, stats = network(
        params["encoder"], images[name][0].astype(np.float32), grown(o.mask_cell // c.model.patch), drawn["encoder"]
    )
    total, pixels, out, hidden = 0.0, 0.0, {}, grown(o.mask_cell)
    crosses = coins & (batch["paired"] > 0)
    for target, rows in ((name, ~crosses), (PAIRS[name], crosses)):
        guess = np.asarray(guesses[target], np.float64)
        image, measured = images[target]
        use = measured * hidden[..., None] * rows[:, None, None, None]
        error, count = (np.abs(image - guess) * use).sum() / use.shape[-1], use.sum() / use.shape[-1]
        total, pixels = total + error, pixels + count
        out[f"loss/{name}-{target}"] = error / count if count else np.nan
    load = np.asarray(stats["load"], np.float64)
    safe = np.where(load > 0, load, 1)
    out |= {
        "loss/mim": total / (pixels + 1e-5),
        "moe/aux": float(stats["aux"].sum()),
        "cross/share": crosses.mean(),
        "moe/load_entropy": (-(load * np.log(safe)).sum(-1) / np.log(load.shape[-1])).mean(),
        "moe/load_max": load.max(-1).mean(),
        "moe/dropped": float(stats["dropped"].mean()),
    }
    out |= {f"moe/load/{mixture}-{expert}": share for (mixture, expert), share in np.ndenumerate(load)}
    return out | {"loss/total": out["loss/mim"] + o.aux_weight * out["moe/aux"]}


@pytest.mark.parametrize("cross, sensor", [(0.0, "hr"), (0.5, "s2"), (0.5, "dsm"), (1.0, "s1")])
def test_the_loss_is_that_of_numpy(cross, sensor):
    c, _, params, _, loss = crossing(cross)
    batch, drawn = batch_of(c, sensor), keys()
    value, (measured, settle_inputs) = loss(params, {}, batch, drawn)
    wanted = np_loss(c, params, batch, drawn)
    assert settle_inputs == {} and value == measured["loss/total"]
    assert 0 < wanted["cross/share"] < 1 if 0 < cross < 1 else wanted["cross/share"] == cross * batch["paired"].mean()
    for name, number in wanted.items():
        np.testing.assert_allclose(measured[name], number, rtol=2e-5, atol=1e-6, err_msg=name)
    others = [name for name in measured if name.startswith("loss/") and "-" in name and name not in wanted]
    assert len(others) == 6 and all(np.isnan(measured[name]) for name in others)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(NAMES), st.lists(st.booleans(), min_size=8, max_size=8), st.integers(0, 99))
def test_unpaired_images_always_reconstruct_themselves(sensor, paired, seed):
    c, _, params, _, loss = crossing(1.0)
    batch = batch_of(c, sensor, seed, np.array(paired, np.float32))
    first, (measured, _) = loss(params, {}, batch, keys(seed))
    assert measured["cross/share"] == np.mean(paired)
    batch["pair"]["image"][~np.array(paired)] = 1e6  # nobody looks there
    again, _ = loss(params, {}, batch, keys(seed))
    assert first == again and np.isnan(measured[f"loss/{sensor}-{PAIRS[sensor]}"]) == (not any(paired))


def test_gradients_reach_the_parts_that_took_part_and_no_others():
    c, objective, params, _, _ = crossing(1.0)
    gradient = jit(jax.grad(lambda p, batch: objective.loss(p, {}, {}, batch, keys(), {})[0]))
    for paired, decoder in ((0.0, "decoder_s2"), (1.0, "decoder_s1")):
        grads = trees.flatten(gradient(params, batch_of(c, "s2", paired=paired)))
        moved = {name.split("/")[1] for name, leaf in grads.items() if np.abs(leaf).max() > 0}
        assert moved == {"encoder", "mask_token", "embed_s2", decoder}


# ---------------------------------------------------------------- the learning rate of a sensor


def test_the_multiplier_acts_on_the_update_and_on_nothing_else():
    """The same gradient, the same moments; the parameters move by a quarter. (The scale as part of the batch: one
    program.)
    """
    c, objective, params, _, _ = crossing(0.5)
    assert {name: float(objective.lr_scale(batch_of(c, name))) for name in NAMES} == pytest.approx(
        {"hr": 1.0, "s2": 0.25, "s1": 0.25, "dsm": 0.1}
    )
    c = config()
    c.schedule.warmup_steps = 0
    scaled = objective._replace(lr_scale=lambda batch: batch["scale"])
    begin = state.TrainState(jnp.int32(0), params, optim.init(params), {}, {}, jnp.int32(0))
    advance, batch = jit(step.make_step(scaled, c, optim.decay_mask(params))), batch_of(c, "s1")
    (whole, measured), (part, other) = (advance(begin, {**batch, "scale": np.float32(scale)}) for scale in (1, 0.25))
    assert float(other["lr"]) == pytest.approx(0.25 * c.schedule.lr, rel=1e-6)
    assert same(whole.opt, part.opt) and measured["grad_norm"] == other["grad_norm"]
    moved = [
        jax.tree.map(lambda new, old: np.asarray(new, np.float64) - old, end.params, begin.params)
        for end in (whole, part)
    ]
    norm = lambda tree: np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(tree)))
    assert norm(moved[0]) > 0.05 and norm(moved[1]) / norm(moved[0]) == pytest.approx(0.25, rel=1e-5)


def test_a_batch_moves_the_parts_of_its_sensor_and_its_pair_and_what_all_share():
    """After a step of s2 Adam remembers gradients of its parts; a step of hr leaves them bit for bit as they are."""
    c, objective, params, _, _ = crossing(0.5)
    c = config()
    c.schedule.warmup_steps = 0
    begin = state.TrainState(jnp.int32(0), params, optim.init(params), {}, {}, jnp.int32(0))
    advance = jit(step.make_step(objective, c, optim.decay_mask(params)))
    now, taken = begin, {"encoder", "mask_token"}
    for sensor in ("s2", "hr"):
        last, (now, _) = now, advance(now, batch_of(c, sensor))
        for was, new in ((last.params, now.params), (last.opt["mu"], now.opt["mu"]), (last.opt["nu"], now.opt["nu"])):
            moved = {name for name, part in new["encoder"].items() if not same(part, was["encoder"][name])}
            assert moved == taken | {f"embed_{sensor}", f"decoder_{sensor}", f"decoder_{PAIRS[sensor]}"}


# ---------------------------------------------------------------- distillation


def test_distillation_is_that_of_numpy_and_only_for_the_sensor_the_teacher_knows():
    c = config()
    c.objective.distill.weight, c.objective.distill.img_size = 0.5, 20
    contract = plans.make_contract(c)
    objective, params, teacher, loss = objective_of(c)
    batch, drawn = batch_of(c, "hr"), keys()
    value, (measured, _) = loss(params, teacher, batch, drawn)

    own = c.model.copy_and_resolve_references()
    own.moe.stages, own.img_size = (), 20
    network = msgfm.make_model(own, {**contract, "sensors": {"hr": contract["sensors"]["hr"]}})
    image = np_normalised(contract, "hr", batch["own"])[0].astype(np.float32)
    model = msgfm.make_model(c.model, contract)

    @jit
    def merged(taught: Any, encoder: Any, image: Any, large: Any, hidden: Any, rng: Any) -> tuple[Any, Any]:
        tokens = model.embed(encoder, "hr", image, hidden)
        theirs = network.encode(taught, network.embed(taught, "hr", large)).merged
        return model.encode(encoder, tokens, train=True, rng=rng).merged, theirs

    mine, theirs = merged(
        teacher["encoder"],
        params["encoder"],
        image,
        np_stretched(image, 20),
        np.kron(np_mask(c, drawn), np.ones((1, 2, 2), int)),
        drawn["encoder"],
    )
    a, b = (np.asarray(x, np.float64).mean((1, 2)) for x in (mine, theirs))
    a = a @ np.asarray(params["projector"]["kernel"], np.float64) + params["projector"]["bias"]
    cosine = np.mean((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1))
    np.testing.assert_allclose(measured["distill/cosine"], cosine, rtol=2e-5)
    np.testing.assert_allclose(
        value, measured["loss/mim"] + c.objective.aux_weight * measured["moe/aux"] - 0.5 * cosine, rtol=2e-5
    )

    value, (measured, _) = loss(params, teacher, batch_of(c, "s1"), drawn)
    assert np.isnan(measured["distill/cosine"])
    np.testing.assert_allclose(value, measured["loss/mim"] + c.objective.aux_weight * measured["moe/aux"], rtol=1e-6)


def np_stretched(image: np.ndarray, side: int) -> np.ndarray:
    """Bilinear, corners on corners, one axis after the other."""
    for axis in (1, 2):
        at = np.linspace(0, image.shape[axis] - 1, side)
        low = np.minimum(at.astype(int), image.shape[axis] - 2)
        part = (at - low).reshape([-1 if i == axis else 1 for i in range(4)])
        image = np.take(image, low, axis) * (1 - part) + np.take(image, low + 1, axis) * part
    return image.astype(np.float32)


def test_images_are_stretched_as_torch_does():
    torch = pytest.importorskip("torch")
    image = np.random.default_rng(0).standard_normal((2, 12, 12, 3)).astype(np.float32)
    wanted = torch.nn.functional.interpolate(
        torch.tensor(image.transpose(0, 3, 1, 2)), 14, mode="bilinear", align_corners=True
    )
    np.testing.assert_allclose(gfm.stretched(image, 14), wanted.numpy().transpose(0, 2, 3, 1), atol=1e-5)


def fresh_state(objective: Any, seed: int = 0) -> state.TrainState:
    params, teacher, memory = jit(lambda: objective.init(jax.random.key(seed), None))()
    return state.TrainState(jnp.int32(seed), params, optim.init(params), teacher, memory, jnp.int32(0))


def saved(folder: Any, objective: Any, contract: Any, seed: int) -> state.TrainState:
    """A checkpoint of a fresh state."""
    now = fresh_state(objective, seed)
    saver = checkpoint.Saver(folder, keep=1)
    saver.save(now, {}, {"config": {}, "contract": contract})
    saver.close()
    return now


def test_the_teacher_is_the_network_at_the_given_path(tmp_path):
    c = config()
    dense = config()
    dense.model.moe.stages = ()
    theirs = saved(
        tmp_path / "dense", msgfm_objective.make_objective(dense, plans.make_contract(c)), {"sensors": {}}, 5
    )
    saved(tmp_path / "mixed", msgfm_objective.make_objective(c, plans.make_contract(c)), {"sensors": {}}, 5)
    c.objective.distill.weight = 1.0
    fresh = fresh_state(msgfm_objective.make_objective(c, plans.make_contract(c)))
    with pytest.raises(ValueError, match="give config.objective.distill.path"):
        init_from.with_teacher(c, fresh)
    c.objective.distill.path = str(tmp_path / "dense")
    taught = init_from.with_teacher(c, fresh)
    assert set(taught.teacher["encoder"]) == {"encoder", "embed_hr"} and same(taught.params, fresh.params)
    assert same(taught.teacher["encoder"], {name: theirs.params["encoder"][name] for name in ("encoder", "embed_hr")})
    c.objective.distill.path = str(tmp_path / "mixed")
    with pytest.raises(ValueError, match="lacks teacher/encoder/encoder/stage1/pairs0/shifted/fc1/"):
        init_from.with_teacher(c, fresh)


# ---------------------------------------------------------------- a new sensor


def test_a_new_row_of_the_table_goes_on_from_old_weights(tmp_path, monkeypatch):
    c = config()
    old = plans.make_contract(c)
    before = saved(tmp_path, msgfm_objective.make_objective(c, old), old, 5)
    row = sensors.SENSORS["s1"]._replace(name="tir_L8", bands=("T10",), aliases={}, mean=(290.0,), std=(10.0,), pair="")
    monkeypatch.setitem(sensors.SENSORS, row.name, row)
    more = config()  # takes what the table has
    recipes.check_config(more)
    contract = plans.make_contract(more)
    mesh = meshes.make_mesh({"data": 1, "fsdp": 1, "expert": 1}, jax.devices()[:1])
    objective = plans.make_plan(more, contract, mesh).objective  # its leaves have sharding and decay rules
    begun, report = init_from.init_from(tmp_path, fresh_state(objective), contract)
    assert {name.split("/")[2] for name in report["new"]} == {"embed_tir_L8", "decoder_tir_L8"}
    assert len(report["new"]) == 6 and not report["left"] and not report["widened"]
    assert all(same(begun.params["encoder"][name], part) for name, part in before.params["encoder"].items())
    with pytest.raises(ValueError, match="input contract"):  # a sensor that is lost is another model
        init_from.init_from(tmp_path, begun, {**old, "sensors": {"hr": old["sensors"]["hr"]}})


# ---------------------------------------------------------------- any mesh

MESHES = ((1, 8, 1), (2, 1, 4), (2, 2, 2), (1, 4, 2))
"""data x fsdp x expert of eight devices; four experts."""


@functools.cache
def on_mesh(shape: tuple[int, int, int]) -> tuple[Any, Any, Any]:
    """(state, metrics, names of leaves that are split over each axis) after one step of a batch of s2."""
    c = config()
    contract = plans.make_contract(c)
    objective = msgfm_objective.make_objective(c, contract)
    mesh = meshes.make_mesh(dict(zip(("data", "fsdp", "expert"), shape)), jax.devices()[: math.prod(shape)])
    batch = state.batch_shapes(recipes.recipe_of(c).batch_spec(c, contract), mesh)
    shapes = state.state_shapes(objective, batch, c.seed, mesh, 256)
    advance = step.make_step(objective, c, optim.decay_mask(shapes.params))
    placed = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    with jax.set_mesh(mesh):
        compiled = (
            jax.jit(advance, out_shardings=(placed, meshes.replicated(mesh)))
            .lower(shapes, batch)
            .compile(compiler_options=xla_flags.ONCE["cpu"])
        )
        begin = state.create(objective, batch, c.seed, shapes)
        now, measured = compiled(begin, state.put_batch(batch_of(c, "s2"), batch))
    split = {
        axis: {name for name, leaf in trees.flatten(shapes.params).items() if axis in leaf.sharding.spec}
        for axis in ("fsdp", "expert")
    }
    return jax.device_get(now), metrics.plain(measured), split


@pytest.mark.parametrize("shape", MESHES)
def test_a_step_on_every_mesh_is_the_step_of_one_device(shape):
    alone, wanted, _ = on_mesh((1, 1, 1))
    now, measured, split = on_mesh(shape)
    assert (len(split["fsdp"]) > 20) == (shape[1] > 1)
    experts = {f"encoder/encoder/stage1/pairs0/shifted/moe/{name}" for name in ("fc1", "fc1_bias", "fc2", "fc2_bias")}
    assert split["expert"] == (experts if shape[2] > 1 else set())
    for name, value in wanted.items():
        if isinstance(value, float):
            assert abs(measured[name] - value) <= 1e-5 * max(1.0, abs(value)), name
        else:
            assert measured[name] == value, name
    ours, theirs = ([np.asarray(x, np.float64) for x in jax.tree.leaves(one.opt["mu"])] for one in (now, alone))
    norm = lambda leaves: math.sqrt(sum(float(np.sum(np.square(leaf))) for leaf in leaves))
    assert norm([a - b for a, b in zip(ours, theirs, strict=True)]) < 1e-5 * norm(theirs)


def test_experts_that_do_not_divide_are_named():
    c = config()
    mesh = meshes.make_mesh({"data": 1, "fsdp": 1, "expert": 8})
    c.model.moe.experts = 6
    with pytest.raises(ValueError, match="shifted/moe/fc1: 6 experts do not divide by the expert axis of 8"):
        plans.make_plan(c, plans.make_contract(c), mesh)


# ---------------------------------------------------------------- FLOPs, learning


def test_flops_are_those_of_the_traced_step():
    """The trace has all sensors' branches, and no gradient of the input images."""
    c = config()
    contract = plans.make_contract(c)
    mesh = meshes.make_mesh({"data": 1, "fsdp": 1, "expert": 1}, jax.devices()[:1])
    plan = plans.make_plan(c, contract, mesh)
    with jax.set_mesh(mesh):
        traced = plans.jit_step(plan, mesh).trace(plan.state, plan.batch)
    bands = {name: len(rule["bands"]) for name, rule in contract["sensors"].items()}
    targets = {name: (name, PAIRS[name]) for name in bands}
    images = sum(flops.linear(8 * 64, 4 * count, c.model.embed_dims) for count in bands.values())
    parts = objective_flops.msgfm_parts(c, bands, targets)
    assert sum(parts.values()) - images == flops.of_jaxpr(traced.jaxpr.jaxpr)
    assert plan.flops == parts["encoder"] + sum(parts[name] for name in bands) / 4


def test_it_learns_what_can_be_learnt():
    """Images far from the mean of their sensor, again and again: both directions learn where their target lies."""
    c = config()
    c.schedule.rule, c.schedule.lr, c.schedule.warmup_steps, c.steps = "multistep", 0.03, 5, 60
    c.optim.lr_scale.s1 = 1.0
    objective = msgfm_objective.make_objective(c, plans.make_contract(c))
    params, batch = crossing(0.5)[2], batch_of(c, "s1", paired=1.0)
    for part, name, level in (("own", "s1", 1.0), ("pair", "s2", -1.0)):
        rule = plans.make_contract(c)["sensors"][name]
        for band, (mean, std) in enumerate(zip(rule["mean"], rule["std"])):
            batch[part]["image"][..., band] = mean + std * level
        batch[part]["valid"][:], batch[part]["bands"][:, : len(rule["bands"])] = 1, 1
    now = state.TrainState(jnp.int32(0), params, optim.init(params), {}, {}, jnp.int32(0))
    advance = jit(step.make_step(objective, c, optim.decay_mask(params)))
    seen: dict[str, list[float]] = {"loss/s1-s1": [], "loss/s1-s2": []}
    for _ in range(c.steps):
        now, measured = advance(now, batch)
        for name, values in seen.items():
            values.append(float(measured[name]))
    for name, values in seen.items():
        assert np.nanmean(values[:3]) > 0.7 and np.nanmean(values[-8:]) < 0.2, (name, values)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: setattr(c.objective, "mask_cell", 6), "mask_cell=6 must divide model.img_size=16"),
        (lambda c: setattr(c.objective, "mask_cell", 1), "mask_cell=1 .* be a multiple of model.patch=2"),
        (lambda c: setattr(c.model.moe, "group", 3), "config.model.moe.group=3 does not divide data.batch=8"),
    ],
)
def test_fields_that_contradict_each_other(change, message):
    c = config()
    change(c)
    with pytest.raises(ValueError, match=message):
        msgfm_objective.make_objective(c, plans.make_contract(c))
