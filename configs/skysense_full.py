"""SkySense at full size: 2.06 B parameters with heads and bank, as in the paper's Table of parameters.

Command:   skysense-jax inspect --config configs/skysense_full.py          (parameter counts, nothing allocated)
           python -m skysense_jax.train --config configs/skysense_full.py --workdir DIR --config.data.dir=DATA
Cost:      the paper trained 875,000 steps of batch 240 on 80 A100-80GB, 24,600 GPU hours.
Expected:  655,079,632 parameters (HR), 302,738,432 (S2), 302,607,360 (S1), 46,182,400 per UP head, 305.20 M fusion.
           Not trained by us: no result is claimed.
Data:      tiles of 64 base pixels with 32 x 32 HR pixels under each, 20 Sentinel-2 and 10 Sentinel-1 dates a sample.
"""

import pathlib
import runpy

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    """The smoke configuration with the paper's sizes; what the paper leaves open is explained there."""
    c = runpy.run_path(str(pathlib.Path(__file__).with_name("skysense_smoke.py")))["get_config"]()
    c.steps = 875_000

    c.data.batch = 256  # the nearest to the paper's 240 that 64 chips divide
    c.data.dates = config_dict.ConfigDict({"hr": 1, "s2": 20, "s1": 10})
    c.data.eval_dates = config_dict.ConfigDict({"hr": 1, "s2": 20, "s1": 10})
    c.data.global_size = 16  # HR 512 px
    c.data.global_scale = (0.0625, 0.25)  # 16 to 32 of a tile's 64 base pixels: native resolution to half of it
    c.data.n_local = 4
    c.data.local_size = 8  # HR 256 px
    c.data.local_scale = (0.0156, 0.0625)  # 8 to 16 base pixels
    c.data.threads = 16
    c.data.prefetch = 4
    c.data.max_bad_records = 100

    c.data.augment.hr_jitter_strength = (0.4, 0.4, 0.2, 0.1)  # DINO's optical set at full strength
    c.data.augment.hr_gray = 0.2
    c.data.augment.hr_blur = (1.0, 0.1, 0.5)
    c.data.augment.hr_solarize = 0.2

    c.model.dtype = "bfloat16"
    c.model.remat = True
    c.model.width = 2816
    c.model.ratio = 32
    c.model.hr = config_dict.ConfigDict(
        {
            "patch": 4,
            "embed_dims": 352,
            "depths": (2, 2, 18, 2),
            "num_heads": (8, 16, 32, 64),
            "window": 8,
            "mlp_ratio": 4,
            "eps": 1e-5,
            "extra_norm_every": 6,
            "pretrained_windows": (0, 0, 0, 0),
            "pad_small_map": False,
            "drop_path": 0.2,
            "drop_path_before_norm": False,
            "branch_scale": 0.0,  # Swin-V2's: blocks start as identities
        }
    )
    vit = {
        "patch": 4,
        "embed_dims": 1024,
        "depth": 24,
        "num_heads": 16,
        "mlp_ratio": 4,
        "img_size": 64,
        "drop_path": 0.3,
        "cls_token": False,
        "eps": 1e-6,
    }
    c.model.s2 = config_dict.ConfigDict(vit)
    c.model.s1 = config_dict.ConfigDict(vit)
    c.model.fusion = config_dict.ConfigDict(
        {"embed_dims": 1024, "depth": 24, "num_heads": 16, "mlp_ratio": 4, "drop_path": 0.3, "eps": 1e-5}
    )
    c.model.geo_context = config_dict.ConfigDict(
        {"bank": "on", "regions": 4096, "prototypes": 100, "width": 512, "cell": 65536.0, "table": "stream"}
    )

    c.objective.prototype_momentum = 0.99
    c.objective.head = config_dict.ConfigDict({"hidden": 2048, "bottleneck": 256, "layers": 3, "prototypes": 65536})
    c.objective.clusters = 16
    c.objective.align_dim = 256
    c.objective.align_grid = 4
    c.objective.microbatches = 2
    c.objective.chunk = 256  # 256 x 65536 float32 logits = 64 MiB per place, against 4 GiB for all rows of a sensor

    c.optim.b2 = 0.999  # the paper's AdamW
    c.schedule.lr = 2e-4
    c.schedule.final_lr = 1e-6
    c.schedule.warmup_steps = 10_000
    c.schedule.teacher_momentum = 0.996
    c.schedule.final_teacher_momentum = 1.0
    c.schedule.teacher_temp = 0.07
    c.schedule.final_weight_decay = 0.2
    c.schedule.warmup_teacher_temp_steps = 30_000
    c.schedule.freeze_last_layer_steps = 90_000  # one epoch: 21.5 M samples / 240
    # 32 divides every large parameter (352 = 32 x 11); replicas beyond that.
    c.mesh = config_dict.ConfigDict({"data": -1, "fsdp": 32})
    c.run.save_every = 1000
    c.run.log_every = 20
    return c
