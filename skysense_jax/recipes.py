"""The table of recipes: which objective trains on which batches, and which configuration fields a run of it reads.

The only place that knows which objectives exist. A configuration names its recipe in the field `recipe`; without that
field it is the pretraining of its network, the row named like config.model.name. Another objective on a network that
exists is one row here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

from ml_collections import config_dict

from skysense_jax.core import config
from skysense_jax.data.batches import one_sensor, spec, views
from skysense_jax.models import systems
from skysense_jax.objectives import msgfm, skysense
from skysense_jax.objectives.base import Objective


class Recipe(NamedTuple):
    """One way to train.

    Attributes:
        system: key of `models.systems.SYSTEMS`; config.model.name must be this.
        make_objective: (whole configuration, input contract) -> `objectives.base.Objective`.
        batches: the module that makes the training batches: check, stages, train_dataset and make_train_iterator.
        batch_spec: (whole configuration, input contract) -> nested dict of `spec.Leaf` like a global batch.
        fields: names of all configuration fields outside of config.model that this recipe reads, by section ("" = top
            level, "<sensor>" = one field per sensor of data.bands); others are refused.
    """

    system: str
    make_objective: Callable[[config_dict.ConfigDict, Mapping[str, Any]], Objective]
    batches: ModuleType
    batch_spec: Callable[[config_dict.ConfigDict, Mapping[str, Any]], dict[str, Any]]
    fields: config.Vocabulary


EVALUATION = ("batch", "knn_k", "knn_temp", "patch", "bootstrap")
OPTIMISER = ("b1", "b2", "eps", "clip")
RATES = ("rule", "warmup_lr", "lr", "final_lr", "warmup_steps", "weight_decay", "final_weight_decay")
RUN = ("save_every", "keep", "log_every", "max_skipped", "watchdog_s")
READING = ("split", "statistics", "batch", "threads", "prefetch", "max_bad_records")
"""Fields of config.eval, config.optim, config.schedule, config.run and config.data that every recipe has."""

RECIPES: dict[str, Recipe] = {
    "skysense": Recipe(
        "skysense",
        skysense.make_objective,
        views,
        spec.views_spec,
        {
            "": ("seed", "steps"),
            "data": (
                *READING,
                "dir",
                "global_size",
                "global_scale",
                "n_local",
                "local_size",
                "local_scale",
                "aspect",
                "flip",
                "rotate",
                "date_jitter_days",
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
            "optim": OPTIMISER,
            "schedule": (
                *RATES,
                "teacher_momentum",
                "final_teacher_momentum",
                "teacher_temp",
                "warmup_teacher_temp",
                "warmup_teacher_temp_steps",
                "freeze_last_layer_steps",
            ),
            "mesh": ("data", "fsdp"),
            "run": RUN,
            "eval": EVALUATION,
        },
    ),
    "msgfm": Recipe(
        "msgfm",
        msgfm.make_objective,
        one_sensor,
        spec.one_sensor_spec,
        {
            "": ("seed", "steps"),
            "data": (*READING, "dir", "also", "scale", "aspect", "flip"),
            "data.bands": ("<sensor>",),
            "data.eval_dates": ("<sensor>",),
            "objective": ("mask_ratio", "mask_cell", "cross", "aux_weight"),
            "objective.distill": ("weight", "path", "img_size", "window"),
            "optim": OPTIMISER,
            "optim.lr_scale": ("<sensor>",),
            "schedule": ("rule", "warmup_lr", "lr", "final_lr", "warmup_steps", "weight_decay", "final_weight_decay"),
            "mesh": ("data", "fsdp", "expert"),
            "run": (*RUN, "picture_every"),
            "eval": EVALUATION,
        },
    ),
}
"""Name of a recipe -> its row."""


def recipe_of(cfg: config_dict.ConfigDict) -> Recipe:
    """The row of a whole configuration.

    Raises:
        ValueError: there is no such recipe, it trains another network than config.model describes, or there is no
            config.model.name.
    """
    if "name" not in cfg.get("model", {}):
        raise ValueError("the configuration has the wrong fields: config.model.name is missing")
    name = cfg.get("recipe", cfg.model.name)
    if name not in RECIPES:
        field = "config.recipe" if "recipe" in cfg else "config.model.name"
        raise ValueError(f"{field}={name!r} has no training objective; there are {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    if cfg.model.name != recipe.system:
        raise ValueError(f"config.recipe={name!r} trains a {recipe.system!r}, config.model.name is {cfg.model.name!r}")
    return recipe


def check_config(cfg: config_dict.ConfigDict) -> None:
    """Checks the fields of a whole configuration.

    Raises:
        ValueError: a field that nothing reads, a missing field, a recipe or a network that does not exist.
    """
    recipe = recipe_of(cfg)
    system = systems.system_of(cfg.model)
    named = {"": (*recipe.fields[""], "recipe")} if "recipe" in cfg else {}
    config.check_fields(cfg, {**recipe.fields, **named, **system.fields}, system.of_sensors)
