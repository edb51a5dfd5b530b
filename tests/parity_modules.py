"""Parity of single modules: each kind builds our module from the reference constructor's arguments and returns every
array it can (see tests.parity). Names of the result are the file's: y..., dx..., d:<torch key>."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from skysense_jax.convert import keymap
from skysense_jax.convert.torch_export import state_from_params
from skysense_jax.convert.torch_import import fill
from skysense_jax.nn.attention import layer_norm
from skysense_jax.nn.fusion import Fusion
from skysense_jax.nn.heads import DINOHead, UPHead
from skysense_jax.nn.position import resize_positions
from skysense_jax.nn.swin import SwinBlock, SwinTransformerV2
from skysense_jax.nn.vit import VisionTransformer

Arrays = dict[str, Any]


class Case(NamedTuple):
    """One file: its arrays, its meta_json, and the dtype to compute in."""

    arrays: Mapping[str, np.ndarray]
    meta: dict[str, Any]
    dtype: str = "float32"

    @property
    def weights(self) -> dict[str, np.ndarray]:
        return {k[2:]: v for k, v in self.arrays.items() if k.startswith("w:")}

    def has(self, prefix: str) -> list[str]:
        return [k for k in self.arrays if k.startswith(prefix)]


# ------------------------------------------------------------------------------------------------ layouts, arguments
def nhwc(x: np.ndarray) -> jax.Array:
    return jnp.asarray(np.moveaxis(x, -3, -1))


def nchw(x: Any) -> np.ndarray:
    return np.moveaxis(np.asarray(x), -1, -3)


def take(args: Mapping[str, Any], fixed: Mapping[str, Any], **defaults: Any) -> dict[str, Any]:
    """Constructor arguments with the reference's defaults. `fixed`: arguments only one value of which is built here;
    rates of dropout and stochastic depth do not matter in eval mode. Raises ValueError for anything else."""
    passive = (
        "drop_rate",
        "attn_drop_rate",
        "drop_path_rate",
        "with_cp",
        "norm_eval",
        "init_cfg",
        "pretrained",
        "act_cfg",
    )
    for key, value in args.items():
        if key in fixed and value != fixed[key]:
            raise ValueError(f"{key}={value!r} is not built here; only {fixed[key]!r} is")
        if key not in fixed and key not in defaults and key not in passive:
            raise ValueError(f"unknown constructor argument {key}={value!r}")
    return {key: args.get(key, value) for key, value in defaults.items()}


def eps_of(norm_cfg: Mapping[str, Any] | None) -> float:
    return float((norm_cfg or {}).get("eps", 1e-5))


def load(module: Any, entries: Sequence[keymap.Entry], weights: Mapping[str, np.ndarray], shape: Sequence[int]) -> Any:
    """Parameters of a module through the importer; `shape` is that of an input it accepts."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros(shape)))["params"]
    return fill(weights, entries, shapes).params


def differentiate(
    run: Callable[[Any, Any], Any],
    weigh: Callable[[Any], Any],
    params: Any,
    inputs: Any,
    entries: Sequence[keymap.Entry],
) -> tuple[Any, Any, Arrays, Any]:
    """One compilation for outputs = run(params, inputs) and the scalar weigh(outputs): (outputs, scalar, {"d:<torch
    key>": gradient}, gradient of the inputs)."""

    def loss(p: Any, x: Any) -> tuple[Any, Any]:
        outputs = run(p, x)
        return weigh(outputs), outputs

    both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (value, outputs), (d_params, d_inputs) = both(params, inputs)
    return outputs, value, {f"d:{k}": v for k, v in state_from_params(d_params, entries).items()}, d_inputs


def gradients(
    loss: Callable[[Any, Any], Any], params: Any, inputs: Any, entries: Sequence[keymap.Entry]
) -> tuple[Arrays, Any]:
    """({"d:<torch key>": gradient}, gradient of the inputs) of a scalar loss(params, inputs)."""
    _, _, d, d_inputs = differentiate(loss, lambda value: value, params, inputs, entries)
    return d, d_inputs


def variants(case: Case) -> list[str]:
    """Suffixes of the inputs: "" for `x`, "pad" for `x_pad`."""
    return [k[1:].lstrip("_") for k in case.arrays if k == "x" or k.startswith("x_")]


def join(*parts: Any) -> str:
    return "_".join(str(p) for p in parts if p != "")


# ------------------------------------------------------------------------------------------------------------- kinds
def swinv2_block(case: Case) -> Arrays:
    a = take(
        case.meta["args"],
        {},
        embed_dims=0,
        num_heads=0,
        window_size=8,
        shift=False,
        extra_norm=False,
        ffn_ratio=4,
        pad_small_map=False,
        pretrained_window_size=0,
    )
    pretrained = np.max(a["pretrained_window_size"]).item()
    block = SwinBlock(
        a["num_heads"], a["window_size"], a["shift"], a["ffn_ratio"], pretrained, a["pad_small_map"], dtype=case.dtype
    )
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
        g = case.arrays["g_y"]
        d, out["dx"] = gradients(lambda p, x: jnp.sum(run(p, x) * g), params, case.arrays["x"], entries)
        out |= d
    return out


ARCHITECTURES = {  # mmcls 0.25 SwinTransformerV2.arch_zoo: width, depths, heads, extra norm every
    "tiny": (96, [2, 2, 6, 2], [3, 6, 12, 24], 0),
    "small": (96, [2, 2, 18, 2], [3, 6, 12, 24], 0),
    "base": (128, [2, 2, 18, 2], [4, 8, 16, 32], 0),
    "large": (192, [2, 2, 18, 2], [6, 12, 24, 48], 0),
    "huge": (352, [2, 2, 18, 2], [8, 16, 32, 64], 6),
    "giant": (512, [2, 2, 42, 4], [16, 32, 64, 128], 6),
}


def swin_arguments(args: Mapping[str, Any]) -> dict[str, Any]:
    """The reference constructor's arguments as one flat dict with per-stage windows."""
    a = take(
        args,
        {
            "use_abs_pos_embed": False,
            "interpolate_mode": "bicubic",
            "patch_norm": True,
            "stage_cfgs": {},
            "patch_cfg": {},
        },
        arch="tiny",
        in_channels=3,
        patch_size=4,
        window_size=8,
        out_indices=(3,),
        pad_small_map=False,
        img_size=None,
        pretrained_window_sizes=None,
        norm_cfg=None,
    )
    arch = a["arch"]
    if isinstance(arch, str):
        width, depths, heads, every = ARCHITECTURES[arch]
        arch = {"embed_dims": width, "depths": depths, "num_heads": heads, "extra_norm_every_n_blocks": every}
    stages = len(arch["depths"])
    window = a["window_size"]
    return {
        "width": arch["embed_dims"],
        "patch": a["patch_size"],
        "depths": tuple(arch["depths"]),
        "heads": tuple(arch["num_heads"]),
        "windows": (window,) * stages if isinstance(window, int) else tuple(window),
        "pretrained_windows": tuple(a["pretrained_window_sizes"] or (0,) * stages),
        "extra_norm_every": arch.get("extra_norm_every_n_blocks", 0),
        "pad_small_map": a["pad_small_map"],
        "outputs": tuple(sorted(i % stages for i in a["out_indices"])),
        "eps": 1e-5,
        "channels": a["in_channels"],
    }


def swinv2(case: Case) -> Arrays:
    a = swin_arguments(case.meta["args"])
    channels = a.pop("channels")
    entries = keymap.swin_entries(a["depths"], a["extra_norm_every"], a["outputs"])
    out: Arrays = {}
    for variant in variants(case):
        pad = case.meta.get("inputs", {}).get(variant, {}).get("pad_small_map", a["pad_small_map"])
        module = SwinTransformerV2(**a | {"pad_small_map": pad}, dtype=case.dtype)
        x = nhwc(case.arrays[join("x", variant)])
        params = load(module, entries, case.weights, (1, *x.shape[1:3], channels))
        run = lambda p, x: module.apply({"params": p}, x)
        weights = {
            i: nhwc(case.arrays[key]) for i in range(len(a["outputs"])) if (key := join("g", variant, i)) in case.arrays
        }
        if weights:
            weigh = lambda maps: sum(jnp.sum(maps[i] * g) for i, g in weights.items())
            maps, out[join("y64", "loss", variant)], d, dx = differentiate(run, weigh, params, x, entries)
            out[join("dx", variant)] = nchw(dx)
            out |= {k: v + out[k] if k in out else v for k, v in d.items()}
        else:
            maps = jax.jit(run)(params, x)
        out |= {join("y", variant, i): nchw(m) for i, m in enumerate(maps)}
    return out


def vit_arguments(args: Mapping[str, Any]) -> dict[str, Any]:
    a = take(
        args,
        {
            "patch_norm": False,
            "final_norm": False,
            "qkv_bias": True,
            "interpolate_mode": "bicubic",
            "num_fcs": 2,
            "patch_pad": "corner",
            "patch_bias": True,
            "output_cls_token": False,
        },
        img_size=224,
        patch_size=16,
        in_channels=3,
        embed_dims=768,
        num_layers=12,
        num_heads=12,
        mlp_ratio=4,
        out_indices=-1,
        norm_cfg=None,
        with_cls_token=True,
    )
    image = a["img_size"] if isinstance(a["img_size"], (list, tuple)) else (a["img_size"],) * 2
    outputs = (a["out_indices"],) if isinstance(a["out_indices"], int) else tuple(a["out_indices"])
    return {
        "width": a["embed_dims"],
        "patch": a["patch_size"],
        "depth": a["num_layers"],
        "heads": a["num_heads"],
        "table_grid": (image[0] // a["patch_size"], image[-1] // a["patch_size"]),
        "mlp_ratio": a["mlp_ratio"],
        "eps": eps_of(a["norm_cfg"]),
        "cls_token": a["with_cls_token"],
        "outputs": outputs,
    }


def vit(case: Case) -> Arrays:
    a = vit_arguments(case.meta["args"])
    entries = keymap.vit_entries(a["depth"])
    out: Arrays = {}
    for variant in variants(case):
        x = nhwc(case.arrays[join("x", variant)])
        words = {"cls": True, "nocls": False}
        named = {word: flag for word, flag in words.items() if case.has(join("y", variant, word) + "_")}
        for word, flag in (named or {"": a["cls_token"]}).items():
            module = VisionTransformer(**a | {"cls_token": flag}, dtype=case.dtype)
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
    module, entries = UPHead(a["out_dim"], a["up_scale"], case.dtype), keymap.uphead_entries()
    x = nhwc(case.arrays["x"])
    params = load(module, entries, case.weights, x.shape)
    out = {"y": nchw(jax.jit(lambda p, x: module.apply({"params": p}, x))(params, x))}
    if "g_y" in case.arrays:
        g = nhwc(case.arrays["g_y"])
        d, dx = gradients(lambda p, x: jnp.sum(module.apply({"params": p}, x) * g), params, x, entries)
        out |= d | {"dx": nchw(dx)}
    return out


def fusion_arguments(args: Mapping[str, Any]) -> dict[str, Any]:
    a = take(
        args,
        {
            "with_cls_token": True,
            "output_cls_token": True,
            "final_norm": False,
            "qkv_bias": True,
            "num_fcs": 2,
            "require_two": False,
        },
        input_dims=2816,
        embed_dims=1024,
        num_layers=24,
        num_heads=16,
        mlp_ratio=4,
        norm_cfg=None,
    )
    return {
        "width": a["embed_dims"],
        "depth": a["num_layers"],
        "heads": a["num_heads"],
        "mlp_ratio": a["mlp_ratio"],
        "eps": eps_of(a["norm_cfg"]),
    }


def fusion(case: Case) -> Arrays:
    module, x = Fusion(**fusion_arguments(case.meta["args"]), dtype=case.dtype), jnp.asarray(case.arrays["x"])
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


def dino_head(case: Case) -> Arrays:
    a = take(
        case.meta["args"],
        {"use_bn": False},
        in_dim=0,
        out_dim=0,
        hidden_dim=2048,
        bottleneck_dim=256,
        nlayers=3,
        norm_last_layer=True,
    )
    x, out = jnp.asarray(case.arrays["x"]), {}
    for key, gain in (("y", True), ("y_g1", False)):
        if key not in case.arrays:
            continue
        module = DINOHead(a["hidden_dim"], a["bottleneck_dim"], a["out_dim"], a["nlayers"], gain, case.dtype)
        entries = keymap.dino_head_entries(a["nlayers"], gain)
        weights = {k: v for k, v in case.weights.items() if gain or k != "last_layer.weight_g"}
        params = load(module, entries, weights, x.shape)
        out[key] = jax.jit(lambda p, x: module.apply({"params": p}, x))(params, x)
        if f"g_{key}" in case.arrays:
            loss = lambda p, x: jnp.sum(module.apply({"params": p}, x) * case.arrays[f"g_{key}"])
            d, out["dx"] = gradients(loss, params, x, entries)
            out |= d
    return out
