"""msGFM, test size: the smoke configuration with everything that costs time made small.

The suite uses it; it learns nothing.

Command:   python -m skysense_jax.train --config configs/msgfm_tiny.py --workdir DIR --config.data.dir=DATA
Cost:      seconds on one core. DATA: any dataset with the four sensors and 4 x 4 HR pixels under a base pixel.
"""

from ml_collections import config_dict

from skysense_jax.configs import msgfm_base, msgfm_smoke


def get_config(names: str = "") -> config_dict.ConfigDict:
    """The smoke configuration at test size: images of 16 pixels, six steps of eight.

    names: as in configs/msgfm_base.py.
    """
    c = msgfm_smoke.get_config(names)
    c.steps = 6
    c.data.batch = 8  # one image for each of the suite's eight devices
    # What compiles in seconds: two stages of one plain and one shifted block; the second has the experts
    c.model.patch, c.model.embed_dims, c.model.img_size, c.model.ratio = 2, 8, 16, 4
    c.model.depths, c.model.num_heads, c.model.window = (2, 2), (1, 2), 2
    c.model.moe.group = 2
    c.objective.mask_cell = 4  # the total stride
    c.objective.distill.img_size, c.objective.distill.window = 16, 2
    # The paper's rates per sensor: the suite checks that they arrive
    c.optim.lr_scale.update({name: msgfm_base.LR_SCALE.get(name, 1.0) for name in c.optim.lr_scale})
    c.schedule.warmup_steps = 2
    c.run.save_every, c.run.log_every, c.run.picture_every = 2, 1, 0
    return c
