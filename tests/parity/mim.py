"""Parity of masked image modelling: SimMIM on Swin-V1 through `models.msgfm` with one sensor (see
tests.parity.command)."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import config_dict

from skysense_jax.convert.tensor_files import in_memory
from skysense_jax.convert.torch_import import import_swin
from skysense_jax.models import msgfm
from skysense_jax.nn.swin_v1 import position_bias
from skysense_jax.ops.masking import pixel_mask
from tests.parity.case import Arrays, Case, differentiate, nchw, nhwc, take
from tests.parity.names import simmim_entries
from tests.parity.reference_forms import masked_l1

SENSOR = "hr"


def model_config(case: Case) -> tuple[config_dict.ConfigDict, dict[str, Any]]:
    """config.model and an input contract with the case's one sensor."""
    a = take(
        case.setting("args"),
        {"ape": False, "patch_norm": True, "qk_scale": None, "qkv_bias": True, "num_classes": 0},
        img_size=224,
        patch_size=4,
        in_chans=3,
        embed_dim=96,
        depths=(2, 2, 6, 2),
        num_heads=(3, 6, 12, 24),
        window_size=7,
        mlp_ratio=4.0,
    )
    side, *other = a["img_size"] if isinstance(a["img_size"], (list, tuple)) else (a["img_size"],)
    if any(length != side for length in other):
        raise ValueError(f"img_size {a['img_size']}: the reference reconstructs square images only")
    cfg = config_dict.ConfigDict(
        {
            "name": "msgfm",
            "dtype": case.dtype,
            "remat": False,
            "patch": a["patch_size"],
            "embed_dims": a["embed_dim"],
            "depths": tuple(a["depths"]),
            "num_heads": tuple(a["num_heads"]),
            "window": a["window_size"],
            "img_size": side,
            "mlp_ratio": a["mlp_ratio"],
            "drop_path": 0.0,
            "eps": 1e-5,
            "moe": {"stages": ()},
        }
    )
    if (stated := case.setting("encoder_stride", msgfm.stride(cfg))) != msgfm.stride(cfg):
        raise ValueError(f"encoder_stride {stated}: the encoder's stride is {msgfm.stride(cfg)}")
    return cfg, {"sensors": {SENSOR: {"bands": [f"band{i}" for i in range(a["in_chans"])]}}}


def simmim(case: Case) -> Arrays:
    """SimMIM from the tokens to the loss, and the loss's gradients."""
    if case.inputs:
        raise ValueError("meta_json.inputs: kind simmim takes one input, x with x_mask; write a file for each")
    cfg, contract = model_config(case)
    model, entries = msgfm.make_model(cfg, contract), simmim_entries(cfg, SENSOR)
    params = import_swin(in_memory(case.weights), SENSOR, cfg, contract)[0].params
    mask = jnp.asarray(case.arrays["x_mask"])

    def run(p: Any, x: jax.Array) -> dict[str, Any]:
        tokens = model.embed(p, SENSOR, x, mask)
        encoded = model.encode(p, tokens)
        rec = model.decode(p, SENSOR, encoded.final)
        loss = masked_l1(rec, x, pixel_mask(mask, cfg.patch))
        return {"tokens": tokens, "stages": encoded.stages, "z": encoded.final, "rec": rec, "loss": loss}

    result, _, out, dx = differentiate(run, lambda r: r["loss"], params, nhwc(case.arrays["x"]), entries)

    def flat(x: jax.Array) -> jax.Array:  # [B,h,w,C] -> (B,h*w,C)
        return x.reshape(x.shape[0], -1, x.shape[-1])

    out |= {
        "dx": nchw(dx),
        "y_tokens0": flat(result["tokens"]),
        "y_z": nchw(result["z"]),
        "y_rec": nchw(result["rec"]),
        "y64_loss": result["loss"],
    }
    out |= {f"y_stage{i}": flat(x) for i, x in enumerate(result["stages"])}
    for key in case.has("y_relbias_"):
        stage, block = map(int, re.fullmatch(r"y_relbias_l(\d+)b(\d+)", key).groups())
        table = f"encoder.layers.{stage}.blocks.{block}.attn.relative_position_bias_table"
        window = msgfm.stage_windows(cfg)[stage]
        out[key] = position_bias(_leaf(params, entries, table), window, window)
    return out


def _leaf(params: Any, entries: Any, torch: str) -> np.ndarray:
    """The parameter a torch tensor was imported into."""
    (entry,) = (e for e in entries if e.torch == torch)
    for part in entry.name.split("/"):
        params = params[part]
    return params if entry.index is None else params[entry.index]
