"""The optimiser: AdamW with decay chosen by parameter name, clipping by the global norm, schedules of the step.

Schedules are pure functions of the step (an int or a traced int32), evaluated inside the jitted step; nothing of them
is state. Beside "lr" and "weight_decay", which the optimiser itself needs, there are the schedules that SkySense's
objective asks for (`Objective.schedule_keys`):

``teacher_temp``       temperature of the teacher's softmax
``teacher_momentum``   momentum of the teacher's moving average
``last_layer_frozen``  1 while the prototypes stand still, then 0; weight decay goes on meanwhile and changes nothing,
                       because the length of the prototypes is normalised away
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import config_dict

from skysense_jax.core import trees

Scalar = jax.Array | float | int
"""A number, or a traced one."""

AdamState = dict[str, trees.Tree]
"""{"count": int32, "mu", "nu": trees like the parameters}."""

DECAY_RULES: trees.Rules = (
    # Matrices and convolution kernels decay; whatever shifts, scales, or marks a place or a date does not. By name,
    # because stacked blocks make a bias two-dimensional. Swin-V2's position MLP and logit scale are excluded as in the
    # Swin-V2 release.
    (r"(?!.*/cpb[^/]*/).*/kernel", True),
    (r".*/cpb[^/]*/kernel", False),
    (r".*/last_layer_v", True),
    (r".*/moe/(gate|fc[12])", True),
    (r".*/moe/fc[12]_bias", False),
    # The tables of relative positions decay in SimMIM's and GFM's pretraining: their exclusion by name never matches.
    (r".*/attn/table", True),
    (r".*/last_layer_g", False),
    (r"(.*/)?([qv]_)?bias", False),
    (r".*/scale", False),
    (r".*/logit_scale", False),
    (r"(.*/)?(cls|mask)_token", False),
    (r"(.*/)?pos_embed", False),
    (r"(.*/)?ctpe", False),
)
"""Which parameters decay, for all models: a name without a rule is an error, a rule without a name is not."""


def decay_mask(params: trees.Tree, rules: trees.Rules = DECAY_RULES) -> trees.Tree:
    """Which parameters decay.

    Args:
        params: the parameters, arrays or shapes.
        rules: strict rules over their names.

    Returns:
        A tree like `params` of booleans.

    Raises:
        ValueError: names a parameter without a rule or with two.
    """
    return trees.match_tree(params, rules, "weight decay", unused_ok=True)


class Rates(NamedTuple):
    """The numbers of a learning-rate rule.

    Attributes:
        total: steps of the run.
        warmup: steps of the warm-up.
        peak: rate after the warm-up.
        warmup_lr: rate at the first step.
        final: rate at the last step.
    """

    total: int
    warmup: int
    peak: float
    warmup_lr: float
    final: float


LrRule = Callable[[Scalar, Rates], jax.Array]
"""(step, numbers of the rule) -> learning rate, float scalar."""


def _float(step: Scalar) -> jax.Array:
    return jnp.asarray(step).astype(jnp.result_type(float))


def _cosine(first: float, last: float, progress: jax.Array) -> jax.Array:
    """From `first` at progress 0 to `last` at 1, constant outside."""
    return last + 0.5 * (first - last) * (1.0 + jnp.cos(jnp.pi * jnp.clip(progress, 0.0, 1.0)))


def _warmed(after: Callable[[float, float, jax.Array], jax.Array]) -> LrRule:
    """A rule that is linear from warmup_lr to the peak, then `after(peak, final, progress)` of the remaining steps."""

    def rule(step: Scalar, rates: Rates) -> jax.Array:
        total, warmup, peak, warmup_lr, final = rates
        s = _float(step)
        ramp = warmup_lr + (peak - warmup_lr) * s / max(warmup, 1)
        progress = jnp.clip((s - warmup) / max(total - warmup, 1), 0.0, 1.0)
        return jnp.where(s < warmup, ramp, after(peak, final, progress))

    return rule


lr_cosine = _warmed(_cosine)
lr_linear = _warmed(lambda peak, final, progress: peak + (final - peak) * progress)
"""The two rules of SkySense++ (LambdaLR: with warmup_lr = 0 the first step has rate 0), with a floor."""


def lr_gfm(step: Scalar, rates: Rates) -> jax.Array:
    """The rate of GFM's scheduler.

    GFM advances it with the index of the finished step, so it is one step behind, and its cosine counts the warm-up
    steps too.

    Args:
        step: of the run.
        rates: numbers of the rule.

    Returns:
        Learning rate, float scalar.
    """
    total, warmup, peak, warmup_lr, final = rates
    s = jnp.maximum(_float(step) - 1.0, 0.0)
    return jnp.where(s < warmup, warmup_lr + s * (peak - warmup_lr) / max(warmup, 1), _cosine(peak, final, s / total))


def _constant(peak: float, final: float, progress: jax.Array) -> jax.Array:
    return jnp.asarray(peak, progress.dtype)


def lr_multistep(step: Scalar, rates: Rates) -> jax.Array:
    """SimMIM's rule of 800 epochs: linear warm-up, the peak, and `final` (a tenth of it) for the last eighth.

    Args:
        step: of the run.
        rates: numbers of the rule.

    Returns:
        Learning rate, float scalar.
    """
    s = _float(step)
    return jnp.where(s < rates.total * 7 / 8, _warmed(_constant)(s, rates), rates.final)


LR_RULES: dict[str, LrRule] = {"cosine": lr_cosine, "linear": lr_linear, "gfm": lr_gfm, "multistep": lr_multistep}
"""config.schedule.rule -> the rule of the learning rate."""


def teacher_temperature(step: Scalar, warmup: int, first: float, last: float) -> jax.Array:
    """Linear over the warm-up, both ends included, then constant.

    As DINOLoss.teacher_temp_schedule of facebookresearch/dino.

    Args:
        step: of the run.
        warmup: how many values the warm-up has.
        first: temperature at the first step.
        last: temperature after the warm-up.

    Returns:
        Temperature, float scalar.
    """
    return first + (last - first) * jnp.clip(_float(step) / max(warmup - 1, 1), 0.0, 1.0)


def make_schedule(
    cfg: config_dict.ConfigDict, total: int, keys: tuple[str, ...]
) -> Callable[[Scalar], dict[str, jax.Array]]:
    """Makes the schedules of a run.

    Args:
        cfg: config.schedule.
        total: steps of the run.
        keys: an objective's `schedule_keys`.

    Returns:
        schedule(step) -> {"lr", "weight_decay", and the names in `keys`}: float scalars.

    Raises:
        ValueError: an unknown rule or name.
    """
    if cfg.rule not in LR_RULES:
        raise ValueError(f"config.schedule.rule={cfg.rule!r}; rules are {', '.join(LR_RULES)}")
    functions: dict[str, Callable[[Scalar], jax.Array]] = {
        "lr": lambda s: LR_RULES[cfg.rule](s, Rates(total, cfg.warmup_steps, cfg.lr, cfg.warmup_lr, cfg.final_lr)),
        "weight_decay": lambda s: _cosine(cfg.weight_decay, cfg.final_weight_decay, _float(s) / total),
        "teacher_momentum": lambda s: _cosine(cfg.teacher_momentum, cfg.final_teacher_momentum, _float(s) / total),
        "teacher_temp": lambda s: teacher_temperature(
            s, cfg.warmup_teacher_temp_steps, cfg.warmup_teacher_temp, cfg.teacher_temp
        ),
        "last_layer_frozen": lambda s: (_float(s) < cfg.freeze_last_layer_steps).astype(jnp.result_type(float)),
    }
    unknown = set(keys) - set(functions)
    if unknown:
        raise ValueError(f"the objective asks for schedules {sorted(unknown)}; there are {', '.join(functions)}")
    names = ["lr", "weight_decay", *(name for name in keys if name not in ("lr", "weight_decay"))]
    return lambda step: {name: functions[name](step) for name in names}


def init(params: trees.Tree) -> AdamState:
    """Adam's state as a plain dict {"count" int32, "mu", "nu"}.

    "mu" and "nu" have the names of the parameters, and a checkpoint of a dict needs no class.
    """
    return dict(optax.scale_by_adam().init(params)._asdict())


def clip(grads: trees.Tree, limit: float) -> tuple[trees.Tree, jax.Array]:
    """Scales gradients to a limited global norm, as torch.nn.utils.clip_grad_norm_: factor limit / (norm + 1e-6).

    Args:
        grads: tree of gradients.
        limit: greatest global norm.

    Returns:
        (scaled gradients, global norm before).
    """
    norm = optax.tree.norm(grads)
    factor = jnp.minimum(1.0, limit / (norm + 1e-6))
    return jax.tree.map(lambda g: g * factor.astype(g.dtype), grads), norm


def update(
    grads: trees.Tree,
    opt: Mapping[str, trees.Tree],
    params: trees.Tree,
    mask: trees.Tree,
    lr: Scalar,
    weight_decay: Scalar,
    cfg: config_dict.ConfigDict,
) -> tuple[trees.Tree, AdamState]:
    """One AdamW step: params - lr * (Adam(grads) + weight_decay * params where `mask`).

    Args:
        grads: tree like `params`.
        opt: Adam's state (:func:`init`).
        params: float arrays.
        mask: tree like `params` of booleans, :func:`decay_mask`.
        lr: learning rate.
        weight_decay: decay per step in units of the learning rate.
        cfg: config.optim, of which b1, b2 and eps are read.

    Returns:
        (new parameters, new state of Adam).
    """
    adam = optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps)
    direction, state = adam.update(grads, optax.ScaleByAdamState(**opt), params)
    decayed = jax.tree.map(lambda d, p, on: d + weight_decay * p if on else d, direction, params, mask)
    new = jax.tree.map(lambda p, d: (p - lr * d).astype(p.dtype), params, decayed)
    return new, dict(state._asdict())
