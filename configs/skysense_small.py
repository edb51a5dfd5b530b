"""SkySense, small: the smoke model trained for long enough that what it learnt can be told from what it was born with.

Command:   CONFIG=configs/skysense_small.py PLACES=1600 ./launch/local.sh WORKDIR
Cost:      46 minutes on 2 cores, everything but the installation included; 4.5 GiB of memory.
Result:    on 400 held-out SYNTHETIC places, linear probe: scene 0.81 against 0.71 untrained, patch 0.82 against 0.72
           (docs/results.md).
"""

from ml_collections import config_dict

from skysense_jax.configs import skysense_smoke


def get_config() -> config_dict.ConfigDict:
    """The smoke configuration with twice the batch and more steps, and the dataset's own statistics."""
    c = skysense_smoke.get_config()
    c.steps = 1300
    c.data.batch = 16
    c.data.statistics = "dataset"  # launch/local.sh has computed them
    # The longer run warms up for longer, and has the steps for a slower teacher.
    c.schedule.warmup_steps = 60
    c.schedule.warmup_teacher_temp_steps = 300
    c.schedule.freeze_last_layer_steps = 40
    c.schedule.teacher_momentum = 0.97
    c.schedule.final_teacher_momentum = 0.999
    c.run.save_every = 200
    return c
