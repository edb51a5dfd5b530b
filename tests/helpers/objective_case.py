"""The SkySense objective on a tiny model and a batch of noise, compiled once for all the tests that share it."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from skysense_jax import sensors
from skysense_jax.configs import skysense_smoke
from skysense_jax.core import rngs
from skysense_jax.objectives.skysense import make_objective

PLACES, TILE = 8, 8
SCHEDULE = {"teacher_temp": 0.05, "last_layer_frozen": 0.0, "teacher_momentum": 0.9}


def tiny():
    """The smoke configuration at toy size, without random depth so that a loss is a function of its batch."""
    c = skysense_smoke.get_config()
    c.data.global_size, c.data.local_size, c.data.n_local = 4, 2, 2
    c.data.dates = {"hr": 1, "s2": 3, "s1": 2}
    c.model.width, c.model.ratio = 16, 4
    c.model.hr.update(
        {
            "patch": 2,
            "embed_dims": 8,
            "depths": (2, 2),
            "num_heads": (1, 2),
            "window": 2,
            "drop_path": 0.0,
            "pretrained_windows": (0, 0),
            "pad_small_map": True,
        }
    )
    for name in ("s2", "s1"):
        c.model[name].update({"embed_dims": 16, "depth": 1, "num_heads": 2, "img_size": 4, "drop_path": 0.0})
    c.model.fusion.update({"embed_dims": 16, "depth": 1, "num_heads": 2, "drop_path": 0.0})
    c.objective.head.update({"hidden": 24, "bottleneck": 8, "prototypes": 32})
    c.objective.update({"clusters": 4, "align_dim": 8, "align_grid": 2})
    return c


def contract_of(c):
    return sensors.input_contract(dict(c.data.bands), c.model.ratio)


def make_batch(c, contract, places=PLACES, seed=0):
    """A batch of noise, fully valid, with crops that overlap in part."""
    rng = np.random.default_rng(seed)

    def views(count, size):
        inputs = {}
        for name, rule in contract["sensors"].items():
            side, bands = size * sensors.pixels_per_base(rule, contract["ratio"]), len(rule["bands"])
            lead = (places, count, c.data.dates[name])
            image = np.array(rule["mean"]) + np.array(rule["std"]) * rng.normal(size=(*lead, side, side, bands))
            inputs[name] = {
                "image": image.astype(np.float32),
                "valid": np.ones((*lead, side, side), np.float32),
                "bands": np.ones((*lead, bands), np.float32),
                "dates": rng.integers(0, 365, lead).astype(np.int32),
            }
        extent = rng.uniform(0.5, 0.9, (places, count)) * TILE * size / c.data.global_size
        origin = rng.uniform(0, 1, (places, count, 2)) * (TILE - extent)[..., None]
        axis = np.arange(size) + 0.5
        grid = np.stack(np.meshgrid(axis, axis), -1)
        cell = extent / size
        return {
            "sensors": inputs,
            "coords": (origin[:, :, None, None] + grid * cell[..., None, None, None]).astype(np.float32),
            "cell": cell.astype(np.float32),
        }

    batch = {"global": views(2, c.data.global_size)}
    if c.data.n_local:
        batch["local"] = views(c.data.n_local, c.data.local_size)
    return batch


def hide(batch, name, places=slice(None), dates=slice(None)):
    """The same batch with acquisitions of a sensor padded away as the pipeline does it."""
    batch = jax.tree.map(np.copy, batch)
    for views in batch.values():
        sensor = views["sensors"][name]
        for key, value in (("image", 0), ("valid", 0), ("bands", 0), ("dates", -1)):
            sensor[key][places, :, dates] = value
    return batch


class Case:
    """One compiled loss with its gradient in every argument, shared by the tests."""

    def __init__(self, c):
        self.cfg, self.contract = c, contract_of(c)
        self.objective = make_objective(c, self.contract)
        self.batch = make_batch(c, self.contract)
        self.params, self.teacher, self.memory = jax.jit(lambda key: self.objective.init(key, self.batch))(
            jax.random.key(0)
        )
        # The teacher at init is the student: move it, so that a mix-up of the two is seen.
        self.teacher = jax.tree.map(
            lambda x: x + 0.02 * jax.random.normal(jax.random.key(x.size), x.shape), self.teacher
        )
        self.memory = jax.tree.map(lambda x: 0.1 * jax.random.normal(jax.random.key(1), x.shape), self.memory)
        self.keys = rngs.keys(0, self.objective.streams, 0)
        self.compiled = jax.jit(jax.value_and_grad(self.objective.loss, argnums=(0, 1, 2), has_aux=True))

    def run(self, batch=None, params=None, teacher=None, schedule=None):
        schedule = {name: jnp.float32(value) for name, value in {**SCHEDULE, **(schedule or {})}.items()}
        (loss, (metrics, settle)), grads = self.compiled(
            self.params if params is None else params,
            self.teacher if teacher is None else teacher,
            self.memory,
            self.batch if batch is None else batch,
            self.keys,
            schedule,
        )
        return float(loss), {name: float(value) for name, value in metrics.items()}, settle, grads


@functools.cache
def shared_case():
    """The case of the tiny configuration, one for the whole process."""
    return Case(tiny())


def norm(tree):
    return math.sqrt(sum(float(jnp.sum(x.astype(jnp.float32) ** 2)) for x in jax.tree.leaves(tree)))
