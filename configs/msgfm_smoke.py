"""msGFM, smoke size: four sensors, masked images, a mixture of experts, every stage real and the width small.

Command:   python -m skysense_jax.train --config configs/msgfm_smoke.py --workdir DIR --config.data.dir=DATA
           DATA: the default synthetic data of ./launch/local.sh (tiles of 16 base pixels, 16 x 16 HR pixels under each)
Cost:      1 min 39 s on 2 cores that did other work as well (27 s of it compiling), 1.8 GiB.
Result:    SYNTHETIC data; error of hidden pixels: loss/hr-hr 0.86 -> 0.45, loss/dsm-dsm 0.51, loss/s2-s2 0.45 at step
           60, moe/dropped 0.18 -> 0, pictures in DIR/pictures. In 100 steps it learns to draw about each sensor's mean
           (the brackets over the pictures are the mean's error); what 1500 updates learn: docs/msgfm.md.
"""

from ml_collections import config_dict

from skysense_jax.configs import msgfm_base


def get_config(names: str = "") -> config_dict.ConfigDict:
    """The paper's configuration for minutes on two cores. names: as in configs/msgfm_base.py."""
    c = msgfm_base.get_config(names)
    c.steps = 100

    c.data.statistics = "table"  # one command less
    c.data.batch = 32
    for name, dates in c.data.eval_dates.items():
        c.data.eval_dates[name] = min(dates, 2)
    c.data.threads, c.data.prefetch = 1, 2  # two cores

    c.model.dtype = "float32"  # a CPU has no fast bfloat16
    # Maps of 16, 8 and 4 cells, experts in the second stage
    c.model.embed_dims, c.model.depths, c.model.num_heads = 32, (2, 4, 2), (1, 2, 4)
    c.model.img_size, c.model.window = 64, 4
    c.model.ratio = 16  # of the synthetic data
    c.model.moe.stages, c.model.moe.experts, c.model.moe.group = (1,), 4, 8
    c.objective.mask_cell = 16  # the total stride, as in the paper's network
    c.objective.distill.img_size, c.objective.distill.window = 64, 4  # a teacher of this size

    c.optim.lr_scale.update(dict.fromkeys(c.optim.lr_scale, 1.0))  # all batches are equally small
    # A short run: SimMIM's and GFM's cosine for 100 epochs; a narrow network takes larger steps
    c.schedule.rule, c.schedule.warmup_steps = "cosine", 10
    c.schedule.warmup_lr, c.schedule.lr = 0.0, 2e-3
    c.mesh.expert = 1  # one device
    c.run.save_every, c.run.keep, c.run.log_every, c.run.picture_every = 50, 2, 10, 50
    return c
