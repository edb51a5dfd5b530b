"""SkySense, smoke size: every stage real, the width small.

Command:   ./launch/local.sh              (builds the synthetic default data, pretrains this, evaluates, exports)
           python -m skysense_jax.train --config configs/skysense_smoke.py --workdir DIR --config.data.dir=DIR/data
Cost:      6.5 minutes on 2 cores for the first command, after installation; 3.6 GiB of memory.
Result:    every stage works; 200 steps of 8 SYNTHETIC places learn too little to tell from the untrained network
           (docs/results.md, and configs/skysense_small.py for a run that can).
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    """The whole configuration of one run; every field can be overridden with --config.section.field=value."""
    c = config_dict.ConfigDict()
    c.seed = 0
    c.steps = 200

    c.data = config_dict.ConfigDict()
    c.data.dir = ""  # folder that `skysense-jax data build` wrote
    c.data.split = "train"
    c.data.statistics = "table"  # normalise with the sensor table's statistics, or the "dataset"'s own (`data stats`)
    c.data.batch = 8  # places per step, over all processes
    c.data.bands = config_dict.ConfigDict(
        {
            "hr": ("R", "G", "B"),
            "s2": ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12"),
            "s1": ("VV", "VH"),
        }
    )
    c.data.dates = config_dict.ConfigDict({"hr": 1, "s2": 4, "s1": 3})  # drawn per view; the paper: 1, 20, 10
    c.data.eval_dates = config_dict.ConfigDict({"hr": 1, "s2": 8, "s1": 6})
    c.data.global_size = 8  # base (Sentinel-2) pixels of a global view; the paper's full size: 16
    c.data.global_scale = (0.4, 1.0)  # area of the crop box relative to the place (DINO's multi-crop)
    c.data.n_local = 2
    c.data.local_size = 4
    c.data.local_scale = (0.1, 0.4)
    c.data.aspect = (0.75, 1.3333333)
    c.data.flip = 0.5  # probability of a horizontal and of a vertical flip, each
    c.data.rotate = 0.5  # probability of a quarter turn (90, 180 or 270 degrees)
    c.data.date_jitter_days = 7
    c.data.augment = config_dict.ConfigDict(
        {
            # HR: DINO's optical set at half its strength, without solarisation: at full strength the head of an HR encoder
            # this narrow drifted to uniform (teacher entropy 0.54 to 0.90 of log K in 200 steps).
            "hr_jitter": 0.8,
            "hr_jitter_strength": (0.2, 0.2, 0.1, 0.05),
            "hr_gray": 0.1,
            "hr_blur": (0.5, 0.1, 0.2),
            "hr_solarize": 0.0,
            # S2, S1: gain and offset of the radiometry, in the sensor's own unit.
            "s2_gain": 0.1,
            "s2_band_gain": 0.05,
            "s1_shift_db": 1.0,
            "s1_speckle_db": 0.5,
        }
    )
    c.data.threads = 1  # a second one gains nothing on two cores: the arrays are small, Python's lock is the bound
    c.data.prefetch = 2
    c.data.max_bad_records = 10  # damaged records a process may pass over (the next one is read instead); more: exit 78

    c.model = config_dict.ConfigDict()
    c.model.name = "skysense"
    c.model.dtype = "float32"
    c.model.remat = False
    c.model.width = 64  # D: width of the common grid (2816 at full size)
    c.model.ratio = 16  # HR pixels along one base pixel = total stride of the HR encoder (32 at full size)
    c.model.calendar = "dated"
    c.model.hr = config_dict.ConfigDict(
        {
            "patch": 4,
            "embed_dims": 16,
            "depths": (2, 2, 2),
            "num_heads": (1, 2, 4),
            "window": 4,
            "mlp_ratio": 4,
            "eps": 1e-5,
            "extra_norm_every": 6,
            "pretrained_windows": (0, 0, 0),
            "pad_small_map": False,
            "drop_path": 0.0,
            "drop_path_before_norm": False,
            # Swin-V2 starts its branches at 0; in hundreds of steps they do not grow enough to be of use (docs/results.md).
            "branch_scale": 1.0,
        }
    )
    vit = {
        "patch": 2,
        "embed_dims": 64,
        "depth": 4,
        "num_heads": 4,
        "mlp_ratio": 4,
        "img_size": 16,
        "drop_path": 0.0,
        "cls_token": False,
        "eps": 1e-6,
    }
    c.model.s2 = config_dict.ConfigDict(vit)
    c.model.s1 = config_dict.ConfigDict(vit)
    c.model.fusion = config_dict.ConfigDict(
        {"embed_dims": 64, "depth": 3, "num_heads": 4, "mlp_ratio": 4, "drop_path": 0.0, "eps": 1e-5}
    )
    # Geo-context. bank: "none" = without; "on" = a bank of prototypes per region is learnt and asked; "frozen" = only
    # asked.
    c.model.geo_context = config_dict.ConfigDict(
        {
            "bank": "none",
            "regions": 96,
            "prototypes": 16,
            "width": 64,
            # Side of a region's grid cell in metres. The paper's 65,536 would give nearly every synthetic place its own.
            "cell": 1e6,
            # Which cells are regions: those of the training "places", read before the start, a "stream": as they come; or
            # "hashed": all, sharing the regions, a square number
            "table": "places",
        }
    )

    c.objective = config_dict.ConfigDict()
    # DINO's head, narrow; one per sensor and one for the fused map, shared by the three granularities (the paper's
    # parameter budget leaves room for about that many).
    c.objective.head = config_dict.ConfigDict({"hidden": 128, "bottleneck": 64, "layers": 3, "prototypes": 256})
    c.objective.student_temp = 0.1  # DINO
    c.objective.centre_momentum = 0.9  # DINO's centring: unlike Sinkhorn it never needs all logits at once
    c.objective.clusters = 8  # N_C of the object granularity: a regular grid of seeds, about 8 cells each (paper: open)
    c.objective.sinkhorn_eps = 0.05  # temperature on the cosine, and iterations: SwAV's; also of the prototype bank
    c.objective.sinkhorn_iters = 3
    c.objective.prototype_momentum = 0.9  # of the bank, if any; a region is visited a few times (full size: 0.99)
    c.objective.alpha = 1.0  # weight of the multi-granularity term (paper: open)
    c.objective.beta = 1.0  # weight of the cross-modal alignment (paper: open)
    c.objective.align_dim = 64  # width of the space the sensors meet in
    c.objective.align_temp = 0.07  # CLIP's and MoCo's
    c.objective.align_grid = 2  # alignment on grid x grid regions of a view: more positives; 1 = whole views
    c.objective.microbatches = 1  # parts of the batch, encoded one after the other: less memory, the same gradient
    c.objective.chunk = 4096  # rows of one place whose logits are held at once; more are scanned and rematerialised

    # b2: the first gradients are ten times the later ones; 0.999 would remember them for the whole run.
    c.optim = config_dict.ConfigDict({"b1": 0.9, "b2": 0.95, "eps": 1e-8, "clip": 3.0})
    c.schedule = config_dict.ConfigDict(
        {
            # linear to lr over the warm-up, then "cosine" or "linear" to final_lr ("gfm": GFM's own rule)
            "rule": "cosine",
            "warmup_lr": 0.0,
            "lr": 1e-3,
            "final_lr": 1e-5,
            "warmup_steps": 20,
            "weight_decay": 0.04,
            "final_weight_decay": 0.1,
            # A run of hundreds of steps needs a teacher that follows within tens (DINO: 0.996 over 100,000 steps).
            "teacher_momentum": 0.95,
            "final_teacher_momentum": 0.995,
            # DINO warms up to 0.07; a sharper teacher keeps small batches from the uniform collapse.
            "teacher_temp": 0.04,
            "warmup_teacher_temp": 0.04,
            "warmup_teacher_temp_steps": 60,
            "freeze_last_layer_steps": 20,
        }
    )
    c.mesh = config_dict.ConfigDict({"data": 1, "fsdp": -1})  # -1: all remaining devices
    # watchdog_s: no step for so long ends the process with 70; longer than the longest save
    c.run = config_dict.ConfigDict(
        {"save_every": 100, "keep": 2, "log_every": 10, "max_skipped": 10, "watchdog_s": 1800}
    )
    c.eval = config_dict.ConfigDict({"batch": 16, "knn_k": 20, "knn_temp": 0.07, "patch": 4, "bootstrap": 1000})
    return c
