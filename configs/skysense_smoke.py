"""SkySense, smoke size: every stage real, the width small.

Command:   ./launch/local.sh              (builds the synthetic default data, pretrains this, evaluates, exports)
           python -m skysense_jax.train --config configs/skysense_smoke.py --workdir DIR --config.data.dir=DIR/data
Cost:      6.5 minutes on 2 cores for the first command, after installation; 3.6 GiB of memory.
Result:    every stage works; 200 steps of 8 SYNTHETIC places learn too little to tell from the untrained network
           (docs/results.md, and configs/skysense_small.py for a run that can).
"""

from ml_collections import config_dict

from skysense_jax.configs import skysense_full


def get_config() -> config_dict.ConfigDict:
    """The full configuration for minutes on two cores: tiles of 16 base pixels with 16 x 16 HR pixels under each."""
    c = skysense_full.get_config()
    # What two cores do in minutes: steps, places, dates and the cells of a view, each far below full size
    c.steps = 200

    c.data.batch = 8
    c.data.dates.s2, c.data.dates.s1 = 4, 3
    c.data.eval_dates.s2, c.data.eval_dates.s1 = 8, 6  # more than training draws: nothing is dropped to fit memory
    c.data.global_size, c.data.local_size, c.data.n_local = 8, 4, 2
    c.data.global_scale, c.data.local_scale = (0.4, 1.0), (0.1, 0.4)  # about DINO's: a tile has 16 base pixels, not 64
    c.data.threads = 1  # a second one gains nothing on two cores: the arrays are small, Python's lock is the bound
    c.data.prefetch = 2  # a batch is quick to make here
    c.data.max_bad_records = 10  # of hundreds of places, not of millions
    # DINO's optical set at half its strength, without solarisation: at full strength the head of an HR encoder this
    # narrow drifted to uniform (teacher entropy 0.54 to 0.90 of log K in 200 steps).
    c.data.augment.hr_jitter_strength = (0.2, 0.2, 0.1, 0.05)
    c.data.augment.hr_gray = 0.1
    c.data.augment.hr_blur = (0.5, 0.1, 0.2)
    c.data.augment.hr_solarize = 0.0

    c.model.dtype = "float32"  # a CPU has no fast bfloat16
    c.model.remat = False  # the memory suffices
    c.model.width = 64  # and so the transformers below
    c.model.ratio = 16  # one stage less: total stride 16
    c.model.hr.embed_dims, c.model.hr.depths, c.model.hr.num_heads = 16, (2, 2, 2), (1, 2, 4)
    c.model.hr.window, c.model.hr.pretrained_windows = 4, (0, 0, 0)
    # Swin-V2 starts its branches at 0; in hundreds of steps they do not grow enough to be of use (docs/results.md).
    c.model.hr.branch_scale = 1.0
    for vit in (c.model.s2, c.model.s1):
        vit.patch, vit.embed_dims, vit.depth, vit.num_heads, vit.img_size = 2, 64, 4, 4, 16
    c.model.fusion.embed_dims, c.model.fusion.depth, c.model.fusion.num_heads = 64, 3, 4
    for module in (c.model.hr, c.model.s2, c.model.s1, c.model.fusion):
        module.drop_path = 0.0  # hundreds of steps overfit nothing
    # Without a bank; with one (config.model.geo_context.bank=on) of this size. The paper's cells of 65,536 m would give
    # nearly every synthetic place its own; the training places are few enough to be read before the start.
    geo = c.model.geo_context
    geo.bank, geo.regions, geo.prototypes, geo.width, geo.cell, geo.table = "none", 96, 16, 64, 1e6, "places"

    c.objective.head.update({"hidden": 128, "bottleneck": 64, "prototypes": 256})  # narrow, as the model
    c.objective.clusters = 8  # about 8 cells each
    c.objective.prototype_momentum = 0.9  # a region is visited a few times
    c.objective.align_dim = 64
    c.objective.align_grid = 2  # regions of 4 x 4 cells, as at full size
    c.objective.microbatches = 1  # the memory suffices
    c.objective.chunk = 4096  # all rows of a place at once

    c.optim.b2 = 0.95  # the first gradients are ten times the later ones; 0.999 would remember them for the whole run
    c.schedule.lr, c.schedule.final_lr, c.schedule.warmup_steps = 1e-3, 1e-5, 20  # a narrow network takes larger steps
    c.schedule.final_weight_decay = 0.1  # little time to act: the rise is smaller too
    # A run of hundreds of steps needs a teacher that follows within tens (DINO: 0.996 over 100,000 steps).
    c.schedule.teacher_momentum, c.schedule.final_teacher_momentum = 0.95, 0.995
    c.schedule.teacher_temp = 0.04  # DINO warms up to 0.07; a sharper teacher keeps small batches from collapsing
    c.schedule.warmup_teacher_temp_steps = 60
    c.schedule.freeze_last_layer_steps = 20  # as long as the rate warms up
    c.mesh.data, c.mesh.fsdp = 1, -1  # one copy over all devices
    c.run.save_every, c.run.log_every = 100, 10  # twice in the run, and twenty lines
    return c
