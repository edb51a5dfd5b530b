"""msGFM with the paper's encoder, Swin-B with 8 experts in the odd blocks of its third stage: the model and its input.

Expected:  encoder with an RGB patch embedding 219,043,896 parameters; 86,725,176 dense (model.moe.stages = ());
           277,808,184 with a tenth mixture, as Swin-MoE has (model.moe.stages = (2, 3)). Decoders and the other
           sensors' patch embeddings apart.
"""
from ml_collections import config_dict

from skysense_jax import sensors


def get_config() -> config_dict.ConfigDict:
    """The paper's sizes; what it leaves open follows SimMIM and GFM, and Swin-MoE for the experts."""
    return config_dict.ConfigDict({
        "data": {"bands": {name: row.bands for name, row in sensors.SENSORS.items()}},
        "model": {
            "name": "msgfm", "dtype": "bfloat16", "remat": False, "patch": 4, "embed_dims": 128,
            "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32), "window": 6, "img_size": 192, "mlp_ratio": 4,
            "drop_path": 0.0, "eps": 1e-5,
            "moe": {
                "stages": (2,), "experts": 8, "capacity": 1.25, "gate_noise": 1.0, "aux": "tutel",
                "group": 32,  # images routed together: a device's batch in the reference, 32 for its Sentinel images
            },
        },
    })
