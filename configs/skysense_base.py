"""SkySense, base: 321 M parameters in encoders, UP heads and fusion; for 16 chips, or one large GPU.

Command:   python -m skysense_jax.train --config configs/skysense_base.py --workdir DIR --config.data.dir=DATA
           skysense-jax compile-check --config configs/skysense_base.py --topology v5e:4x4
Cost:      docs/pods.md (by the TPU compiler). Not trained by us: no result is claimed.
Data:      as configs/skysense_full.py; the same recipe with base-size encoders (Swin-V2-B, ViT-B).
"""

from ml_collections import config_dict

from skysense_jax.configs import skysense_full


def get_config() -> config_dict.ConfigDict:
    """The full configuration with smaller modules."""
    c = skysense_full.get_config()
    c.data.batch = 64  # 4 places a chip, as the full batch on 64 chips
    c.model.width = 1024  # Swin-V2-B's last stage
    c.model.hr.embed_dims = 128
    c.model.hr.num_heads = (4, 8, 16, 32)
    for vit in (c.model.s2, c.model.s1):  # ViT-B, with less stochastic depth for less depth
        vit.embed_dims, vit.depth, vit.num_heads, vit.drop_path = 768, 12, 12, 0.1
    c.model.fusion.embed_dims, c.model.fusion.depth, c.model.fusion.num_heads = 512, 12, 8  # half of the full ones
    c.model.fusion.drop_path = 0.1
    c.objective.head.hidden, c.objective.head.prototypes = 1024, 16384  # as narrow as the model
    c.objective.microbatches = 1  # the whole batch fits
    c.mesh.fsdp = 16
    return c
