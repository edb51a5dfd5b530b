"""SkySense at full size: 2.06 B parameters with heads and bank, as in the paper's Table of parameters.

Command:   skysense-jax inspect --config configs/skysense_full.py          (parameter counts, nothing allocated)
           python -m skysense_jax.train --config configs/skysense_full.py --workdir DIR --config.data.dir=DATA
Cost:      the paper trained 875,000 steps of batch 240 on 80 A100-80GB, 24,600 GPU hours.
Expected:  655,079,632 parameters (HR), 302,738,432 (S2), 302,607,360 (S1), 46,182,400 per UP head, 305.20 M fusion.
           Not trained by us: no result is claimed.
Data:      tiles of 64 base pixels with 32 x 32 HR pixels under each, 20 Sentinel-2 and 10 Sentinel-1 dates a sample.

This is the recipe: every field, and beside it where the value comes from. "Paper": a number of the paper. "Release":
the architecture of the released weights, or the training configurations of SkySense++ by the same group. "Open":
neither says; then the source of our choice, or its reason. skysense_base.py and skysense_smoke.py shrink this file.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    """The whole configuration of one run; every field can be overridden with --config.section.field=value."""
    c = config_dict.ConfigDict()
    c.seed = 0
    c.steps = 875_000  # paper

    c.data = config_dict.ConfigDict()
    c.data.dir = ""  # folder that `skysense-jax data build` wrote
    c.data.split = "train"
    c.data.statistics = "table"  # normalise with the sensor table's statistics (SkySense++'s), or the "dataset"'s
    c.data.batch = 256  # places per step, over all processes: the nearest to the paper's 240 that 64 chips divide
    c.data.bands = config_dict.ConfigDict(  # release: RGB, the bands of 10 and 20 m, both polarisations
        {
            "hr": ("R", "G", "B"),
            "s2": ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12"),
            "s1": ("VV", "VH"),
        }
    )
    c.data.dates = config_dict.ConfigDict({"hr": 1, "s2": 20, "s1": 10})  # drawn per view; paper
    c.data.eval_dates = config_dict.ConfigDict({"hr": 1, "s2": 20, "s1": 10})  # as many as training has seen
    # Views: two global ones and n_local small ones, in base (Sentinel-2) pixels; open. 16 are 512 HR pixels, a size of
    # the release. A scale is the area of the crop box relative to the place, so that of a tile's 64 base pixels
    c.data.global_size = 16
    c.data.global_scale = (0.0625, 0.25)  # 16 to 32 are cut out: native resolution to half of it
    c.data.n_local = 4  # DINO has 8; the HR encoder costs more here
    c.data.local_size = 8  # 256 HR pixels: the smallest view whose last HR map still fills a window of 8
    c.data.local_scale = (0.0156, 0.0625)  # 8 to 16
    c.data.aspect = (0.75, 1.3333333)  # open; DINO's multi-crop
    c.data.flip = 0.5  # probability of a horizontal and of a vertical flip, each; open: land has no upper side
    c.data.rotate = 0.5  # probability of a quarter turn (90, 180 or 270 degrees); the same reason
    c.data.date_jitter_days = 7  # the paper disturbs the dates, by how much is open: a week changes little on land
    c.data.augment = config_dict.ConfigDict(
        {
            # HR: "standard optical augmentations" in the paper, numbers open: DINO's, at full strength.
            "hr_jitter": 0.8,  # probability
            "hr_jitter_strength": (0.4, 0.4, 0.2, 0.1),  # brightness, contrast, saturation, hue
            "hr_gray": 0.2,
            "hr_blur": (1.0, 0.1, 0.5),  # in the first global view, the second, the local ones
            "hr_solarize": 0.2,
            # S2, S1: open. Gain and offset of the radiometry in the sensor's unit; colour jitter has no meaning there.
            "s2_gain": 0.1,
            "s2_band_gain": 0.05,
            "s1_shift_db": 1.0,
            "s1_speckle_db": 0.5,
        }
    )
    c.data.threads = 16  # reader threads of a process; a TPU host has more cores than that
    c.data.prefetch = 4  # batches
    c.data.max_bad_records = 100  # damaged records a process may pass over (the next is read instead); more: exit 78

    c.model = config_dict.ConfigDict()
    c.model.name = "skysense"
    c.model.dtype = "bfloat16"  # of the products; parameters, softmax and norms stay float32. Open; SkySense++'s
    c.model.remat = True  # release: checkpointing of every block
    c.model.width = 2816  # D: width of the common grid = the HR encoder's last stage; release
    c.model.ratio = 32  # HR pixels along one base pixel = total stride of the HR encoder; release
    c.model.calendar = "dated"  # its table is added to every vector with a date: the paper's formula (release: S2 only)
    # Swin-V2-Huge; all release, but for the last two
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
            "pretrained_windows": (0, 0, 0, 0),  # none: the bias tables are for this window
            "pad_small_map": False,
            "drop_path": 0.2,
            "drop_path_before_norm": False,  # Swin-V2's; release: True, so that a dropped branch adds its norm's bias
            "branch_scale": 0.0,  # open; Swin-V2's: blocks start as identities
        }
    )
    # ViT-L/4, the same for both; release
    vit = {
        "patch": 4,
        "embed_dims": 1024,
        "depth": 24,
        "num_heads": 16,
        "mlp_ratio": 4,
        "img_size": 64,  # base pixels of a whole tile: the position table has 16 x 16 rows
        "drop_path": 0.3,
        "cls_token": False,  # a parameter exists in the files; all training configurations leave it out
        "eps": 1e-6,
    }
    c.model.s2 = config_dict.ConfigDict(vit)
    c.model.s1 = config_dict.ConfigDict(vit)
    # release; paper: 398 M with both UP heads
    c.model.fusion = config_dict.ConfigDict(
        {"embed_dims": 1024, "depth": 24, "num_heads": 16, "mlp_ratio": 4, "drop_path": 0.3, "eps": 1e-5}
    )
    c.model.geo_context = config_dict.ConfigDict(
        {
            # "none" = without; "on" = a bank of prototypes per region is learnt and asked; "frozen" = only asked
            "bank": "on",
            "regions": 4096,  # paper
            "prototypes": 100,  # per region; paper
            "width": 512,  # open; 4096 x 100 x 512 = 209.7 M of the paper's 215 M, and the rest fits the projections
            "cell": 65536.0,  # side of a region's grid cell in metres; paper: 4294 square kilometres
            # Which cells are regions; open. "places" = those of the training places, read before the start; "stream" =
            # as they come, for 21.5 M places; "hashed" = all, sharing the regions, a square number
            "table": "stream",
        }
    )

    c.objective = config_dict.ConfigDict()
    # The loss between student and teacher is DINO's in the paper, its numbers are open: DINO's. One head per sensor and
    # one for the fused map, shared by the three granularities (the paper's budget leaves room for about that many).
    c.objective.head = config_dict.ConfigDict({"hidden": 2048, "bottleneck": 256, "layers": 3, "prototypes": 65536})
    c.objective.student_temp = 0.1  # DINO
    c.objective.centre_momentum = 0.9  # DINO's centring: unlike Sinkhorn it never needs all logits at once
    # N_C of the object granularity, from a regular grid of seeds; open: as many as SkySense V2 has queries for it
    c.objective.clusters = 16
    c.objective.sinkhorn_eps = 0.05  # open: temperature on the cosine, and iterations: SwAV's; also of the bank
    c.objective.sinkhorn_iters = 3
    c.objective.prototype_momentum = 0.99  # of the bank; open: a region is visited about 50,000 times
    c.objective.alpha = 1.0  # weight of the multi-granularity term; open
    c.objective.beta = 1.0  # weight of the cross-modal alignment; open
    # Alignment: the paper says that it is contrastive, the form is open
    c.objective.align_dim = 256  # width of the space the sensors meet in: as the bottleneck of the heads
    c.objective.align_temp = 0.07  # CLIP's and MoCo's
    c.objective.align_grid = 4  # on grid x grid regions of a view: more positives; 1 = whole views
    # Memory only: the gradient is the same
    c.objective.microbatches = 2  # parts of the batch, encoded one after the other
    # Rows of one place whose logits exist at once; more are scanned and rematerialised. 256 x 65536 float32 logits are
    # 64 MiB per place, against 4 GiB for all rows of a sensor
    c.objective.chunk = 256

    c.optim = config_dict.ConfigDict(
        {
            "b1": 0.9,  # paper: AdamW, whose defaults these three are; SkySense++ names the betas
            "b2": 0.999,
            "eps": 1e-8,
            "clip": 3.0,  # global norm; open: DINO's (SkySense++: 5)
        }
    )
    c.schedule = config_dict.ConfigDict(
        {
            # linear from warmup_lr to lr over the warm-up, then "cosine" or "linear" to final_lr ("gfm": GFM's rule)
            "rule": "cosine",  # open; SkySense V2's, with both rates
            "warmup_lr": 0.0,
            "lr": 2e-4,
            "final_lr": 1e-6,
            "warmup_steps": 10_000,  # open: a ninth of an epoch (SkySense++, from trained weights: 1,000 steps)
            "weight_decay": 0.04,  # open: SkySense++ and DINO
            "final_weight_decay": 0.2,  # open: half of DINO's last value
            "teacher_momentum": 0.996,  # open: DINO's, as the four fields below
            "final_teacher_momentum": 1.0,
            "teacher_temp": 0.07,
            "warmup_teacher_temp": 0.04,
            "warmup_teacher_temp_steps": 30_000,  # a third of an epoch
            "freeze_last_layer_steps": 90_000,  # one epoch: 21.5 M samples / 240
        }
    )
    # fsdp: 32 divides every large parameter (352 = 32 x 11); data: -1 = replicas, all devices beyond that.
    c.mesh = config_dict.ConfigDict({"data": -1, "fsdp": 32})
    c.run = config_dict.ConfigDict(
        {
            "save_every": 1000,  # about 20 minutes at the paper's speed
            "keep": 2,  # checkpoints: a damaged last one costs save_every steps
            "log_every": 20,
            "max_skipped": 10,  # updates that were not finite and left out; more end the run with 65
            "watchdog_s": 1800,  # no step for so long ends the process with 70; longer than the longest save
        }
    )
    # Batch, DINO's nearest neighbours, side of a labelled patch in base pixels, resamplings of the interval
    c.eval = config_dict.ConfigDict({"batch": 16, "knn_k": 20, "knn_temp": 0.07, "patch": 4, "bootstrap": 1000})
    return c
