"""What a training objective is: six functions and three values, all that a step needs of it.

The parameters of an objective are three trees, all nested dicts of arrays:

``params``   what the optimiser updates: {"encoder": the model's parameters, plus whatever the objective trains with it}
``teacher``  a network that is not optimised; its names and shapes are those of a part of params; {} without a teacher
``memory``   gradient-free state (centres, prototype banks); sharded, checkpointed, not optimised; {} without any
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from skysense_jax.core.shapes import Key, Scalar
from skysense_jax.core.trees import Tree

Loss = Callable[..., tuple[Scalar, tuple[dict[str, Scalar], Tree]]]
"""(params, teacher, memory, batch, keys, schedule) -> (loss, (metrics, settle_inputs)), see Objective."""


class Objective(NamedTuple):
    """An objective. Every function is pure and may be jitted; none knows about devices, processes or files.

    Every batch has batch["place"]["index"] [B], the numbers of its places: the step records a digest of them.

    init(rng, spec) -> params, teacher, memory
        spec: the nested dict of the training batch with anything that has `.shape` and `.dtype` as leaves; only shapes
        are read, so `jax.eval_shape(objective.init, rng, spec)` with `spec` closed over gives the shapes of everything.
    loss(params, teacher, memory, batch, keys, schedule) -> loss, (metrics, settle_inputs)
        keys: {name: typed key} for this step, one per name in `streams`. schedule: {name: float32 scalar} at this step,
        one per name in `schedule_keys`. metrics: flat dict of float32 scalars with stable names. settle_inputs:
        whatever `settle` needs. Differentiable in params only. The batch is the *global* batch: under jit with a
        sharded leading axis every mean, Sinkhorn and contrast runs over all devices.
    settle(params, teacher, memory, settle_inputs, schedule) -> teacher, memory
        What follows the update, with the updated params; called only where the update was finite.
    flops(spec) -> float
        Analytic model FLOPs of one step of the global batch (what is counted: core.flops).
    lr_scale(batch) -> scalar
        Factor on the learning rate of this batch's update (not on its gradient).
    taking_part(batch, params) -> tree like params of booleans, or None
        Which parameters this batch trains; None: all of them. A parameter that it does not train stays as it is, and so
        do its moments, as torch leaves parameters whose .grad is None.

    Attributes:
        rules: of sharding, ((pattern, tactic), ...) over the names of the joined tree {"params": ..., "teacher": ...,
            "memory": ...}, so that names start with "params/", "teacher/" or "memory/". Strict (core.sharding): each
            leaf has exactly one rule, each rule is used.
        streams: names of the random streams that `loss` draws from (core.rngs.keys).
        schedule_keys: names that `loss` and `settle` read from the schedule, beside what the optimiser itself needs.
            What there is, and what each means: run.optim.
    """

    init: Callable[[Key, Tree], tuple[Tree, Tree, Tree]]
    loss: Loss
    settle: Callable[..., tuple[Tree, Tree]]
    rules: tuple[tuple[str, str], ...]
    flops: Callable[[Tree], float]
    streams: tuple[str, ...]
    schedule_keys: tuple[str, ...]
    lr_scale: Callable[[Tree], Scalar | float] = lambda batch: 1.0
    taking_part: Callable[[Tree, Tree], Tree | None] = lambda batch, params: None
