"""Parity of what trains: the self-distillation losses with their Sinkhorn, and AdamW under its schedules (see
tests.parity.command).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import config_dict

from skysense_jax.ops import contrast
from skysense_jax.ops.sinkhorn import sinkhorn
from skysense_jax.run import optim
from tests.parity.case import Arrays, Case, take

CHUNK = 4
"""Rows of a piece in `contrast.distil`: fewer than the crops of the stored case, so that its scan runs."""

DINOV2_MOMENTUM = 0.9
"""center_momentum of dinov2's DINOLoss where its constructor is not told."""


class Views(NamedTuple):
    """Logits of the views of a batch.

    student: [S, B, K]. teacher: [T, B, K]. pairs: [S, T], weight of each pair of views (0 = left out).
    """

    student: jax.Array
    teacher: jax.Array
    pairs: jax.Array


def pair_weights(kind: str, students: int, teachers: int) -> jax.Array:
    """[S, T] weights with which a member of the DINO family sums over pairs of views: "v1" and "v3_ignore_diagonal" are
    means over pairs with different index, "v2" is a sum and "v3" a mean over all.
    """
    every = jnp.ones((students, teachers))
    unequal = every - jnp.eye(students, teachers)
    return {
        "v1": unequal / unequal.sum(),
        "v2": every,
        "v3": every / every.size,
        "v3_ignore_diagonal": unequal / unequal.sum(),
    }[kind]


def distilled(views: Views, centre: jax.Array, student_temp: float, teacher_temp: float, chunk: int) -> jax.Array:
    """The loss over pairs of views by the function that training runs, `contrast.distil`.

    A row is a view of the student, its targets are the teacher's views of the same image, and a pair left out has
    weight 0. The prototypes are the identity, so that the logits are the stored ones.

    Args:
        views: logits and weights of the pairs.
        centre: [K] or [1, K].
        student_temp: temperature of the student.
        teacher_temp: temperature of the teacher.
        chunk: rows of a piece.

    Returns:
        A scalar: sum over pairs of weight * mean over the batch of the cross-entropy.
    """
    (students, batch, width), teachers = views.student.shape, len(views.teacher)
    prototypes = jnp.eye(width)
    targets = jnp.broadcast_to(jnp.moveaxis(views.teacher, 1, 0)[:, None], (batch, students, teachers, width))
    ce, _, _ = contrast.distil(
        jnp.moveaxis(views.student, 1, 0),
        targets,
        jnp.broadcast_to(views.pairs / batch, (batch, students, teachers)),
        prototypes,
        prototypes,
        centre.reshape(width),
        student_temp,
        teacher_temp,
        chunk,
    )
    return ce.sum()


def logits_of(probabilities: jax.Array) -> jax.Array:
    """Logits whose softmax at temperature 1 is `probabilities`; finite, because 0 times infinity is no number."""
    return jnp.log(jnp.maximum(probabilities, jnp.finfo(probabilities.dtype).tiny))


def assignments(logits: jax.Array, centre: jax.Array, temperature: float) -> jax.Array:
    """[N, K] teacher assignments of the rows [N, K], each the third result of `contrast.distil` for its row alone."""
    prototypes, weight = jnp.eye(logits.shape[-1]), jnp.ones((1, 1, 1))

    def one_row(row: jax.Array) -> jax.Array:
        student, teacher = row[None, None], row[None, None, None]
        return contrast.distil(
            student, teacher, weight, prototypes, prototypes, centre.reshape(-1), 1.0, temperature, 1
        )[2]

    return jax.vmap(one_row)(logits)


# ---------------------------------------------------------------------------------------------------------- settings
def flattened(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """(path with ".", value) of every leaf of nested mappings."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{path}{key}.")
        else:
            yield path + key, value


def stated_for(case: Case, family: str, word: str) -> float | None:
    """What meta_json states for one member of the DINO family, wherever it stands: args.v2_center_momentum,
    dinov2.center_momentum, ...; None where it states nothing.

    Raises:
        ValueError: where two statements differ.
    """
    stated = {p: v for p, v in flattened(case.meta) if family in p and word in p and not p.startswith(("tol", "fp32"))}
    if len(set(stated.values())) > 1:
        raise ValueError(f"meta_json states the {word} of {family} twice: {stated}; keep the right one")
    return next(iter(stated.values()), None)


def lazy_momentum(case: Case, momentum: float) -> float:
    """The centre momentum of dinov2's loss, which has a constructor of its own.

    Stated (:func:`stated_for`, or `center_momentum` beside `args`, which are main_dino's), it is used. A file that does
    not state it was made with main_dino's momentum or with dinov2's default: the stored centre says which, and must
    then agree with it.
    """
    stated = stated_for(case, "v2", "momentum")
    if stated is None:
        stated = case.meta.get("center_momentum")
    if stated is not None:
        return float(stated)
    start, after = case.arrays["x_center0"], case.arrays["y_v2_center_after"]
    batch = case.arrays["x_sk"].mean(0, keepdims=True)
    distances = {m: np.linalg.norm(m * start + (1 - m) * batch - after) for m in (momentum, DINOV2_MOMENTUM)}
    return min(distances, key=lambda m: distances[m])


def dino_arguments(case: Case) -> dict[str, Any]:
    """Arguments of main_dino.DINOLoss, with its defaults; what they state for another member is left out."""
    args = {k: v for k, v in case.setting("args").items() if not re.search("v[23]", k)}
    if "center_momentum" not in args and "center_momentum" in case.meta:
        args["center_momentum"] = case.meta["center_momentum"]
    return take(
        args,
        {},
        out_dim=0,
        ncrops=0,
        warmup_teacher_temp=0.0,
        teacher_temp=0.0,
        warmup_teacher_temp_epochs=0,
        nepochs=0,
        student_temp=0.1,
        center_momentum=0.9,
    )


# ------------------------------------------------------------------------------------------------------------- kinds
def dino_loss(case: Case) -> Arrays:
    """DINO v1 over consecutive calls (the centre from before its own update), the v2/v3 reductions, centring and
    Sinkhorn, by the functions that training runs.
    """
    args = dino_arguments(case)
    temperatures = np.asarray(
        optim.teacher_temperature(
            np.arange(args["nepochs"]),
            args["warmup_teacher_temp_epochs"],
            args["warmup_teacher_temp"],
            args["teacher_temp"],
        )
    )
    out: Arrays = {"y_teacher_temps": temperatures}
    out |= _first_version(case, args, float(temperatures[case.setting("epoch")]))
    for key in case.has("y_sk_"):
        out[key] = _balanced(case, key)
    return out | _later_versions(case, args["student_temp"]) | _lazy_centre(case, args["center_momentum"])


def _first_version(case: Case, args: Mapping[str, Any], teacher_temp: float) -> Arrays:
    batch, width, out = case.setting("batch"), args["out_dim"], {}

    def loss(student: jax.Array, teacher: jax.Array, centre: jax.Array) -> jax.Array:
        crops, targets = student.reshape(-1, batch, width), teacher.reshape(-1, batch, width)
        views = Views(crops, targets, pair_weights("v1", len(crops), len(targets)))
        return distilled(views, centre, args["student_temp"], teacher_temp, CHUNK)

    centre = jnp.asarray(case.arrays["x_center0"])
    for call in sorted(int(k.rpartition("_")[2]) for k in case.arrays if re.fullmatch(r"x_student_\d+", k)):
        student, rows = (jnp.asarray(case.arrays[f"x_{name}_{call}"]) for name in ("student", "teacher"))
        if args["ncrops"] != (crops := len(student) // batch):
            raise ValueError(f"args.ncrops is {args['ncrops']}, x_student_{call} holds {crops} crops; correct one")
        out[f"y64_loss_{call}"], out[f"dx_student_{call}"] = jax.value_and_grad(loss)(student, rows, centre)
        mean = rows.mean(0, keepdims=True)
        centre = contrast.update_centre(centre, mean, jnp.float32(1), args["center_momentum"])
        out[f"y_center_{call}"] = centre
    return out


def _balanced(case: Case, key: str) -> jax.Array:
    """One `y_sk_` array. Its name says the temperature (temp: the teacher's; 005: 0.05) and the iterations; dinov2's
    are the teacher's temperature and 3.
    """
    words = key.removeprefix("y_sk_").split("_")
    if words[0] not in ("dinov2", "swav") or not all(w == "temp" or w.isdigit() for w in words[1:]):
        raise ValueError(f"{key}: write y_sk_dinov2, y_sk_swav_temp_ITERATIONS or y_sk_swav_005_ITERATIONS")
    temperature, iterations = (words[1:] + ["temp", "3"][len(words[1:]) :])[:2]
    used = case.setting("teacher_temp_used") if temperature == "temp" else float(f"{temperature[0]}.{temperature[1:]}")
    return sinkhorn(jnp.asarray(case.arrays["x_sk"]) / used, int(iterations))


def _later_versions(case: Case, student_temp: float) -> Arrays:
    """dinov2's and dinov3's losses on the teacher's probabilities."""
    if "x_v23_student" not in case.arrays:
        return {}
    student = jnp.asarray(case.arrays["x_v23_student"])
    teacher = logits_of(jnp.asarray(case.arrays["x_v23_teacher_probs"]))
    centre = jnp.zeros(student.shape[-1])

    def loss(student: jax.Array, kind: str, temperature: float) -> jax.Array:
        views = Views(student, teacher, pair_weights(kind, len(student), len(teacher)))
        return distilled(views, centre, temperature, 1.0, CHUNK)

    second, third = (stated_for(case, family, "student_temp") or student_temp for family in ("v2", "v3"))
    value, gradient = jax.value_and_grad(loss)(student, "v2", second)
    return {
        "y64_v2_loss": value,
        "dx_v2_student": gradient,
        "y64_v3_loss": loss(student, "v3", third),
        "y64_v3_loss_ignore_diag": loss(student, "v3_ignore_diagonal", third),
    }


def _lazy_centre(case: Case, momentum: float) -> Arrays:
    """dinov2 applies a batch's centre when it is asked again: the second call sees the centre of the first."""
    if "y_v2_center_after" not in case.arrays:
        return {}
    logits, start = jnp.asarray(case.arrays["x_sk"]), jnp.asarray(case.arrays["x_center0"])
    momentum, temperature = lazy_momentum(case, momentum), case.setting("teacher_temp_used")
    after = contrast.update_centre(start, logits.mean(0, keepdims=True), jnp.float32(1), momentum)
    return {
        "y_v2_softmax_first": assignments(logits, start, temperature),
        "y_v2_center_after": after,
        "y_v2_softmax_second": assignments(logits, after, temperature),
    }


RULES = {"gfm_cosine": "gfm", "pp_cos": "cosine", "pp_linear": "linear"}
"""Learning-rate rule in an array's name -> ours; "const" is the rate itself."""

ADAMW_SETTINGS = ("lr", "weight_decay", "betas", "eps", "clip", "warmup_steps", "warmup_lr", "min_lr", "steps")
"""Entries of meta_json that :func:`adamw` reads."""


def adamw(case: Case) -> Arrays:
    """AdamW with clipping on the case's quadratic loss under its learning-rate rules, in float64."""
    rules = sorted(match.group(1) for k in case.arrays if (match := re.fullmatch(r"y64_(.*)_lr", k)))
    if unknown := set(rules) - {*RULES, "const"}:
        raise ValueError(f"unknown learning-rate rules {sorted(unknown)}; known are {', '.join(RULES)}, const")
    out: Arrays = {}
    with jax.enable_x64(True):
        for rule in rules:
            steps = _steps(case, rule)
            out |= {f"y64_{rule}_{key}": np.stack([np.asarray(step[key]) for step in steps]) for key in steps[0]}
    return out


def _steps(case: Case, rule: str) -> list[dict[str, Any]]:
    peak, steps, b1_b2 = case.setting("lr"), case.setting("steps"), case.setting("betas")
    cfg = config_dict.ConfigDict({"b1": b1_b2[0], "b2": b1_b2[1], "eps": case.setting("eps")})
    start, end = (case.setting("warmup_lr"), case.setting("min_lr")) if rule == "gfm_cosine" else (0.0, 0.0)
    h, target = jnp.asarray(case.arrays["x64_H"]), jnp.asarray(case.arrays["x64_target"])

    def loss(params: Any) -> jax.Array:
        d = params["p"] - target
        return 0.5 * d @ h @ d + jnp.sum(params["b"] ** 2) + 0.1 * d.sum() * params["b"].sum()

    params = {key: jnp.asarray(case.arrays[f"x64_{key}0"]) for key in ("p", "b")}
    state, rows = optim.init(params), []
    for step in range(steps):
        rate = peak
        if rule != "const":
            rate = optim.LR_RULES[RULES[rule]](step, optim.Rates(steps, case.setting("warmup_steps"), peak, start, end))
        value, grads = jax.value_and_grad(loss)(params)
        grads, norm = optim.clip(grads, case.setting("clip"))
        decays = {"p": True, "b": False}
        params, state = optim.update(grads, state, params, decays, rate, case.setting("weight_decay"), cfg)
        moments = {"m": state["mu"]["p"], "v": state["nu"]["p"]}
        rows.append({"lr": rate, "gnorm": norm, "loss": value, **params, **moments})
    return rows
