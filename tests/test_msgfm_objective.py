"""The msGFM objective: its loss against numpy, who reconstructs whom, a sensor's learning rate, and that it learns."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skysense_jax.core import flops, trees
from skysense_jax.core import mesh as meshes
from skysense_jax.objectives import flops as objective_flops
from skysense_jax.objectives import msgfm as msgfm_objective
from skysense_jax.run import optim, state, step
from skysense_jax.run import plan as plans
from tests.helpers.msgfm_losses import NAMES, PAIRS, batch_of, config, crossing, jit, keys, np_loss
from tests.helpers.toy_objective import same


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

    def norm(tree):
        return np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(tree)))

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
        for band, (mean, std) in enumerate(zip(rule["mean"], rule["std"], strict=True)):
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
