"""Parity of the assembled model: the fusion's input sequence, and the whole factorised forward through `make_model`
(see tests.parity.command).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import config_dict

from skysense_jax.convert import layouts
from skysense_jax.convert.torch_import import params_from_torch
from skysense_jax.models.skysense import build_modules, fusion_sequence, make_model
from tests.parity.case import Arrays, Case, differentiate, nchw, nhwc, with_class_rows, without_class_rows
from tests.parity.encoders import swin_arguments, vit_arguments
from tests.parity.modules import fusion_arguments


def assembly(case: Case) -> Arrays:
    """The official sequence gives the first 256 of its 512 cells the dates `x_ct` and the others `x_ct2`."""
    (b, _), (h, w) = case.arrays["x_ct"].shape, case.setting("hw")
    maps, masks = {}, {}
    for sensor in ("hr", "s2", "s1"):
        if f"x_f_{sensor}" in case.arrays:
            x = nhwc(case.arrays[f"x_f_{sensor}"])
            maps[sensor] = x.reshape(b, -1, *x.shape[1:])
            masks[sensor] = jnp.ones(maps[sensor].shape[:4])
    halves = []
    for key in ("x_ct", "x_ct2"):
        dates = jnp.asarray(case.arrays.get(key, case.arrays["x_ct"]))
        sequence, _ = fusion_sequence(maps, masks, {"s2": dates}, "s2", jnp.asarray(case.weights["ctpe"]))
        halves.append(sequence.reshape(b, h * w, *sequence.shape[3:]))
    cut = 256 if "x_ct2" in case.arrays else h * w
    joined = jnp.concatenate([halves[0][:, :cut], halves[1][:, cut:]], axis=1)
    return {"y_seq": joined.reshape(b * h * w, *joined.shape[2:])}


def constructor_arguments(case: Case) -> dict[str, dict[str, Any]]:
    """The reference constructors' arguments: `cfg`, an entry per module, overridden by what an input (hr, s2, s1)
    states.
    """
    reference = dict(case.setting("cfg"))
    for name, settings in case.inputs.items():
        if name not in ("hr", "s2", "s1") or name not in reference:
            raise ValueError(f"meta_json.inputs.{name}: this kind has the inputs hr, s2 and s1; state no other")
        reference[name] = {**reference[name], **{k: v for k, v in settings.items() if k != "shape"}}
    return reference


def model_config(case: Case) -> tuple[config_dict.ConfigDict, dict[str, Any]]:
    """config.model and an input contract that leaves values as they are, from a factorised case."""
    reference = constructor_arguments(case)
    hr, f = swin_arguments(reference["hr"]), fusion_arguments(reference["fusion"])
    stages = len(hr["depths"])
    ratio = hr["patch"] * 2 ** (stages - 1)
    fields = {
        "name": "skysense",
        "dtype": case.dtype,
        "remat": False,
        "width": hr["width"] * 2 ** (stages - 1),
        "ratio": ratio,
        "calendar": "s2" if "ctpe" in case.weights else "none",
        "hr": {
            "patch": hr["patch"],
            "embed_dims": hr["width"],
            "depths": hr["depths"],
            "num_heads": hr["heads"],
            "window": hr["windows"],
            "mlp_ratio": 4,
            "extra_norm_every": hr["extra_norm_every"],
            "drop_path": 0.0,
            "pretrained_windows": hr["pretrained_windows"],
            "pad_small_map": hr["pad_small_map"],
            "drop_path_before_norm": True,
            "branch_scale": 0.0,
            "eps": hr["eps"],
        },
        "fusion": {
            "embed_dims": f["width"],
            "depth": f["depth"],
            "num_heads": f["heads"],
            "mlp_ratio": f["mlp_ratio"],
            "drop_path": 0.0,
            "eps": f["eps"],
        },
    }
    contract: dict[str, Any] = {"ratio": ratio, "sensors": {}}
    for sensor in ("hr", "s2", "s1"):
        if f"x_{sensor}" not in case.arrays:
            continue
        channels = case.arrays[f"x_{sensor}"].shape[1]
        contract["sensors"][sensor] = {
            "bands": [f"band{i}" for i in range(channels)],
            "grid": "hr" if sensor == "hr" else "s2",
            "mean": [0.0] * channels,
            "std": [1.0] * channels,
        }
        if sensor != "hr":
            a, head = vit_arguments(reference[sensor]), reference[f"head_{sensor}"]
            if head["up_scale"] != a["patch"] or head["out_dim"] != fields["width"]:
                raise ValueError(f"head_{sensor} does not lead to the common grid: {head}")
            fields[sensor] = {
                "patch": a["patch"],
                "embed_dims": a["width"],
                "depth": a["depth"],
                "num_heads": a["heads"],
                "mlp_ratio": a["mlp_ratio"],
                "img_size": a["table_grid"][0] * a["patch"],
                "drop_path": 0.0,
                "cls_token": a["cls_token"],
                "eps": a["eps"],
            }
    return config_dict.ConfigDict(fields), contract


def factorised(case: Case) -> Arrays:
    """The whole forward of the factorised encoder, and the gradients of sum(y_fused * g_fused)."""
    cfg, contract = model_config(case)
    model, entries = make_model(cfg, contract), layouts.model_entries(cfg, contract)
    grids = {f"backbone_{s}.pos_embed": (cfg[s].img_size // cfg[s].patch,) * 2 for s in ("s2", "s1") if s in cfg}
    weights, added = with_class_rows(case.weights, grids)
    params = params_from_torch(weights, cfg, contract)
    images = {}
    for sensor in contract["sensors"]:  # (B,C,H,W) or (B,C,T,H,W) -> [B,T,H,W,C]
        x = case.arrays[f"x_{sensor}"]
        images[sensor] = jnp.asarray(np.moveaxis(x if x.ndim == 5 else x[:, :, None], 1, -1))

    def place(images: Mapping[str, jax.Array]) -> dict[str, Any]:
        inputs = {}
        for sensor, x in images.items():
            dates = jnp.asarray(case.arrays["x_ct"], jnp.int32) if sensor == "s2" else jnp.full(x.shape[:2], -1)
            inputs[sensor] = {
                "image": x,
                "valid": jnp.ones(x.shape[:4]),
                "dates": dates,
                "bands": jnp.ones((*x.shape[:2], x.shape[-1])),
            }
        return inputs

    inputs, out = place(images), {}

    def run(p: Any, x: Mapping[str, jax.Array]) -> Any:
        return model.apply(p, place(x))

    def flat(x: jax.Array) -> np.ndarray:  # [B,T,h,w,C] -> (B*T,C,h,w)
        return nchw(x.reshape(-1, *x.shape[2:]))

    if "g_fused" in case.arrays:
        g = nhwc(case.arrays["g_fused"])
        result, _, d, dx = differentiate(run, lambda outputs: jnp.sum(outputs["fused"] * g), params, images, entries)
        out |= without_class_rows(d, added)
        for sensor, x in dx.items():
            out[f"dx_{sensor}"] = np.moveaxis(np.asarray(x), -1, 1).reshape(case.arrays[f"x_{sensor}"].shape)
    else:
        result = jax.jit(run)(params, images)
    stages = swin_arguments(constructor_arguments(case)["hr"])["outputs"]
    out |= {f"y_hr_{k}": flat(result["hr_stages"][i]) for k, i in enumerate(stages)}
    out |= {f"y_{s}_vit": flat(x) for s, x in result["vit"].items()}
    out |= {f"y_{s}_up": flat(result["maps"][s]) for s in result["vit"]}
    dates = {s: x["dates"] for s, x in inputs.items()}
    sequence, _ = fusion_sequence(result["maps"], result["mask"], dates, cfg.calendar, params.get("ctpe"))
    out["y_seq"] = sequence.reshape(-1, *sequence.shape[3:])
    _, every = build_modules(cfg, contract)["fusion"].apply({"params": params["fusion"]}, out["y_seq"], emit=True)
    out |= {f"y_fusion_block{i}": every[i] for i in range(cfg.fusion.depth)}
    out["y_fused"] = nchw(result["fused"])
    if "y_fused_noctpe" in case.arrays:
        without = config_dict.ConfigDict({**cfg.to_dict(), "calendar": "none"})
        out["y_fused_noctpe"] = nchw(jax.jit(make_model(without, contract).apply)(params, inputs)["fused"])
    return out
