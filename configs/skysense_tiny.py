"""SkySense, test size: the smoke configuration with everything that costs time made small.

The suite uses it; it learns nothing.

Command:   python -m skysense_jax.train --config configs/skysense_tiny.py --workdir DIR --config.data.dir=DATA
           configs/skysense_tiny.py:series takes the two time series only: half the time to compile
Cost:      seconds on one core; about 0.1 M parameters. DATA: tiles of at least 8 base pixels with 4 x 4 HR pixels under
each.
"""

from ml_collections import config_dict

from skysense_jax.configs import skysense_smoke


def get_config(variant: str = "all") -> config_dict.ConfigDict:
    """The smoke configuration at test size: same stages, width 32, six steps of four places.

    variant: "all" sensors, or "series".
    """
    if variant not in ("all", "series"):
        raise ValueError(f"unknown variant {variant!r}: all, series")
    c = skysense_smoke.get_config()
    c.steps = 6

    # Places and dates: the least at which an order, a mask or a mean over them can be wrong
    c.data.batch = 4
    c.data.dates.s2, c.data.dates.s1 = 2, 2
    c.data.eval_dates.s2, c.data.eval_dates.s1 = 2, 2
    c.data.global_size, c.data.local_size, c.data.n_local = 4, 2, 1

    # What compiles in seconds: two HR stages of one plain and one shifted block, and one layer elsewhere
    c.model.width = 32
    c.model.ratio = 4
    c.model.hr.patch, c.model.hr.window = 2, 2
    c.model.hr.depths, c.model.hr.num_heads, c.model.hr.pretrained_windows = (2, 2), (1, 2), (0, 0)
    for vit in (c.model.s2, c.model.s1):
        vit.embed_dims, vit.depth, vit.num_heads, vit.img_size = 32, 1, 2, 8
    c.model.fusion.embed_dims, c.model.fusion.depth, c.model.fusion.num_heads = 32, 1, 2

    # The smoke configuration has no stochastic depth; the suite needs its random stream.
    for module in (c.model.hr, c.model.s2, c.model.s1, c.model.fusion):
        module.drop_path = 0.1

    c.objective.head.update({"hidden": 32, "bottleneck": 16, "layers": 2, "prototypes": 32})
    c.objective.clusters = 2  # with one, the object would be the image
    c.objective.align_dim = 16

    # Every rule changes, and a checkpoint is written, within the six steps
    c.schedule.warmup_steps = 2
    c.schedule.warmup_teacher_temp_steps = 3
    c.schedule.freeze_last_layer_steps = 1
    c.run.save_every = 2
    c.run.log_every = 1
    if variant == "series":
        del c.data.bands.hr, c.data.dates.hr, c.data.eval_dates.hr, c.model.hr
    return c
