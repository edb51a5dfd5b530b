"""msGFM, test size: the smoke configuration with everything that costs time made small. The suite uses it; it learns
nothing.

Command:   python -m skysense_jax.train --config configs/msgfm_tiny.py --workdir DIR --config.data.dir=DATA
Cost:      seconds on one core. DATA: any dataset with the four sensors and 4 x 4 HR pixels under a base pixel.
"""

import pathlib
import runpy

from ml_collections import config_dict


def get_config(taken: str = "") -> config_dict.ConfigDict:
    """The smoke configuration at test size: the same stages, images of 16 pixels, six steps of eight. taken: as
    there.
    """
    c = runpy.run_path(str(pathlib.Path(__file__).with_name("msgfm_smoke.py")))["get_config"](taken)
    c.steps = 6
    c.data.batch = 8
    c.model.patch, c.model.embed_dims, c.model.img_size, c.model.ratio = 2, 8, 16, 4
    c.model.depths, c.model.num_heads, c.model.window = (2, 2), (1, 2), 2
    c.model.moe.experts, c.model.moe.group = 4, 2
    c.objective.mask_cell = 4
    c.objective.distill.img_size, c.objective.distill.window = 16, 2
    factors = {"s2": 0.25, "s1": 0.25, "dsm": 0.1}
    c.optim.lr_scale.update({name: factors.get(name, 1.0) for name in c.optim.lr_scale})
    c.schedule.warmup_steps = 2
    c.run.save_every, c.run.log_every, c.run.picture_every = 2, 1, 0
    return c
