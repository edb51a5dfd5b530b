"""Numerical parity with the reference PyTorch code.    python -m tests.parity FILE.npz...

Each file is one case: arrays run through the official module in float64 (`w:` weights, `x` inputs, `y` outputs, `g` cotangents, `dx`
and `d:` gradients) and `meta_json` with the constructor's arguments. The module is built from the arguments, the weights go through the
importer users use (convert.torch_import.fill), gradients come back through the exporter, so every transpose is tested. Every output
and gradient the file holds must be produced. Prints a row each; exit code 1 on any failure.
"""
from __future__ import annotations

import json
import pathlib
import sys
from typing import Any, Callable, Mapping, NamedTuple, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import config_dict

from skysense_jax.convert import keymap
from skysense_jax.convert.torch_export import state_from_params
from skysense_jax.convert.torch_import import fill, params_from_torch
from skysense_jax.models.skysense import build_modules, fusion_sequence, make_model
from skysense_jax.nn.attention import layer_norm
from skysense_jax.nn.fusion import Fusion
from skysense_jax.nn.heads import DINOHead, UPHead
from skysense_jax.nn.position import resize_positions
from skysense_jax.nn.swin import SwinBlock, SwinTransformerV2
from skysense_jax.nn.vit import VisionTransformer
from tests.parity_training import adamw, dino_loss

Arrays = dict[str, Any]


class Case(NamedTuple):
    """One file: its arrays and its meta_json."""

    arrays: Mapping[str, np.ndarray]
    meta: dict[str, Any]

    @property
    def weights(self) -> dict[str, np.ndarray]:
        return {k[2:]: v for k, v in self.arrays.items() if k.startswith("w:")}

    def has(self, prefix: str) -> list[str]:
        return [k for k in self.arrays if k.startswith(prefix)]


class Row(NamedTuple):
    """One compared array. passed None: nothing to compare."""

    name: str
    rel_l2: float
    max_abs: float
    max_over_scale: float
    passed: bool


# ---------------------------------------------------------------------------------------------------------------- layouts, arguments
def nhwc(x: np.ndarray) -> jax.Array:
    return jnp.asarray(np.moveaxis(x, -3, -1))


def nchw(x: Any) -> np.ndarray:
    return np.moveaxis(np.asarray(x), -1, -3)


def take(args: Mapping[str, Any], fixed: Mapping[str, Any], **defaults: Any) -> dict[str, Any]:
    """Constructor arguments with the reference's defaults. `fixed`: arguments only one value of which is built here; rates of
    dropout and stochastic depth do not matter in eval mode. Raises ValueError for anything else."""
    passive = ("drop_rate", "attn_drop_rate", "drop_path_rate", "with_cp", "norm_eval", "init_cfg", "pretrained", "act_cfg")
    for key, value in args.items():
        if key in fixed and value != fixed[key]:
            raise ValueError(f"{key}={value!r} is not part of SkySense; only {fixed[key]!r} is built")
        if key not in fixed and key not in defaults and key not in passive:
            raise ValueError(f"unknown constructor argument {key}={value!r}")
    return {key: args.get(key, value) for key, value in defaults.items()}


def eps_of(norm_cfg: Mapping[str, Any] | None) -> float:
    return float((norm_cfg or {}).get("eps", 1e-5))


def load(module: Any, entries: Sequence[keymap.Entry], weights: Mapping[str, np.ndarray], shape: Sequence[int]) -> Any:
    """Parameters of a module through the importer; `shape` is that of an input it accepts."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros(shape)))["params"]
    return fill(weights, entries, shapes).params


def gradients(loss: Callable[[Any, Any], Any], params: Any, inputs: Any, entries: Sequence[keymap.Entry]) -> tuple[Arrays, Any]:
    """({"d:<torch key>": gradient}, gradient of the inputs) of a scalar loss(params, inputs)."""
    d_params, d_inputs = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, inputs)
    return {f"d:{k}": v for k, v in state_from_params(d_params, entries).items()}, d_inputs


def variants(case: Case) -> list[str]:
    """Suffixes of the inputs: "" for `x`, "pad" for `x_pad`."""
    return [k[1:].lstrip("_") for k in case.arrays if k == "x" or k.startswith("x_")]


def join(*parts: Any) -> str:
    return "_".join(str(p) for p in parts if p != "")


# ------------------------------------------------------------------------------------------------------------------------------ kinds
def swinv2_block(case: Case) -> Arrays:
    a = take(case.meta["args"], {}, embed_dims=0, num_heads=0, window_size=8, shift=False, extra_norm=False, ffn_ratio=4,
             pad_small_map=False, pretrained_window_size=0)
    block = SwinBlock(a["num_heads"], a["window_size"], a["shift"], a["ffn_ratio"], np.max(a["pretrained_window_size"]).item(),
                      a["pad_small_map"])
    norm = layer_norm(1e-5, "norm3")
    b, _, c = case.arrays["x"].shape
    image = (b, *case.meta["hw"], c)
    shapes = {"block": jax.eval_shape(lambda: block.init(jax.random.key(0), jnp.zeros(image)))["params"]}
    entries = keymap.swin_block_entries("", "block/")
    if a["extra_norm"]:
        shapes["norm3"] = {key: jax.ShapeDtypeStruct((c,), jnp.float32) for key in ("scale", "bias")}
        entries += [keymap.Entry("norm3.weight", "norm3/scale"), keymap.Entry("norm3.bias", "norm3/bias")]
    params = fill(case.weights, entries, shapes).params

    def run(p: Any, x: jax.Array) -> jax.Array:
        y = block.apply({"params": p["block"]}, x.reshape(image))
        y = norm.apply({"params": p["norm3"]}, y) if a["extra_norm"] else y
        return y.reshape(x.shape)

    out = {"y": jax.jit(run)(params, jnp.asarray(case.arrays["x"]))}
    if "g_y" in case.arrays:
        d, out["dx"] = gradients(lambda p, x: jnp.sum(run(p, x) * case.arrays["g_y"]), params, case.arrays["x"], entries)
        out |= d
    return out


ARCHITECTURES = {  # mmcls 0.25 SwinTransformerV2.arch_zoo: width, depths, heads, extra norm every
    "tiny": (96, [2, 2, 6, 2], [3, 6, 12, 24], 0), "small": (96, [2, 2, 18, 2], [3, 6, 12, 24], 0),
    "base": (128, [2, 2, 18, 2], [4, 8, 16, 32], 0), "large": (192, [2, 2, 18, 2], [6, 12, 24, 48], 0),
    "huge": (352, [2, 2, 18, 2], [8, 16, 32, 64], 6), "giant": (512, [2, 2, 42, 4], [16, 32, 64, 128], 6),
}


def swin_arguments(args: Mapping[str, Any]) -> dict[str, Any]:
    """The reference constructor's arguments as one flat dict with per-stage windows."""
    a = take(args, {"use_abs_pos_embed": False, "interpolate_mode": "bicubic", "patch_norm": True, "stage_cfgs": {}, "patch_cfg": {}},
             arch="tiny", in_channels=3, patch_size=4, window_size=8, out_indices=(3,), pad_small_map=False, img_size=None,
             pretrained_window_sizes=None, norm_cfg=None)
    arch = a["arch"]
    if isinstance(arch, str):
        width, depths, heads, every = ARCHITECTURES[arch]
        arch = {"embed_dims": width, "depths": depths, "num_heads": heads, "extra_norm_every_n_blocks": every}
    stages = len(arch["depths"])
    window = a["window_size"]
    return {
        "width": arch["embed_dims"], "patch": a["patch_size"], "depths": tuple(arch["depths"]), "heads": tuple(arch["num_heads"]),
        "windows": (window,) * stages if isinstance(window, int) else tuple(window),
        "pretrained_windows": tuple(a["pretrained_window_sizes"] or (0,) * stages),
        "extra_norm_every": arch.get("extra_norm_every_n_blocks", 0), "pad_small_map": a["pad_small_map"],
        "outputs": tuple(sorted(i % stages for i in a["out_indices"])), "eps": 1e-5, "channels": a["in_channels"],
    }


def swinv2(case: Case) -> Arrays:
    a = swin_arguments(case.meta["args"])
    channels = a.pop("channels")
    entries = keymap.swin_entries(a["depths"], a["extra_norm_every"], a["outputs"])
    out: Arrays = {}
    for variant in variants(case):
        pad = case.meta.get("inputs", {}).get(variant, {}).get("pad_small_map", a["pad_small_map"])
        module = SwinTransformerV2(**a | {"pad_small_map": pad})
        x = nhwc(case.arrays[join("x", variant)])
        params = load(module, entries, case.weights, (1, *x.shape[1:3], channels))
        maps = jax.jit(lambda p, x: module.apply({"params": p}, x))(params, x)
        out |= {join("y", variant, i): nchw(m) for i, m in enumerate(maps)}
        weights = [case.arrays.get(join("g", variant, i)) for i in range(len(maps))]
        if any(g is not None for g in weights):
            def loss(p: Any, x: jax.Array) -> jax.Array:
                pairs = zip(module.apply({"params": p}, x), weights, strict=True)
                return sum(jnp.sum(m * nhwc(g)) for m, g in pairs if g is not None)

            out[join("y64", "loss", variant)] = jax.jit(loss)(params, x)
            d, dx = gradients(loss, params, x, entries)
            out[join("dx", variant)] = nchw(dx)
            out |= {k: v + out[k] if k in out else v for k, v in d.items()}
    return out


def vit_arguments(args: Mapping[str, Any]) -> dict[str, Any]:
    a = take(args, {"patch_norm": False, "final_norm": False, "qkv_bias": True, "interpolate_mode": "bicubic", "num_fcs": 2,
                    "patch_pad": "corner", "patch_bias": True, "output_cls_token": False},
             img_size=224, patch_size=16, in_channels=3, embed_dims=768, num_layers=12, num_heads=12, mlp_ratio=4, out_indices=-1,
             norm_cfg=None, with_cls_token=True)
    image = a["img_size"] if isinstance(a["img_size"], (list, tuple)) else (a["img_size"],) * 2
    outputs = a["out_indices"]
    return {
        "width": a["embed_dims"], "patch": a["patch_size"], "depth": a["num_layers"], "heads": a["num_heads"],
        "table_grid": (image[0] // a["patch_size"], image[-1] // a["patch_size"]), "mlp_ratio": a["mlp_ratio"],
        "eps": eps_of(a["norm_cfg"]), "cls_token": a["with_cls_token"], "outputs": (outputs,) if isinstance(outputs, int) else tuple(outputs),
    }


def vit(case: Case) -> Arrays:
    a = vit_arguments(case.meta["args"])
    entries = keymap.vit_entries(a["depth"])
    out: Arrays = {}
    for variant in variants(case):
        x = nhwc(case.arrays[join("x", variant)])
        named = {word: flag for word, flag in (("cls", True), ("nocls", False)) if case.has(join("y", variant, word) + "_")}
        for word, flag in (named or {"": a["cls_token"]}).items():
            module = VisionTransformer(**a | {"cls_token": flag})
            params = load(module, entries, case.weights, x.shape)
            maps = jax.jit(lambda p, x: module.apply({"params": p}, x))(params, x)
            out |= {join("y", variant, word, i): nchw(m) for i, m in enumerate(maps)}
            # A cotangent without a variant's name belongs to the last output of the released setting (no class token).
            g = {i: case.arrays.get(join("g", variant, word, i)) for i in range(len(maps))}
            plain = case.arrays.get(join("g", variant) if variant else "g_y")
            if plain is not None and (word == "nocls" or "nocls" not in named):
                g[len(maps) - 1] = plain
            g = {i: nhwc(v) for i, v in g.items() if v is not None}
            if g:
                def loss(p: Any, x: jax.Array) -> jax.Array:
                    maps = module.apply({"params": p}, x)
                    return sum(jnp.sum(maps[i] * v) for i, v in g.items())

                d, dx = gradients(loss, params, x, entries)
                out |= {k: v + out[k] if k in out else v for k, v in d.items()} | {join("dx", variant): nchw(dx)}
    return out


def pos_resize(case: Case) -> Arrays:
    if case.meta.get("mode", "bicubic") != "bicubic" or case.meta.get("align_corners"):
        raise ValueError("only the reference's bicubic resize with half-pixel centres is built")
    wanted = {k: tuple(map(int, k[2:].split("x"))) for k in case.has("y_")}
    table = jnp.asarray(case.arrays["x_pos_embed"])
    return {k: resize_positions(table, tuple(case.meta["grid"]), size) for k, size in wanted.items()}


def uphead(case: Case) -> Arrays:
    a = take(case.meta["args"], {}, in_dim=0, out_dim=0, up_scale=4)
    module, entries, x = UPHead(a["out_dim"], a["up_scale"]), keymap.uphead_entries(), nhwc(case.arrays["x"])
    params = load(module, entries, case.weights, x.shape)
    out = {"y": nchw(jax.jit(lambda p, x: module.apply({"params": p}, x))(params, x))}
    if "g_y" in case.arrays:
        g = nhwc(case.arrays["g_y"])
        d, dx = gradients(lambda p, x: jnp.sum(module.apply({"params": p}, x) * g), params, x, entries)
        out |= d | {"dx": nchw(dx)}
    return out


def fusion_arguments(args: Mapping[str, Any]) -> dict[str, Any]:
    a = take(args, {"with_cls_token": True, "output_cls_token": True, "final_norm": False, "qkv_bias": True, "num_fcs": 2,
                    "require_two": False}, input_dims=2816, embed_dims=1024, num_layers=24, num_heads=16, mlp_ratio=4, norm_cfg=None)
    return {"width": a["embed_dims"], "depth": a["num_layers"], "heads": a["num_heads"], "mlp_ratio": a["mlp_ratio"],
            "eps": eps_of(a["norm_cfg"])}


def fusion(case: Case) -> Arrays:
    module, x = Fusion(**fusion_arguments(case.meta["args"])), jnp.asarray(case.arrays["x"])
    entries = keymap.fusion_entries(module.depth)
    params = load(module, entries, case.weights, x.shape)
    tokens, every = jax.jit(lambda p, x: module.apply({"params": p}, x, emit=True))(params, x)
    slices = {"y": np.s_[:, 0], "y_two": np.s_[:, :2], "y_tokens": np.s_[:, 1:]}
    out = {k: tokens[s] for k, s in slices.items()} | {f"y_block{i}": every[i] for i in range(module.depth)}
    weighed = {k: case.arrays[f"g_{k}"] for k in slices if f"g_{k}" in case.arrays}
    if weighed:
        def loss(p: Any, x: jax.Array) -> jax.Array:
            tokens, _ = module.apply({"params": p}, x)
            return sum(jnp.sum(tokens[slices[k]] * g) for k, g in weighed.items())

        d, out["dx"] = gradients(loss, params, x, entries)
        out |= d
    return out


def assembly(case: Case) -> Arrays:
    """The official sequence gives the first 256 of its 512 cells the dates `x_ct` and the others `x_ct2`."""
    (b, _), (h, w) = case.arrays["x_ct"].shape, case.meta["hw"]
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


def model_config(case: Case) -> tuple[config_dict.ConfigDict, dict[str, Any]]:
    """config.model and an input contract that leaves values as they are, from a factorised case."""
    reference = case.meta["cfg"]
    hr, f = swin_arguments(reference["hr"]), fusion_arguments(reference["fusion"])
    stages = len(hr["depths"])
    ratio = hr["patch"] * 2 ** (stages - 1)
    fields = {
        "dtype": "float32", "remat": False, "width": hr["width"] * 2 ** (stages - 1), "ratio": ratio,
        "calendar": "s2" if "ctpe" in case.weights else "none",
        "hr": {"patch": hr["patch"], "embed_dims": hr["width"], "depths": hr["depths"], "num_heads": hr["heads"],
               "window": hr["windows"], "mlp_ratio": 4, "extra_norm_every": hr["extra_norm_every"], "drop_path": 0.0,
               "pretrained_windows": hr["pretrained_windows"], "pad_small_map": hr["pad_small_map"],
               "drop_path_before_norm": True, "eps": hr["eps"]},
        "fusion": {"embed_dims": f["width"], "depth": f["depth"], "num_heads": f["heads"], "mlp_ratio": f["mlp_ratio"],
                   "drop_path": 0.0, "eps": f["eps"]},
    }
    contract: dict[str, Any] = {"ratio": ratio, "sensors": {}}
    for sensor in ("hr", "s2", "s1"):
        if f"x_{sensor}" not in case.arrays:
            continue
        channels = case.arrays[f"x_{sensor}"].shape[1]
        contract["sensors"][sensor] = {
            "bands": [f"band{i}" for i in range(channels)], "grid": "hr" if sensor == "hr" else "s2",
            "mean": [0.0] * channels, "std": [1.0] * channels}
        if sensor != "hr":
            a, head = vit_arguments(reference[sensor]), reference[f"head_{sensor}"]
            if head["up_scale"] != a["patch"] or head["out_dim"] != fields["width"]:
                raise ValueError(f"head_{sensor} does not lead to the common grid: {head}")
            fields[sensor] = {
                "patch": a["patch"], "embed_dims": a["width"], "depth": a["depth"], "num_heads": a["heads"],
                "mlp_ratio": a["mlp_ratio"], "img_size": a["table_grid"][0] * a["patch"], "drop_path": 0.0,
                "cls_token": a["cls_token"], "eps": a["eps"]}
    return config_dict.ConfigDict(fields), contract


def factorised(case: Case) -> Arrays:
    cfg, contract = model_config(case)
    model, entries = make_model(cfg, contract), keymap.model_entries(cfg, contract)
    params = params_from_torch(case.weights, cfg, contract)
    images = {}
    for sensor in contract["sensors"]:  # (B,C,H,W) or (B,C,T,H,W) -> [B,T,H,W,C]
        x = case.arrays[f"x_{sensor}"]
        images[sensor] = jnp.asarray(np.moveaxis(x if x.ndim == 5 else x[:, :, None], 1, -1))

    def place(images: Mapping[str, jax.Array]) -> dict[str, Any]:
        inputs = {}
        for sensor, x in images.items():
            dates = jnp.asarray(case.arrays["x_ct"], jnp.int32) if sensor == "s2" else jnp.full(x.shape[:2], -1)
            inputs[sensor] = {"image": x, "valid": jnp.ones(x.shape[:4]), "bands": jnp.ones((*x.shape[:2], x.shape[-1])), "dates": dates}
        return inputs

    inputs = place(images)
    result = jax.jit(model.apply)(params, inputs)
    flat = lambda x: nchw(x.reshape(-1, *x.shape[2:]))
    out = {f"y_hr_{k}": flat(result["hr_stages"][i]) for k, i in enumerate(swin_arguments(case.meta["cfg"]["hr"])["outputs"])}
    out |= {f"y_{s}_vit": flat(x) for s, x in result["vit"].items()}
    out |= {f"y_{s}_up": flat(result["maps"][s]) for s in result["vit"]}
    dates = {s: x["dates"] for s, x in inputs.items()}
    sequence, _ = fusion_sequence(result["maps"], result["mask"], dates, cfg.calendar, params.get("ctpe"))
    out["y_seq"] = sequence.reshape(-1, *sequence.shape[3:])
    _, every = build_modules(cfg, contract)["fusion"].apply({"params": params["fusion"]}, out["y_seq"], emit=True)
    out |= {f"y_fusion_block{i}": every[i] for i in range(cfg.fusion.depth)}
    out["y_fused"] = nchw(result["fused"])
    without = config_dict.ConfigDict({**cfg.to_dict(), "calendar": "none"})
    out["y_fused_noctpe"] = nchw(jax.jit(make_model(without, contract).apply)(params, inputs)["fused"])
    if "g_fused" in case.arrays:
        g = nhwc(case.arrays["g_fused"])
        d, dx = gradients(lambda p, x: jnp.sum(model.apply(p, place(x))["fused"] * g), params, images, entries)
        out |= d
        for sensor, x in dx.items():
            out[f"dx_{sensor}"] = np.moveaxis(np.asarray(x), -1, 1).reshape(case.arrays[f"x_{sensor}"].shape)
    return out


def dino_head(case: Case) -> Arrays:
    a = take(case.meta["args"], {"use_bn": False}, in_dim=0, out_dim=0, hidden_dim=2048, bottleneck_dim=256, nlayers=3,
             norm_last_layer=True)
    x, out = jnp.asarray(case.arrays["x"]), {}
    for key, gain in (("y", True), ("y_g1", False)):
        if key not in case.arrays:
            continue
        module = DINOHead(a["hidden_dim"], a["bottleneck_dim"], a["out_dim"], a["nlayers"], gain)
        entries = keymap.dino_head_entries(a["nlayers"], gain)
        weights = {k: v for k, v in case.weights.items() if gain or k != "last_layer.weight_g"}
        params = load(module, entries, weights, x.shape)
        out[key] = jax.jit(lambda p, x: module.apply({"params": p}, x))(params, x)
        if f"g_{key}" in case.arrays:
            loss = lambda p, x: jnp.sum(module.apply({"params": p}, x) * case.arrays[f"g_{key}"])
            d, out["dx"] = gradients(loss, params, x, entries)
            out |= d
    return out


KINDS: dict[str, Callable[[Case], Arrays]] = {
    "swinv2": swinv2, "swinv2_block": swinv2_block, "vit": vit, "pos_resize": pos_resize, "uphead": uphead, "fusion": fusion,
    "assembly": assembly, "factorised": factorised, "dino_head": dino_head, "dino_loss": dino_loss, "adamw": adamw,
}


# ------------------------------------------------------------------------------------------------------------------------ comparison
def measure(name: str, ours: Any, reference: np.ndarray, tol: Mapping[str, float], largest_gradient: float) -> Row:
    """Distances of one array and the verdict by the case's tolerances.

    A gradient that is mathematically zero (below 1e-12 of the largest in the file: rounding of the float64 reference) is measured
    against the largest one.
    """
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    if ours.shape != reference.shape:
        raise ValueError(f"{name}: our shape {ours.shape}, the reference's {reference.shape}")
    difference = ours - reference
    norm, scale = float(np.linalg.norm(reference)), float(np.max(np.abs(reference), initial=0.0))
    gradient = name.startswith(("d:", "dx"))
    if gradient and norm <= 1e-12 * largest_gradient:
        norm = scale = largest_gradient
    max_abs = float(np.max(np.abs(difference), initial=0.0))
    rel_l2 = float(np.linalg.norm(difference)) / norm if norm else max_abs
    over = max_abs / scale if scale else max_abs
    limits: list[tuple[float, float | None]]
    if gradient:
        limits = [(rel_l2, tol.get("grad_rel_l2"))]
    elif name.startswith("y_sk_"):
        limits = [(max_abs, tol.get("sinkhorn_max_abs"))]
    elif "loss_rel" in tol:
        limits = [(over, tol["loss_rel"])]
    else:
        limits = [(rel_l2, tol.get("out_rel_l2")), (over, tol.get("out_max_over_scale")), (max_abs, tol.get("out_max_abs")),
                  (over, tol.get("float64_rel"))]
    limits = [(value, limit) for value, limit in limits if limit is not None]
    passed = bool(limits) and all(np.isfinite(value) and value <= limit for value, limit in limits)
    return Row(name, rel_l2, max_abs, over, passed)


def run_case(path: str | pathlib.Path) -> list[Row]:
    """All rows of one file. Raises ValueError for a kind or an argument that is not built, or an array nothing was computed for."""
    with np.load(path) as file:
        case = Case({k: file[k] for k in file.files if k != "meta_json"}, json.loads(str(file["meta_json"])))
    kind = case.meta["kind"]
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} not supported yet; supported: {', '.join(KINDS)}")
    with jax.default_matmul_precision("highest"):
        ours = KINDS[kind](case)
    names = [k for k in case.arrays if k.startswith(("y", "d:", "dx"))]
    absent = [k for k in names if k not in ours]
    if absent or not names:
        raise ValueError(f"nothing computed for {absent or 'this file: it holds no outputs'}")
    largest = max((float(np.linalg.norm(case.arrays[k])) for k in names if k.startswith("d")), default=0.0)
    return [measure(k, ours[k], case.arrays[k], case.meta["tol"], largest) for k in names]


def main(paths: Sequence[str]) -> int:
    """Print the table of every file; 0 if all pass."""
    if not paths:
        print(__doc__)
        return 2
    failed = []
    for path in paths:
        print(f"{pathlib.Path(path).name}")
        try:
            rows = run_case(path)
        except ValueError as error:
            print(f"  FAIL {error}")
            failed.append(path)
            continue
        for row in rows:
            verdict = "pass" if row.passed else "FAIL"
            print(f"  {verdict} {row.name:60s} rel L2 {row.rel_l2:.2e}  max/scale {row.max_over_scale:.2e}  max {row.max_abs:.2e}")
        if not all(row.passed for row in rows):
            failed.append(path)
    print(f"{len(paths) - len(failed)} of {len(paths)} files pass" + "".join(f"\n  failed: {path}" for path in failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
