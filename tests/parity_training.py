"""Parity of what trains: the self-distillation losses with their Sinkhorn, and AdamW under its schedules (see
tests.parity).
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import config_dict

from skysense_jax.ops import contrast
from skysense_jax.ops.sinkhorn import sinkhorn
from skysense_jax.run import optim


def dino_loss(case: Any) -> dict[str, Any]:
    """DINO v1 over consecutive calls (the centre from before its own update), v2/v3 reductions, centring and
    Sinkhorn.
    """
    z, meta = case.arrays, case.meta
    args, batch = meta["args"], meta["batch"]
    student_temp, momentum, width = args["student_temp"], args["center_momentum"], args["out_dim"]
    epochs = np.arange(args["nepochs"])
    temps = np.asarray(
        optim.teacher_temperature(
            epochs, args["warmup_teacher_temp_epochs"], args["warmup_teacher_temp"], args["teacher_temp"]
        )
    )
    temp = float(temps[meta["epoch"]])
    out: dict[str, Any] = {"y_teacher_temps": temps}
    one = jnp.float32(1)
    centre = jnp.asarray(z["x_center0"])
    for key in sorted((k for k in z if re.fullmatch(r"x_student_\d+", k)), key=lambda k: int(k.split("_")[-1])):
        call = key.split("_")[-1]
        teacher = jnp.asarray(z[f"x_teacher_{call}"])
        probs = contrast.centred_softmax(teacher, centre, temp).reshape(-1, batch, width)
        loss = lambda s: contrast.dino_reduction(s.reshape(-1, batch, width), probs, student_temp, "v1")
        out[f"y64_loss_{call}"], out[f"dx_student_{call}"] = jax.value_and_grad(loss)(jnp.asarray(z[key]))
        centre = contrast.update_centre(centre, teacher.mean(0, keepdims=True), one, momentum)
        out[f"y_center_{call}"] = centre
    for key in (k for k in z if k.startswith("y_sk_")):
        used = 0.05 if "_005_" in key else meta["teacher_temp_used"]
        iterations = 3 if key == "y_sk_dinov2" else int(key.split("_")[-1])
        out[key] = sinkhorn(jnp.asarray(z["x_sk"]) / used, iterations)
    if "x_v23_student" in z:
        student, probs = jnp.asarray(z["x_v23_student"]), jnp.asarray(z["x_v23_teacher_probs"])
        reduce = lambda s, kind: contrast.dino_reduction(s, probs, student_temp, kind)
        out["y64_v2_loss"], out["dx_v2_student"] = jax.value_and_grad(reduce)(student, "v2")
        out["y64_v3_loss"] = reduce(student, "v3")
        out["y64_v3_loss_ignore_diag"] = reduce(student, "v3_ignore_diagonal")
    if "y_v2_softmax_first" in z:
        logits, start = jnp.asarray(z["x_sk"]), jnp.asarray(z["x_center0"])
        after = contrast.update_centre(start, logits.mean(0, keepdims=True), one, momentum)
        out["y_v2_softmax_first"] = contrast.centred_softmax(logits, start, meta["teacher_temp_used"])
        out["y_v2_center_after"] = after
        out["y_v2_softmax_second"] = contrast.centred_softmax(logits, after, meta["teacher_temp_used"])
    return out


RULES = {"gfm_cosine": "gfm", "pp_cos": "cosine", "pp_linear": "linear"}


def adamw(case: Any) -> dict[str, Any]:
    """AdamW with clipping on the case's quadratic loss under four learning-rate rules, in float64."""
    meta = case.meta
    steps, warmup = meta["steps"], meta["warmup_steps"]
    cfg = config_dict.ConfigDict({"b1": meta["betas"][0], "b2": meta["betas"][1], "eps": meta["eps"]})
    rules = sorted({re.fullmatch(r"y64_(.*)_lr", k).group(1) for k in case.arrays if re.fullmatch(r"y64_(.*)_lr", k)})
    out: dict[str, Any] = {}
    with jax.enable_x64(True):
        h, target = jnp.asarray(case.arrays["x64_H"]), jnp.asarray(case.arrays["x64_target"])

        def loss(params: Any) -> jax.Array:
            d = params["p"] - target
            return 0.5 * d @ h @ d + jnp.sum(params["b"] ** 2) + 0.1 * d.sum() * params["b"].sum()

        for rule in rules:
            params = {key: jnp.asarray(case.arrays[f"x64_{key}0"]) for key in ("p", "b")}
            state, rows = optim.init(params), []
            for step in range(steps):
                rate = meta["lr"]
                if rule != "const":
                    gfm = rule == "gfm_cosine"
                    rate = optim.LR_RULES[RULES[rule]](
                        step,
                        steps,
                        warmup,
                        meta["lr"],
                        meta["warmup_lr"] if gfm else 0.0,
                        meta["min_lr"] if gfm else 0.0,
                    )
                value, grads = jax.value_and_grad(loss)(params)
                grads, norm = optim.clip(grads, meta["clip"])
                params, state = optim.update(
                    grads, state, params, {"p": True, "b": False}, rate, meta["weight_decay"], cfg
                )
                moments = {"m": state["mu"]["p"], "v": state["nu"]["p"]}
                rows.append({"lr": rate, "gnorm": norm, "loss": value, **params, **moments})
            out |= {f"y64_{rule}_{key}": np.stack([np.asarray(row[key]) for row in rows]) for key in rows[0]}
    return out
