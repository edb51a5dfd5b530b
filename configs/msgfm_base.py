"""msGFM as in the paper: Swin-B with 8 experts in the odd blocks of its third stage, four sensors, 800 epochs.

Command:   python -m skysense_jax.train --config configs/msgfm_base.py --workdir DIR --config.data.dir=DATA
           --config.data.also="('UNPAIRED',)"     (datasets of SEN12MS and MDAS, and of the RGB collections)
Cost:      8 devices, one expert each (config.mesh.expert); the paper's were 8 V100 GPUs. Not run here.
Expected:  encoder with an RGB patch embedding 219,043,896 parameters; 86,725,176 dense (model.moe.stages = ());
           277,808,184 with a tenth mixture, as Swin-MoE has (model.moe.stages = (2, 3)). Decoders and the other
           sensors' patch embeddings apart.
"""

import pathlib
import runpy

from ml_collections import config_dict


def get_config(taken: str = "") -> config_dict.ConfigDict:
    """The paper's sizes and recipe; what it leaves open follows SimMIM and GFM, and Swin-MoE for the experts. taken:
    see configs/msgfm_smoke.py.
    """
    c = runpy.run_path(str(pathlib.Path(__file__).with_name("msgfm_smoke.py")))["get_config"](taken)
    # GeoPile-2 has 1.96 million images: 1914 steps of 1024. The paper's batches were 1024 RGB, 256 SEN12MS and 96 MDAS
    # images, with learning rates in this proportion; here all batches have one size and the rates are the paper's.
    c.steps = 800 * 1914
    c.data.statistics = "dataset"
    c.data.batch = 1024
    c.data.eval_dates.update({name: 4 for name in ("s2", "s1") if name in c.data.eval_dates})
    c.data.threads, c.data.prefetch = 16, 4

    c.model.dtype = "bfloat16"
    c.model.patch, c.model.embed_dims, c.model.img_size, c.model.ratio = 4, 128, 192, 32
    c.model.depths, c.model.num_heads, c.model.window = (2, 2, 18, 2), (4, 8, 16, 32), 6
    c.model.moe.stages, c.model.moe.experts = (2,), 8
    c.model.moe.group = 32  # images routed together: a device's batch in the reference, 32 for its Sentinel images
    c.objective.mask_cell = 32
    c.objective.distill.img_size, c.objective.distill.window = 224, 7  # of the ImageNet teacher, if there is one

    factors = {"s2": 0.25, "s1": 0.25, "dsm": 0.1}
    c.optim.lr_scale.update({name: factors.get(name, 1.0) for name in c.optim.lr_scale})
    # SimMIM's 800 epochs: 10 of warm-up, a tenth of the rate in the last 100
    c.schedule.rule, c.schedule.warmup_steps = "multistep", 10 * 1914
    c.schedule.warmup_lr, c.schedule.lr, c.schedule.final_lr = 5e-7, 1e-4, 1e-5
    c.mesh.expert = 8
    c.run.save_every, c.run.keep, c.run.log_every, c.run.picture_every = 2000, 3, 50, 2000
    return c
