"""The optimiser: AdamW with decay chosen by parameter name, clipping by the global norm, schedules of the step.

Schedules are pure functions of the step (an int or a traced int32), evaluated inside the jitted step; nothing of them
is state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from skysense_jax.core import trees

Scalar = Any

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
    """True for every parameter that decays; raises ValueError naming a parameter without a rule or with two."""
    return trees.match_tree(params, rules, "weight decay", unused_ok=True)


def _float(step: Scalar) -> jax.Array:
    return jnp.asarray(step).astype(jnp.result_type(float))


def _cosine(first: float, last: float, progress: jax.Array) -> jax.Array:
    """From `first` at progress 0 to `last` at 1, constant outside."""
    return last + 0.5 * (first - last) * (1.0 + jnp.cos(jnp.pi * jnp.clip(progress, 0.0, 1.0)))


def _warmed(after: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A learning-rate rule: linear from warmup_lr to the peak, then `after(progress)` of the steps that remain."""

    def rule(step: Scalar, total: int, warmup: int, peak: float, warmup_lr: float, final: float) -> jax.Array:
        s = _float(step)
        ramp = warmup_lr + (peak - warmup_lr) * s / max(warmup, 1)
        progress = jnp.clip((s - warmup) / max(total - warmup, 1), 0.0, 1.0)
        return jnp.where(s < warmup, ramp, after(peak, final, progress))

    return rule


lr_cosine = _warmed(_cosine)
lr_linear = _warmed(lambda peak, final, progress: peak + (final - peak) * progress)
"""The two rules of SkySense++ (LambdaLR: with warmup_lr = 0 the first step has rate 0), with a floor."""


def lr_gfm(step: Scalar, total: int, warmup: int, peak: float, warmup_lr: float, final: float) -> jax.Array:
    """GFM's scheduler, advanced with the index of the finished step: one step behind, and its cosine counts the
    warm-up steps too.
    """
    s = jnp.maximum(_float(step) - 1.0, 0.0)
    return jnp.where(s < warmup, warmup_lr + s * (peak - warmup_lr) / max(warmup, 1), _cosine(peak, final, s / total))


def lr_multistep(step: Scalar, total: int, warmup: int, peak: float, warmup_lr: float, final: float) -> jax.Array:
    """SimMIM's rule of 800 epochs: linear warm-up, the peak, and `final` (a tenth of it) for the last eighth."""
    s = _float(step)
    return jnp.where(
        s < total * 7 / 8, _warmed(lambda peak, final, progress: peak)(s, total, warmup, peak, warmup_lr, final), final
    )


LR_RULES = {"cosine": lr_cosine, "linear": lr_linear, "gfm": lr_gfm, "multistep": lr_multistep}


def teacher_temperature(step: Scalar, warmup: int, first: float, last: float) -> jax.Array:
    """Linear over `warmup` values, both ends included, then constant (facebookresearch/dino,
    DINOLoss.teacher_temp_schedule).
    """
    return first + (last - first) * jnp.clip(_float(step) / max(warmup - 1, 1), 0.0, 1.0)


def make_schedule(cfg: Any, total: int, wanted: tuple[str, ...]) -> Callable[[Scalar], dict[str, jax.Array]]:
    """schedule(step) -> {"lr", "weight_decay", and the names in `wanted`}: float scalars.

    cfg: config.schedule. wanted: an objective's `schedule_keys`. Raises ValueError for an unknown rule or name.
    """
    if cfg.rule not in LR_RULES:
        raise ValueError(f"config.schedule.rule={cfg.rule!r}; rules are {', '.join(LR_RULES)}")
    functions: dict[str, Callable[[Scalar], jax.Array]] = {
        "lr": lambda s: LR_RULES[cfg.rule](s, total, cfg.warmup_steps, cfg.lr, cfg.warmup_lr, cfg.final_lr),
        "weight_decay": lambda s: _cosine(cfg.weight_decay, cfg.final_weight_decay, _float(s) / total),
        "teacher_momentum": lambda s: _cosine(cfg.teacher_momentum, cfg.final_teacher_momentum, _float(s) / total),
        "teacher_temp": lambda s: teacher_temperature(
            s, cfg.warmup_teacher_temp_steps, cfg.warmup_teacher_temp, cfg.teacher_temp
        ),
        "last_layer_frozen": lambda s: (_float(s) < cfg.freeze_last_layer_steps).astype(jnp.result_type(float)),
    }
    unknown = set(wanted) - set(functions)
    if unknown:
        raise ValueError(f"the objective asks for schedules {sorted(unknown)}; there are {', '.join(functions)}")
    names = ["lr", "weight_decay", *(name for name in wanted if name not in ("lr", "weight_decay"))]
    return lambda step: {name: functions[name](step) for name in names}


def init(params: trees.Tree) -> dict[str, Any]:
    """Adam's state as a plain dict {"count" int32, "mu", "nu"}: the names are the parameters', and a checkpoint needs
    no class.
    """
    return dict(optax.scale_by_adam().init(params)._asdict())


def clip(grads: trees.Tree, limit: float) -> tuple[trees.Tree, jax.Array]:
    """Gradients scaled to a global norm of at most `limit`, and the norm before: torch.nn.utils.clip_grad_norm_,
    factor limit/(norm+1e-6).
    """
    norm = optax.tree.norm(grads)
    factor = jnp.minimum(1.0, limit / (norm + 1e-6))
    return jax.tree.map(lambda g: g * factor.astype(g.dtype), grads), norm


def update(
    grads: trees.Tree,
    opt: Mapping[str, Any],
    params: trees.Tree,
    mask: trees.Tree,
    lr: Scalar,
    weight_decay: Scalar,
    cfg: Any,
) -> tuple[trees.Tree, dict[str, Any]]:
    """One AdamW step: params - lr * (Adam(grads) + weight_decay * params where `mask`). cfg: config.optim {b1, b2,
    eps}.
    """
    adam = optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps)
    direction, state = adam.update(grads, optax.ScaleByAdamState(**opt), params)
    decayed = jax.tree.map(lambda d, p, on: d + weight_decay * p if on else d, direction, params, mask)
    new = jax.tree.map(lambda p, d: (p - lr * d).astype(p.dtype), params, decayed)
    return new, dict(state._asdict())
