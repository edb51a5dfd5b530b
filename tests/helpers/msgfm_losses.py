"""The msGFM objective of the tiny configuration, batches of noise for it, and its loss in numpy."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import numpy as np

from skysense_jax import recipes
from skysense_jax.core.hardware import xla_flags
from skysense_jax.data.batches import spec
from skysense_jax.models import msgfm
from skysense_jax.objectives import msgfm as msgfm_objective
from skysense_jax.run import plan as plans
from tests.helpers import msgfm_places

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

    def zeros(leaf):
        return np.zeros(leaf.shape, leaf.dtype)

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


def np_normalised(contract: Any, name: str, part: Any) -> tuple[np.ndarray, np.ndarray]:
    rule = contract["sensors"][name]
    count = len(rule["bands"])
    measured = part["valid"][..., None] * part["bands"][:, None, None, :count]
    image = part["image"][..., :count].astype(np.float64)
    if "datum" in rule:
        for one, use in zip(image, measured > 0, strict=True):
            one -= np.percentile(one[use], 50, method="lower") if use.any() else 0
    return np.where(measured > 0, (image - rule["mean"]) / np.array(rule["std"]), 0), measured


def np_mask(c: Any, drawn: Any) -> np.ndarray:
    """[B, cells, cells]: the cells whose draws are the lowest are hidden."""
    cells = c.model.img_size // c.objective.mask_cell
    noise = np.asarray(jax.random.uniform(drawn["mask"], (c.data.batch, cells**2)))
    mask = np.zeros(noise.shape, int)
    for row, order in zip(mask, np.argsort(noise, axis=1), strict=True):
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

    def grown(side):
        return np.kron(mask, np.ones((1, side, side), int))

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
