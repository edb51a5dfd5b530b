"""SkySense in plain PyTorch: everything needed to load this folder's weights and run them, in one file.

    from modeling_skysense import load
    model = load("FOLDER")                      # strict: every tensor must fit
    outputs = model({"s2": {"image": image, "dates": days}})

`python modeling_skysense.py [FOLDER]` runs the frozen batch of parity.safetensors and prints the differences. Needs
torch and safetensors; where `transformers` is installed, SkySenseModel is a PreTrainedModel with the same forward.

Inputs are raw physical units as `input_contract` in config.json declares them (bands and their order, unit,
statistics); the model normalises. Per sensor: image [B,T,C,H,W]; optional valid [B,T,H,W] (1 = measured), bands
[B,T,C] (1 = measured), dates [B,T] day of year 0..364 (-1 = unknown). HR images have `ratio` pixels along one
Sentinel-2 pixel. Any subset of the sensors will do. With geo-context: "place": {"lon", "lat"} [B] in degrees or nan.
"""

import importlib.util
import json
import math
import pathlib
import sys
from collections import OrderedDict

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

SENSOR_ORDER = ("hr", "s2", "s1")


def pad_corner(x, multiple):
    """Zero padding at the bottom and the right of [B,C,H,W] up to multiples."""
    return F.pad(x, (0, -x.shape[3] % multiple, 0, -x.shape[2] % multiple))


class PatchEmbed(nn.Module):
    def __init__(self, channels, width, patch, norm):
        super().__init__()
        self.patch, self.projection = patch, nn.Conv2d(channels, width, patch, patch)
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()

    def forward(self, x):  # [B,C,H,W] -> [B,h,w,width]
        return self.norm(self.projection(pad_corner(x, self.patch)).permute(0, 2, 3, 1))


class FFN(nn.Module):
    def __init__(self, width, ratio):
        super().__init__()
        hidden = int(width * ratio)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(width, hidden), nn.GELU()), nn.Linear(hidden, width)])

    def forward(self, x):
        return self.layers[1](self.layers[0](x))


class WindowAttention(nn.Module):
    """Cosine attention inside windows with a bias computed from log-spaced relative positions."""

    def __init__(self, width, heads, window, pretrained_window):
        super().__init__()
        self.heads, self.window, self.pretrained_window = heads, window, pretrained_window
        self.logit_scale = nn.Parameter(torch.log(10 * torch.ones(heads, 1, 1)))
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, heads, bias=False))
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))

    def position_bias(self):
        w, device = self.window, self.q_bias.device
        steps = torch.arange(-(w - 1), w, dtype=torch.float32, device=device)
        coords = torch.cartesian_prod(steps, steps) / ((self.pretrained_window or w) - 1) * 8
        coords = torch.sign(coords) * torch.log2(coords.abs() + 1) / 3  # log2(8) = 3
        y, x = torch.arange(w * w, device=device) // w, torch.arange(w * w, device=device) % w
        index = (y[:, None] - y + w - 1) * (2 * w - 1) + (x[:, None] - x + w - 1)
        return (16 * torch.sigmoid(self.cpb_mlp(coords.to(self.q_bias.dtype))))[index].permute(2, 0, 1)  # [heads,n,n]

    def forward(self, x, mask):  # [B, windows, w*w, C], [windows, w*w, w*w] or None
        qkv = F.linear(x, self.qkv.weight, torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias]))
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5)
        logits = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        logits = logits * self.logit_scale.clamp(max=math.log(100)).exp() + self.position_bias()
        logits = logits if mask is None else logits + mask[:, None]
        return self.proj((logits.softmax(-1) @ v).transpose(2, 3).flatten(3))


class ShiftedWindows(nn.Module):
    """Pad, roll, cut into windows, attend, undo it. Padding is not masked; other regions of a rolled map get -100."""

    def __init__(self, width, heads, window, pretrained_window, shifted, pad_small_map):
        super().__init__()
        self.window, self.shifted, self.pad_small_map = window, shifted, pad_small_map
        self.w_msa = WindowAttention(width, heads, window, pretrained_window)

    def forward(self, x):  # [B,H,W,C]
        _, height, width, channels = x.shape
        w, smaller = self.window, min(height, width)
        if smaller < w and not self.pad_small_map:
            raise ValueError(f"a {height}x{width} map is smaller than the window {w}; use a larger input")
        shift = w // 2 if self.shifted and (smaller != w or self.pad_small_map) else 0
        x = F.pad(x, (0, 0, 0, -width % w, 0, -height % w))
        grid = x.shape[1] // w, x.shape[2] // w
        mask = self.mask(x.shape[1], x.shape[2], shift, x) if shift else None
        x = torch.roll(x, (-shift, -shift), (1, 2))
        x = x.unflatten(2, (-1, w)).unflatten(1, (-1, w)).transpose(2, 3).reshape(len(x), -1, w * w, channels)
        x = self.w_msa(x, mask).unflatten(2, (w, w)).unflatten(1, grid).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return torch.roll(x, (shift, shift), (1, 2))[:, :height, :width]

    def mask(self, height, width, shift, like):
        w, axes = self.window, (torch.arange(-n, 0, device=like.device) for n in (height, width))
        y, x = ((at >= -w).long() + (at >= -shift).long() for at in axes)
        ids = (3 * y[:, None] + x).unflatten(1, (-1, w)).unflatten(0, (-1, w)).transpose(1, 2).reshape(-1, w * w)
        return (ids[:, :, None] != ids[:, None, :]).to(like.dtype) * -100.0


class SwinBlock(nn.Module):
    def __init__(self, width, heads, window, pretrained_window, shifted, pad_small_map, ratio, extra_norm):
        super().__init__()
        self.attn = ShiftedWindows(width, heads, window, pretrained_window, shifted, pad_small_map)
        self.norm1, self.norm2, self.ffn = nn.LayerNorm(width), nn.LayerNorm(width), FFN(width, ratio)
        self.norm3 = nn.LayerNorm(width) if extra_norm else nn.Identity()

    def forward(self, x):
        x = x + self.norm1(self.attn(x))
        return self.norm3(x + self.norm2(self.ffn(x)))


class PatchMerging(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.reduction, self.norm = nn.Linear(4 * width, 2 * width, bias=False), nn.LayerNorm(2 * width)

    def forward(self, x):  # [B,H,W,C] -> [B,H/2,W/2,2C]; channel order c*4 + 2*dy + dx
        x = F.pixel_unshuffle(pad_corner(x.permute(0, 3, 1, 2), 2), 2).permute(0, 2, 3, 1)
        return self.norm(self.reduction(x))


class SwinTransformerV2(nn.Module):
    """[B,C,H,W] -> list of [B,C_i,H_i,W_i], strides patch * 2^i."""

    def __init__(self, channels, hr):
        super().__init__()
        count, every = len(hr["depths"]), hr["extra_norm_every"] or math.inf
        fields = (hr[key] for key in ("window", "pretrained_windows", "num_heads"))
        windows, pretrained, heads = ([v] * count if isinstance(v, int) else v for v in fields)
        self.patch_embed, stages = PatchEmbed(channels, hr["embed_dims"], hr["patch"], norm=True), []
        for s, depth in enumerate(hr["depths"]):
            width = hr["embed_dims"] * 2**s
            sizes, options = (width, heads[s], windows[s], pretrained[s]), (hr["pad_small_map"], hr["mlp_ratio"])
            blocks = [SwinBlock(*sizes, bool(b % 2), *options, (b + 1) % every == 0) for b in range(depth)]
            downsample = PatchMerging(width // 2) if s else nn.Identity()
            stages.append(nn.Sequential(OrderedDict(downsample=downsample, blocks=nn.Sequential(*blocks))))
            self.add_module(f"norm{s}", nn.LayerNorm(width))
        self.stages = nn.ModuleList(stages)  # behind the norms: optimiser states number the parameters in this order
        for norm in (m for m in self.modules() if isinstance(m, nn.LayerNorm)):
            norm.eps = hr["eps"]

    def forward(self, x):
        x, maps = self.patch_embed(x), []
        for s, stage in enumerate(self.stages):
            x = stage(x)
            maps.append(getattr(self, f"norm{s}")(x).permute(0, 3, 1, 2))
        return maps


class SelfAttention(nn.Module):  # parameters as in torch.nn.MultiheadAttention
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width).normal_(std=0.02))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x, seen):  # [N,n,C], seen [N,n] bool or None
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = None if seen is None else seen[:, None, None, :]
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        width, heads, ratio, eps = (cfg[key] for key in ("embed_dims", "num_heads", "mlp_ratio", "eps"))
        self.attn = nn.ModuleDict({"attn": SelfAttention(width, heads)})  # the official names have attn.attn
        self.ln1, self.ln2, self.ffn = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps), FFN(width, ratio)

    def forward(self, x, seen=None):
        x = x + self.attn["attn"](self.ln1(x), seen)
        return x + self.ffn(self.ln2(x))


class VisionTransformer(nn.Module):
    """[B,C,H,W] -> [B,width,h,w] of the last layer."""

    def __init__(self, channels, vit):
        super().__init__()
        self.grid, self.with_cls, width = vit["img_size"] // vit["patch"], vit["cls_token"], vit["embed_dims"]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid**2, width))
        self.patch_embed = PatchEmbed(channels, width, vit["patch"], norm=False)
        self.layers = nn.Sequential(*(Layer(vit) for _ in range(vit["depth"])))

    def forward(self, x):
        x, positions = self.patch_embed(x), self.pos_embed
        height, width = x.shape[1:3]
        if height * width != self.grid**2:  # resized where the token count differs, as the release does
            rows = positions[:, 1:].unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
            rows = F.interpolate(rows, size=(height, width), mode="bicubic", align_corners=False)
            positions = torch.cat([positions[:, :1], rows.flatten(2).transpose(1, 2)], 1)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(1, 2)], 1) + positions
        x = self.layers(x if self.with_cls else x[:, 1:])[:, int(self.with_cls) :]
        return x.transpose(1, 2).unflatten(2, (height, width))


class Fusion(nn.Module):
    """[N,n,D] sequences, seen [N,n] -> [N,E] at the extra token."""

    def __init__(self, channels, fusion):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, fusion["embed_dims"]))
        self.porj_linear = nn.Linear(channels, fusion["embed_dims"])
        self.layers = nn.ModuleList(Layer(fusion) for _ in range(fusion["depth"]))

    def forward(self, x, seen):
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.porj_linear(x)], 1)
        seen = F.pad(seen, (1, 0), value=True)
        for layer in self.layers:
            x = layer(x, seen)
        return x[:, 0]


class GeoContext(nn.Module):
    """[B,h,w,E] -> [B,h,w,D]: attention over the prototypes of the place's region; 0 where the bank has none."""

    def __init__(self, width, geo):
        super().__init__()
        self.query = nn.Identity() if geo["width"] == width else nn.Linear(width, geo["width"])
        rows, cell, r = (geo["regions"], geo["prototypes"]), geo["cell"], 6371007.1809
        self.side = math.isqrt(rows[0]) if geo["table"] == "hashed" else 2**31  # cells share regions modulo this
        x, y = ([k * cell / r for k in range(1 - n, n)] for n in map(math.ceil, (math.pi * r / cell, r / cell)))
        # Inner edges in degrees, as in the file; not its buffers, which .half() and .bfloat16() would round.
        self.edges = [math.degrees(v) for v in x], [math.degrees(math.asin(v)) for v in y]
        shapes = {"prototypes": (*rows, geo["width"]), "usage": rows, "visits": rows[0], "cells": rows[0]}
        for name, shape in (shapes | {"lon_edges": len(x), "lat_edges": len(y)}).items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.int32 if name in ("visits", "cells") else None))

    def forward(self, x, place):
        exact = {"dtype": torch.float32, "device": x.device}  # locations and edges alike
        lon, lat = (torch.as_tensor((place or {}).get(name, ()), **exact) for name in ("lon", "lat"))
        if not lon.shape == lat.shape == x.shape[:1]:
            raise ValueError(f"geo-context needs inputs['place']: lon and lat [{len(x)}] in degrees, nan = unknown")
        lon, lat = (torch.where(v.abs() < torch.finfo(torch.float32).tiny, 0, v)[:, None] for v in (lon, lat))
        there = (lon.abs() <= 360) & (lat.abs() <= 90)
        lon = torch.where(lon >= 180, lon - 360, torch.where(lon < -180, lon + 360, lon)) * (lat.abs() != 90)
        column, row = map(lambda v, e: (v >= torch.tensor(e, **exact)).sum(1) % self.side, (lon, lat), self.edges)
        hit = (self.cells == (row * (len(self.lon_edges) + 1) + column)[:, None]) & there & (self.visits > 0)
        own = F.normalize(self.prototypes[hit.int().argmax(1)], dim=-1)
        logits = F.normalize(self.query(x), dim=-1).flatten(1, 2) @ own.transpose(1, 2) * own.shape[-1] ** 0.5
        return (logits.softmax(-1) @ own * own.shape[-1] ** 0.5 * hit.any(1)[:, None, None]).unflatten(1, x.shape[1:3])


class SkySenseParts:
    """Construction and forward pass, shared by the plain module and the transformers one."""

    def build(self, architecture, contract):
        self.architecture, self.contract = architecture, contract
        width, modules = architecture["width"], architecture.get("modules")
        for name, rule in contract["sensors"].items():
            if name == "hr":
                self.backbone_hr = SwinTransformerV2(len(rule["bands"]), architecture["hr"])
                continue
            vit, scale = architecture[name], architecture[name]["patch"]
            self.add_module(f"backbone_{name}", VisionTransformer(len(rule["bands"]), vit))
            if not modules or f"head_{name}" in modules:
                up = nn.Sequential(nn.Conv2d(vit["embed_dims"], width * scale**2, 1), nn.PixelShuffle(scale))
                self.add_module(f"head_{name}", nn.Sequential(OrderedDict(decoder=up)))
        if modules and "fusion" not in modules:
            return
        self.fusion = Fusion(width, architecture["fusion"])
        if architecture["calendar"] != "none":
            self.ctpe = nn.Parameter(torch.zeros(1, 365, width))
        if (geo := architecture.get("geo_context")) and geo["bank"] != "none" and (not modules or "geo" in modules):
            self.glbank = GeoContext(architecture["fusion"]["embed_dims"], geo)

    def prepare(self, name, sensor):
        """Fill in absent masks, check the shapes, normalise. Returns image, valid, dates."""
        rule, image = self.contract["sensors"][name], sensor["image"]
        if image.ndim != 5 or image.shape[2] != len(rule["bands"]):
            expected = f"[B,T,{len(rule['bands'])},H,W] with bands {rule['bands']} in {rule['unit']}"
            raise ValueError(f"{name}: image must be {expected}, got {tuple(image.shape)}")
        b, t, c, height, width = image.shape
        image = image.to(next(self.parameters()))
        shapes = {"valid": (b, t, height, width), "bands": (b, t, c), "dates": (b, t)}
        for key in (key for key in shapes if key in sensor and sensor[key].shape != shapes[key]):
            raise ValueError(f"{name}: {key} must be {shapes[key]}, got {tuple(sensor[key].shape)}")
        valid, bands = (sensor.get(key, image.new_ones(shapes[key])).to(image) for key in ("valid", "bands"))
        dates = sensor.get("dates", torch.full((b, t), -1)).to(image.device)
        mean, std = (image.new_tensor(rule[key])[:, None, None] for key in ("mean", "std"))
        valid = valid * (bands > 0).any(2)[:, :, None, None]
        use = (valid > 0)[:, :, None] & (bands > 0)[..., None, None]
        return torch.where(use, (image - mean) / std, 0.0), valid, dates

    def forward(self, inputs):
        """inputs: see the top of the file. Returns maps {sensor: [B,T,D,h,w]}, mask {sensor: [B,T,h,w]}; with the
        fusion fused [B,E,h,w], fused_mask [B,h,w]; with HR hr_stages: [B,T,C_i,H_i,W_i] at strides patch * 2^i (4, 8,
        16, 32). Without its UP head the map of a sensor stays on the ViT's grid."""
        place, inputs = inputs.get("place"), {name: sensor for name, sensor in inputs.items() if name != "place"}
        if not inputs or set(inputs) - set(self.contract["sensors"]):
            raise ValueError(f"sensors {list(inputs)} given; the model takes any of {list(self.contract['sensors'])}")
        out, parts, masks = {"maps": {}, "mask": {}}, [], []
        for name in sorted(inputs, key=SENSOR_ORDER.index):
            image, valid, dates = self.prepare(name, inputs[name])
            b, t = image.shape[:2]
            if name == "hr":
                out["hr_stages"] = [m.unflatten(0, (b, t)) for m in self.backbone_hr(image.flatten(0, 1))]
                x = out["hr_stages"][-1]
            else:
                x = getattr(self, f"backbone_{name}")(image.flatten(0, 1))
                if hasattr(self, f"head_{name}"):
                    x = getattr(self, f"head_{name}")(x)[..., : image.shape[3], : image.shape[4]]
                x = x.unflatten(0, (b, t))
            out["maps"][name] = x
            cell = -(-image.shape[3] // x.shape[3])
            share = F.avg_pool2d(F.pad(valid, (0, -valid.shape[3] % cell, 0, -valid.shape[2] % cell)), cell)
            out["mask"][name] = (share >= 0.5).to(valid.dtype)
            if hasattr(self, "ctpe") and self.architecture["calendar"] in ("dated", name):
                x = x + (self.ctpe[0, dates.clamp(0, 364)] * (dates >= 0)[..., None])[..., None, None]
            parts.append(x.permute(0, 3, 4, 1, 2))
            masks.append(out["mask"][name].permute(0, 2, 3, 1) > 0)
        if not hasattr(self, "fusion"):
            return out
        sequence, seen = torch.cat(parts, 3), torch.cat(masks, 3)
        fused = self.fusion(sequence.flatten(0, 2), seen.flatten(0, 2)).unflatten(0, sequence.shape[:3])
        if hasattr(self, "glbank"):
            fused = torch.cat([fused, self.glbank(fused, place)], -1)
        out["fused"], out["fused_mask"] = fused.permute(0, 3, 1, 2), seen.any(-1).to(fused.dtype)
        return out


class SkySense(SkySenseParts, nn.Module):
    def __init__(self, config):  # the content of config.json
        super().__init__()
        self.build(config["architecture"], config["input_contract"])


if importlib.util.find_spec("transformers") is not None:
    from transformers import PretrainedConfig, PreTrainedModel

    class SkySenseConfig(PretrainedConfig):
        model_type = "skysense"

        def __init__(self, architecture=None, input_contract=None, **kwargs):
            self.architecture, self.input_contract = architecture, input_contract
            super().__init__(**kwargs)

    class SkySenseModel(SkySenseParts, PreTrainedModel):
        config_class, main_input_name = SkySenseConfig, "inputs"

        def __init__(self, config):
            super().__init__(config)
            self.build(config.architecture, config.input_contract)
            self.post_init()

        def _init_weights(self, module):
            """Weights come from the folder."""


def load(folder="."):
    """The model of an exported folder in eval mode. Strict: a missing, unexpected or misshapen tensor is an error."""
    folder = pathlib.Path(folder)
    model = SkySense(json.loads((folder / "config.json").read_text()))
    index = folder / "model.safetensors.index.json"
    files = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    state = {name: tensor for file in files for name, tensor in load_file(folder / file).items()}
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


@torch.no_grad()
def check(folder="."):
    """Run the frozen batch; returns {output: relative L2 against the stored one}."""
    stored, inputs = load_file(pathlib.Path(folder) / "parity.safetensors"), {}
    for kind, *path in (key.split(".") for key in stored):
        if kind == "input":
            inputs.setdefault(path[0], {})[path[1]] = stored[".".join((kind, *path))]
    differences, outputs = {}, load(folder)(inputs)
    for key in (k for k in stored if k.startswith("output.")):
        got, value = outputs, stored[key]
        for step in key.split(".")[1:]:
            got = got[int(step)] if isinstance(got, list) else got[step]
        differences[key] = float((got - value).double().norm() / value.double().norm().clamp(min=1e-30))
    return differences


if __name__ == "__main__":
    where = sys.argv[1] if len(sys.argv) > 1 else str(pathlib.Path(__file__).parent)
    limit = json.loads((pathlib.Path(where) / "config.json").read_text())["parity"]["tolerance_rel_l2"]
    result = check(where)
    for name, difference in sorted(result.items()):
        print(f"{name:32s} relative L2 {difference:.2e}  {'ok' if difference <= limit else 'DIFFERS'}")
    sys.exit(0 if all(difference <= limit for difference in result.values()) else 1)
