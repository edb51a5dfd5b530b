"""What a training objective is: functions and values, all that the training loop knows about a model.

The parameters of an objective live in three trees, all nested dicts of arrays:

``params``   what the optimiser updates: {"encoder": the model's parameters, plus whatever the objective trains with it}
``teacher``  a moving average of some of the student's parameters, with their names and shapes, or a frozen network; {}
             for an objective without a teacher
``memory``   state without gradient (centres, banks); sharded, checkpointed, not optimised; {} for an objective without
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from skysense_jax.core.trees import Tree


class Objective(NamedTuple):
    """An objective. Every function is pure and may be jitted; none knows about devices, processes or files.

    init(rng, spec) -> params, teacher, memory
        spec: the nested dict of the training batch with anything that has `.shape` and `.dtype` as leaves; only shapes
        are read, so `jax.eval_shape(objective.init, rng, spec)` with `spec` closed over gives the shapes of everything.
    loss(params, teacher, memory, batch, keys, schedule) -> loss, (metrics, settle_inputs)
        keys: {name: typed key} for this step, one per name in `streams`. schedule: {name: float32 scalar} at this step,
        see `schedule_keys`. metrics: flat dict of float32 scalars with stable names. settle_inputs: whatever `settle`
        needs. Differentiable in params only. The batch is the *global* batch: under jit with a sharded leading axis
        every mean, Sinkhorn and contrast runs over all devices.
    settle(params, teacher, memory, settle_inputs, schedule) -> teacher, memory
        After the update, with the updated params; called only where the update was finite.
    features(params, inputs) -> dict of arrays
        params: any tree with "encoder" (the student's or the teacher's). inputs: PlaceInput, any subset of the
        contract's sensors. At least "image" [B, E] and "pixel" [B, h, w, E]. Evaluation and export use this and nothing
        else.
    rules: ((pattern, tactic), ...) over the names of the joined tree {"params": ..., "teacher": ..., "memory": ...}
        so that names start with "params/", "teacher/" or "memory/"; strict (core.sharding): exactly one rule per leaf,
        each rule used.
    flops(spec) -> float: analytic model FLOPs of one step of the global batch (what is counted: core.flops).
    lr_scale(batch) -> scalar: factor on the learning rate of this batch's update (not on its gradient).
    taking_part(batch, params) -> tree like params of booleans, the parameters that this batch trains: False where a
        batch of this kind gives no gradient. Such a parameter and its moments stay as they are, as torch leaves
        parameters whose .grad is None. None: all are trained.
    streams: names of the random streams `loss` draws from (core.rngs.keys).
    schedule_keys: names of the schedules that `loss` and `settle` read, beside those of the optimiser itself; what
        there is, and what each means: run.optim.
    """

    init: Callable[[jax.Array, Tree], tuple[Tree, Tree, Tree]]
    loss: Callable[..., tuple[jax.Array, tuple[dict[str, jax.Array], Tree]]]
    settle: Callable[..., tuple[Tree, Tree]]
    features: Callable[[Tree, Tree], dict[str, jax.Array]]
    rules: tuple[tuple[str, str], ...]
    flops: Callable[[Tree], float]
    streams: tuple[str, ...]
    schedule_keys: tuple[str, ...]
    lr_scale: Callable[[Tree], Any] = lambda batch: 1.0
    taking_part: Callable[[Tree, Tree], Tree | None] = lambda batch, params: None
