"""The fields of a configuration: a field that nothing reads, or one that is missing, is refused before anything starts.

A configuration is a Python file, so a misspelt field is silently a new one. The names here are the whole vocabulary;
"<sensor>" stands for every sensor of `data.bands`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

_VIT = ("cls_token", "depth", "drop_path", "embed_dims", "eps", "img_size", "mlp_ratio", "num_heads", "patch")

FIELDS: dict[str, tuple[str, ...]] = {
    "": ("seed", "steps"),
    "data": (
        "dir",
        "split",
        "statistics",
        "batch",
        "global_size",
        "global_scale",
        "n_local",
        "local_size",
        "local_scale",
        "aspect",
        "flip",
        "rotate",
        "date_jitter_days",
        "threads",
        "prefetch",
        "max_bad_records",
    ),
    "data.bands": ("<sensor>",),
    "data.dates": ("<sensor>",),
    "data.eval_dates": ("<sensor>",),
    "data.augment": (
        "hr_jitter",
        "hr_jitter_strength",
        "hr_gray",
        "hr_blur",
        "hr_solarize",
        "s2_gain",
        "s2_band_gain",
        "s1_shift_db",
        "s1_speckle_db",
    ),
    "model": ("name", "dtype", "remat", "width", "ratio", "calendar"),
    "model.hr": (
        "patch",
        "embed_dims",
        "depths",
        "num_heads",
        "window",
        "mlp_ratio",
        "eps",
        "extra_norm_every",
        "pretrained_windows",
        "pad_small_map",
        "drop_path",
        "drop_path_before_norm",
        "branch_scale",
    ),
    "model.s2": _VIT,
    "model.s1": _VIT,
    "model.fusion": ("embed_dims", "depth", "num_heads", "mlp_ratio", "drop_path", "eps"),
    "model.geo_context": ("bank", "regions", "prototypes", "width", "cell", "table"),
    "objective": (
        "prototype_momentum",
        "student_temp",
        "centre_momentum",
        "clusters",
        "sinkhorn_eps",
        "sinkhorn_iters",
        "alpha",
        "beta",
        "align_dim",
        "align_temp",
        "align_grid",
        "chunk",
        "microbatches",
    ),
    "objective.head": ("hidden", "bottleneck", "layers", "prototypes"),
    "optim": ("b1", "b2", "eps", "clip"),
    "schedule": (
        "rule",
        "warmup_lr",
        "lr",
        "final_lr",
        "warmup_steps",
        "weight_decay",
        "final_weight_decay",
        "teacher_momentum",
        "final_teacher_momentum",
        "teacher_temp",
        "warmup_teacher_temp",
        "warmup_teacher_temp_steps",
        "freeze_last_layer_steps",
    ),
    "mesh": ("data", "fsdp"),
    "run": ("save_every", "keep", "log_every", "max_skipped", "watchdog_s"),
    "eval": ("batch", "knn_k", "knn_temp", "patch", "bootstrap"),
}
"""Section -> names of its fields, of a SkySense run."""

MSGFM_FIELDS: dict[str, tuple[str, ...]] = {
    "": ("seed", "steps"),
    "data": (
        "dir",
        "also",
        "split",
        "statistics",
        "batch",
        "scale",
        "aspect",
        "flip",
        "threads",
        "prefetch",
        "max_bad_records",
    ),
    "data.bands": ("<sensor>",),
    "data.eval_dates": ("<sensor>",),
    "model": (
        "name",
        "dtype",
        "remat",
        "ratio",
        "patch",
        "embed_dims",
        "depths",
        "num_heads",
        "window",
        "img_size",
        "mlp_ratio",
        "drop_path",
        "eps",
    ),
    "model.moe": ("stages", "experts", "capacity", "group", "gate_noise", "aux"),
    "objective": ("mask_ratio", "mask_cell", "cross", "aux_weight"),
    "objective.distill": ("weight", "path", "img_size", "window"),
    "optim": ("b1", "b2", "eps", "clip"),
    "optim.lr_scale": ("<sensor>",),
    "schedule": ("rule", "warmup_lr", "lr", "final_lr", "warmup_steps", "weight_decay", "final_weight_decay"),
    "mesh": ("data", "fsdp", "expert"),
    "run": ("save_every", "keep", "log_every", "picture_every", "max_skipped", "watchdog_s"),
    "eval": FIELDS["eval"],
}
"""The same where config.model.name is "msgfm"."""

PER_SENSOR = ("model.hr", "model.s2", "model.s1")
"""Sections that may be absent where the model does not take the sensor."""


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Fields by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= flatten(value, f"{prefix}{name}.") if hasattr(value, "items") else {prefix + name: value}
    return flat


def check(config: Mapping[str, Any]) -> None:
    """Raises ValueError naming every field that nothing reads, with the nearest known one, and every missing field."""
    given = set(flatten(config))
    known = MSGFM_FIELDS if config.get("model", {}).get("name") == "msgfm" else FIELDS
    taken = {name.split(".")[-1] for name in given if name.startswith("data.bands.")}
    wanted = set()
    for section, names in known.items():
        if section in PER_SENSOR and section.split(".")[-1] not in taken:
            continue
        names = [one for name in names for one in (sorted(taken) if name == "<sensor>" else [name])]
        wanted |= {f"{section}.{name}" if section else name for name in names}
    spare = {f"{section}.{name}" for section in PER_SENSOR for name in FIELDS[section]}  # of a sensor that is not taken
    problems = []
    for name in sorted(given - wanted - spare):
        near = difflib.get_close_matches(name, wanted, 1)
        problems.append(f"nothing reads config.{name}" + (f"; did you mean config.{near[0]}?" if near else ""))
    problems += [f"config.{name} is missing" for name in sorted(wanted - given)]
    if problems:
        raise ValueError("the configuration has the wrong fields: " + "; ".join(problems))
