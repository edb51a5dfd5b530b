"""msGFM, smoke size: four sensors, masked images, a mixture of experts, every stage real and the width small.

Command:   python -m skysense_jax.train --config configs/msgfm_smoke.py --workdir DIR --config.data.dir=DATA
           DATA: the default synthetic data of ./launch/local.sh (tiles of 16 base pixels, 16 x 16 HR pixels under each)
Cost:      1 min 39 s on 2 cores that did other work as well (27 s of it compiling), 1.8 GiB.
Result:    SYNTHETIC data; error of hidden pixels: loss/hr-hr 0.86 -> 0.45, loss/dsm-dsm 0.51, loss/s2-s2 0.45 at step
           60, moe/dropped 0.18 -> 0, pictures in DIR/pictures. In 100 steps it learns to draw about each sensor's mean
           (the brackets over the pictures are the mean's error); what 1500 updates learn: docs/msgfm.md.
"""

from ml_collections import config_dict

from skysense_jax import sensors


def get_config(taken: str = "") -> config_dict.ConfigDict:
    """The whole configuration of one run; every field can be overridden with --config.section.field=value. taken: the
    sensors, as in --config configs/msgfm_smoke.py:s2,s1; all of the table unless told.
    """
    names = taken.split(",") if taken else list(sensors.SENSORS)
    if unknown := [name for name in names if name not in sensors.SENSORS]:
        raise ValueError(f"unknown sensors {unknown}: {', '.join(sensors.SENSORS)}")
    rows = {name: sensors.SENSORS[name] for name in names}
    c = config_dict.ConfigDict()
    c.seed = 0
    c.steps = 100

    c.data = config_dict.ConfigDict()
    c.data.dir = ""  # folder that `skysense-jax data build` wrote
    c.data.also = ()  # further ones, georeferenced or not, mixed in
    c.data.split = "train"
    c.data.statistics = "table"  # normalise with the sensor table's statistics, or the datasets' own (`data stats`)
    c.data.batch = 32  # images per step, all of one sensor, over all processes
    c.data.bands = config_dict.ConfigDict({name: row.bands for name, row in rows.items()})
    c.data.eval_dates = config_dict.ConfigDict({name: 1 + row.dated for name, row in rows.items()})
    c.data.scale = (0.67, 1.0)  # area of the crop box relative to the place, and its aspect (GFM)
    c.data.aspect = (0.75, 1.3333333)
    c.data.flip = 0.5  # probability of a horizontal flip
    c.data.threads = 1
    c.data.prefetch = 2
    c.data.max_bad_records = 10  # damaged records a process may pass over (the next one is read instead); more: exit 78

    # Every sensor is brought to img_size pixels; maps of 16, 8 and 4 cells, experts in the second stage.
    c.model = config_dict.ConfigDict(
        {
            "name": "msgfm",
            "dtype": "float32",
            "remat": False,
            "patch": 4,
            "embed_dims": 32,
            "depths": (2, 4, 2),
            "num_heads": (1, 2, 4),
            "window": 4,
            "img_size": 64,
            "mlp_ratio": 4,
            "drop_path": 0.0,
            "eps": 1e-5,
            "ratio": 16,  # HR pixels along one base pixel of the places it is evaluated on
            "moe": {"stages": (1,), "experts": 4, "capacity": 1.25, "gate_noise": 1.0, "aux": "tutel", "group": 8},
        }
    )

    c.objective = config_dict.ConfigDict(
        {
            "mask_ratio": 0.6,
            "mask_cell": 16,  # hidden share of the cells, and their side in pixels
            "cross": 0.5,  # probability that an image of a place with both sensors reconstructs the other one
            "aux_weight": 0.01,  # of the mixtures' auxiliary losses
            # GFM's distillation: weight 0 = none; path: the teacher, a workdir or imported weights with an RGB encoder of
            # this width, depths and heads, without experts; its image size and window
            "distill": {"weight": 0.0, "path": "", "img_size": 64, "window": 4},
        }
    )

    c.optim = config_dict.ConfigDict({"b1": 0.9, "b2": 0.999, "eps": 1e-8, "clip": 5.0})
    # Factor on the learning rate of a batch by its sensor; the paper's are 1, 0.25, 0.25, 0.1 (batches 128, 32, 32, 12)
    c.optim.lr_scale = config_dict.ConfigDict(dict.fromkeys(rows, 1.0))
    c.schedule = config_dict.ConfigDict(
        {
            "rule": "cosine",
            "warmup_lr": 0.0,
            "lr": 2e-3,
            "final_lr": 1e-5,
            "warmup_steps": 10,
            "weight_decay": 0.05,
            "final_weight_decay": 0.05,
        }
    )
    c.mesh = config_dict.ConfigDict({"data": 1, "fsdp": -1, "expert": 1})  # -1: all remaining devices
    # picture_every: steps between pictures of reconstructions in WORKDIR/pictures, 0 = none
    c.run = config_dict.ConfigDict(
        {"save_every": 50, "keep": 2, "log_every": 10, "picture_every": 50, "max_skipped": 10, "watchdog_s": 1800}
    )
    c.eval = config_dict.ConfigDict({"batch": 16, "knn_k": 20, "knn_temp": 0.07, "patch": 4, "bootstrap": 1000})
    return c
