"""One training step as a pure function: gradients, a finite check, the update, then the teacher and the memory.

A step whose loss or gradient is not finite leaves parameters, optimiser, teacher and memory bit for bit as they were;
the step and the data move on and `skipped` counts it.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from ml_collections import config_dict

from skysense_jax.core import rngs, trees
from skysense_jax.objectives.base import Objective
from skysense_jax.run import optim
from skysense_jax.run.state import TrainState
from skysense_jax.run.stored import digest

PLACES = "places"
"""Metric that identifies the batch: digest (uint32 [2]) of the indices of its places, in order."""


def make_step(
    objective: Objective, cfg: config_dict.ConfigDict, mask: trees.Tree
) -> Callable[[TrainState, trees.Tree], tuple[TrainState, dict[str, jax.Array]]]:
    """Makes the training step.

    Args:
        objective: what is trained.
        cfg: the whole configuration, of which seed, steps, optim and schedule are read.
        mask: optim.decay_mask of the parameters.

    Returns:
        step(state, batch) -> (state, metrics), to be jitted with the state donated. metrics: float32 scalars of the
        objective plus loss, grad_norm, the schedule, finite (0/1), skipped, and the digest of the batch's places.
    """
    schedule_at = optim.make_schedule(cfg.schedule, cfg.steps, objective.schedule_keys)

    def step(state: TrainState, batch: trees.Tree) -> tuple[TrainState, dict[str, jax.Array]]:
        schedule = schedule_at(state.step)
        schedule = {**schedule, "lr": schedule["lr"] * objective.lr_scale(batch)}
        keys = rngs.keys(cfg.seed, objective.streams, state.step)
        (loss, (terms, settle_inputs)), grads = jax.value_and_grad(objective.loss, has_aux=True)(
            state.params, state.teacher, state.memory, batch, keys, schedule
        )

        grads, norm = optim.clip(grads, cfg.optim.clip)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        params, opt = optim.update(
            grads, state.opt, state.params, mask, schedule["lr"], schedule["weight_decay"], cfg.optim
        )
        if (trained := objective.taking_part(batch, state.params)) is not None:
            params = jax.tree.map(jnp.where, trained, params, state.params)
            opt |= {name: jax.tree.map(jnp.where, trained, opt[name], state.opt[name]) for name in ("mu", "nu")}
        teacher, memory = objective.settle(params, state.teacher, state.memory, settle_inputs, schedule)

        before = (state.params, state.opt, state.teacher, state.memory)
        params, opt, teacher, memory = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (params, opt, teacher, memory), before
        )
        skipped = state.skipped + (1 - finite.astype(jnp.int32))
        metrics = {
            **terms,
            **schedule,
            "loss": loss,
            "grad_norm": norm,
            "param_norm": optax.tree.norm(params),
            "finite": finite.astype(jnp.float32),
            "skipped": skipped,
            PLACES: digest.leaf_digest(batch["place"]["index"]),
        }
        return TrainState(state.step + 1, params, opt, teacher, memory, skipped), metrics

    return step
