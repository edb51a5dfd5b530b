"""msGFM as in the paper: Swin-B with 8 experts in the odd blocks of its third stage, four sensors, 800 epochs.

Command:   python -m skysense_jax.train --config configs/msgfm_base.py --workdir DIR --config.data.dir=DATA
           --config.data.also="('UNPAIRED',)"     (datasets of SEN12MS and MDAS, and of the RGB collections)
Cost:      8 devices, one expert each (config.mesh.expert); the paper's were 8 V100 GPUs. Not run here.
Expected:  encoder with an RGB patch embedding 219,043,896 parameters; 86,725,176 dense (model.moe.stages = ());
           277,808,184 with a tenth mixture, as Swin-MoE has (model.moe.stages = (2, 3)). Decoders and the other
           sensors' patch embeddings apart.

This is the recipe: every field, and beside it where the value comes from. "Paper": a number of the paper. What the
paper leaves open follows SimMIM and GFM, whose code msGFM is built on, and Swin-MoE for the experts; the name stands
beside it. "Open": none of them says, and the reason is ours. msgfm_smoke.py shrinks this file.
"""

from ml_collections import config_dict

from skysense_jax import sensors

EPOCH = 1914
"""Steps of an epoch: GeoPile-2 has 1.96 million images, and a batch 1024."""

LR_SCALE = {"hr": 1.0, "s2": 0.25, "s1": 0.25, "dsm": 0.1}
"""Sensor -> factor on the learning rate; paper: 1e-4 for RGB, 0.25e-4 for SEN12MS, 1e-5 for MDAS."""


def rows(names: str) -> dict[str, sensors.Sensor]:
    """Rows of the sensor table by name. names: separated by commas; "" = all. Raises ValueError on an unknown name."""
    selected = names.split(",") if names else list(sensors.SENSORS)
    if unknown := [name for name in selected if name not in sensors.SENSORS]:
        raise ValueError(f"unknown sensors {unknown}: {', '.join(sensors.SENSORS)}")
    return {name: sensors.SENSORS[name] for name in selected}


def get_config(names: str = "") -> config_dict.ConfigDict:
    """The whole configuration of one run; every field can be overridden with --config.section.field=value.

    names: the sensors, as in --config configs/msgfm_base.py:s2,s1; all of the table unless told.
    """
    table = rows(names)
    c = config_dict.ConfigDict()
    c.seed = 0
    c.steps = 800 * EPOCH  # paper: 800 epochs

    c.data = config_dict.ConfigDict()
    c.data.dir = ""  # folder that `skysense-jax data build` wrote
    c.data.also = ()  # further ones, georeferenced or not, mixed in
    c.data.split = "train"
    c.data.statistics = "dataset"  # normalise with the datasets' own (`data stats`), or the sensor "table"'s; open
    # Images per step, all of one sensor (paper), over all processes. The paper's batches were 1024 RGB, 256 SEN12MS and
    # 96 MDAS images, with learning rates in this proportion; here all batches have one size, the rates are the paper's.
    c.data.batch = 1024
    c.data.bands = config_dict.ConfigDict({name: row.bands for name, row in table.items()})
    # Acquisitions that an evaluated place may have: a time series is encoded one by one, and averaged; open
    c.data.eval_dates = config_dict.ConfigDict({name: 4 if row.dated else 1 for name, row in table.items()})
    c.data.scale = (0.67, 1.0)  # area of the crop box relative to the place, and its aspect; GFM
    c.data.aspect = (0.75, 1.3333333)
    c.data.flip = 0.5  # probability of a horizontal flip; GFM
    c.data.threads = 16  # reader threads of a process, and batches ahead; open: for a host of 8 devices
    c.data.prefetch = 4
    c.data.max_bad_records = 10  # damaged records a process may pass over (the next one is read instead); more: exit 78

    # Every sensor is brought to img_size pixels. Swin-B is the paper's; its numbers are SimMIM's and GFM's
    c.model = config_dict.ConfigDict(
        {
            "name": "msgfm",
            "dtype": "bfloat16",  # of the products; GFM trains in mixed precision too
            "remat": False,  # open: a device's images fit without (docs/pods.md)
            "patch": 4,  # the paper's "patch size 16 x 16" cannot be this one: four stages would end below one cell
            "embed_dims": 128,
            "depths": (2, 2, 18, 2),
            "num_heads": (4, 8, 16, 32),
            "window": 6,
            "img_size": 192,  # paper
            "mlp_ratio": 4,
            "drop_path": 0.0,
            "eps": 1e-5,
            "ratio": 32,  # HR pixels along one base pixel of the places it is evaluated on: as SkySense's
            "moe": {
                "stages": (2,),  # counted from 0; paper: 9 mixtures = the odd blocks of the third stage
                "experts": 8,  # paper
                "capacity": 1.25,  # paper
                "gate_noise": 1.0,  # Swin-MoE
                "aux": "tutel",  # form of the auxiliary loss; Swin-MoE
                "group": 32,  # images routed together: a device's batch in the reference, 32 for its Sentinel images
            },
        }
    )

    c.objective = config_dict.ConfigDict(
        {
            "mask_ratio": 0.6,  # hidden share of the cells; SimMIM, GFM
            "mask_cell": 32,  # their side in pixels; SimMIM, GFM
            "cross": 0.5,  # probability that an image of a place with both sensors reconstructs the other one; paper
            "aux_weight": 0.01,  # of the mixtures' auxiliary losses; paper
            # GFM's distillation; paper: from scratch is better, weight 0 = none. path: the teacher, a workdir or
            # imported weights with an RGB encoder of this width, depths and heads, without experts. Its image size and
            # window: GFM's ImageNet teacher's
            "distill": {"weight": 0.0, "path": "", "img_size": 224, "window": 7},
        }
    )

    c.optim = config_dict.ConfigDict({"b1": 0.9, "b2": 0.999, "eps": 1e-8, "clip": 5.0})  # SimMIM, GFM
    c.optim.lr_scale = config_dict.ConfigDict({name: LR_SCALE.get(name, 1.0) for name in table})
    # SimMIM's 800 epochs: 10 of warm-up, a tenth of the rate in the last 100
    c.schedule = config_dict.ConfigDict(
        {
            "rule": "multistep",
            "warmup_lr": 5e-7,
            "lr": 1e-4,  # paper, taken as it is: SimMIM's code would multiply it by batch / 512
            "final_lr": 1e-5,
            "warmup_steps": 10 * EPOCH,
            "weight_decay": 0.05,  # SimMIM, GFM: constant
            "final_weight_decay": 0.05,
        }
    )
    # One expert per device, the paper's 8; -1: all remaining devices
    c.mesh = config_dict.ConfigDict({"data": 1, "fsdp": -1, "expert": 8})
    c.run = config_dict.ConfigDict(
        {
            "save_every": 2000,  # about an epoch
            "keep": 3,  # checkpoints
            "log_every": 50,
            "picture_every": 2000,  # steps between pictures of reconstructions in WORKDIR/pictures, 0 = none
            "max_skipped": 10,  # updates that were not finite and left out; more end the run with 65
            "watchdog_s": 1800,  # no step for so long ends the process with 70; longer than the longest save
        }
    )
    # Batch, DINO's nearest neighbours, side of a labelled patch in base pixels, resamplings of the interval
    c.eval = config_dict.ConfigDict({"batch": 16, "knn_k": 20, "knn_temp": 0.07, "patch": 4, "bootstrap": 1000})
    return c
