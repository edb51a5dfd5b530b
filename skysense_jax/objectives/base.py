"""What a training objective is: six functions and values, the only thing the training loop knows about a model.

The parameters an objective owns live in three trees, all nested dicts of arrays:

``params``   what the optimiser updates: {"encoder": the model's parameters, plus whatever the objective trains with it}
``teacher``  a moving average of a part of the student, same names and shapes as there; {} for an objective without one
``memory``   gradient-free state (centres, prototype banks); sharded, checkpointed, not optimised; {} where none
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

Tree = Any


class Objective(NamedTuple):
    """One objective. Every function is pure and may be jitted; none knows about devices, processes or files.

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
    rules: ((pattern, tactic), ...) over the names of the joined tree {"params": ..., "teacher": ..., "memory": ...}
        so that names start with "params/", "teacher/" or "memory/"; strict (core.sharding): each leaf by exactly one
        rule, each rule used.
    flops(spec) -> float: analytic model FLOPs of one step of the global batch (what is counted: core.flops).
    lr_scale(batch) -> scalar: factor on the learning rate of this batch's update (not on its gradient).
    taking_part(batch, params) -> tree like params of booleans: False where this batch has no gradient by its kind. Such
        a parameter and its moments stay as they are, as torch leaves parameters whose .grad is None. None: all move.
    streams: names of the random streams `loss` draws from (core.rngs.keys).
    schedule_keys: names `loss` and `settle` read from the schedule, beside what the optimiser itself needs.
        SkySense: "teacher_temp" (temperature of the teacher's softmax), "last_layer_frozen" (1 while the prototypes
        stand still, then 0; weight decay goes on meanwhile and changes nothing, their length is normalised away),
        "teacher_momentum".
    """

    init: Callable[[Any, Tree], tuple[Tree, Tree, Tree]]
    loss: Callable[..., tuple[Any, tuple[dict[str, Any], Tree]]]
    settle: Callable[..., tuple[Tree, Tree]]
    rules: tuple[tuple[str, str], ...]
    flops: Callable[[Tree], float]
    streams: tuple[str, ...]
    schedule_keys: tuple[str, ...]
    lr_scale: Callable[[Tree], Any] = lambda batch: 1.0
    taking_part: Callable[[Tree, Tree], Tree | None] = lambda batch, params: None
