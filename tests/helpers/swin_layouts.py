"""State dicts with random weights in the exact names, shapes and layouts of Microsoft's Swin family, spelled out here
and nowhere derived from the package: SimMIM and GFM, supervised Swin, Swin-MoE.
"""

from __future__ import annotations

import numpy as np


def swin(depths, width, heads, window, grid, channels=3, patch=2, ratio=2, experts=(), count=0, seed=0, bias2=True):
    """A SwinTransformer without head. grid: tokens along a side. experts: (stage, block) with `count` of them."""
    rng, state = np.random.default_rng(seed), {}

    def put(name, *shape):
        state[name] = (0.3 * rng.standard_normal(shape)).astype(np.float32)

    put("patch_embed.proj.weight", width, channels, patch, patch)
    put("patch_embed.proj.bias", width)
    put("patch_embed.norm.weight", width)
    put("patch_embed.norm.bias", width)
    for s, depth in enumerate(depths):
        d, w, side = width * 2**s, min(window, grid // 2**s), grid // 2**s
        for b in range(depth):
            block = f"layers.{s}.blocks.{b}."
            if b % 2 and side > w:
                state[f"{block}attn_mask"] = np.zeros(((side // w) ** 2, w * w, w * w), np.float32)
            put(f"{block}norm1.weight", d)
            put(f"{block}norm1.bias", d)
            put(f"{block}attn.relative_position_bias_table", (2 * w - 1) ** 2, heads[s])
            state[f"{block}attn.relative_position_index"] = np.zeros((w * w, w * w), np.int64)
            put(f"{block}attn.qkv.weight", 3 * d, d)
            put(f"{block}attn.qkv.bias", 3 * d)
            put(f"{block}attn.proj.weight", d, d)
            put(f"{block}attn.proj.bias", d)
            put(f"{block}norm2.weight", d)
            put(f"{block}norm2.bias", d)
            if (s, b) in experts:
                layer = f"{block}mlp._moe_layer."
                state[f"{layer}_num_global_experts"] = np.array(count)
                put(f"{layer}experts.batched_fc1_w", count, ratio * d, d)
                put(f"{layer}experts.batched_fc2_w", count, ratio * d, d)
                put(f"{layer}experts.batched_fc1_bias", count, ratio * d)
                put(f"{layer}experts.batched_fc2_bias", count, d)
                put(f"{layer}gates.0.wg.weight", count, d)
            else:
                put(f"{block}mlp.fc1.weight", ratio * d, d)
                put(f"{block}mlp.fc1.bias", ratio * d)
                put(f"{block}mlp.fc2.weight", d, ratio * d)
                if bias2:
                    put(f"{block}mlp.fc2.bias", d)
        if s < len(depths) - 1:
            put(f"layers.{s}.downsample.reduction.weight", 2 * d, 4 * d)
            put(f"layers.{s}.downsample.norm.weight", 4 * d)
            put(f"layers.{s}.downsample.norm.bias", 4 * d)
    put("norm.weight", d)
    put("norm.bias", d)
    return state


def simmim(*args, channels=3, patch=2, seed=0, **fields):
    """What SimMIM wraps around it: encoder., a mask token, a linear decoder behind pixel shuffle."""
    encoder = swin(*args, channels=channels, patch=patch, seed=seed, **fields)
    depths, width = args[:2]
    last, stride, rng = width * 2 ** (len(depths) - 1), patch * 2 ** (len(depths) - 1), np.random.default_rng(seed + 1)
    state = {f"encoder.{name}": value for name, value in encoder.items()}
    state["encoder.mask_token"] = rng.standard_normal((1, 1, width)).astype(np.float32)
    state["decoder.0.weight"] = rng.standard_normal((stride**2 * channels, last, 1, 1)).astype(np.float32)
    state["decoder.0.bias"] = rng.standard_normal(stride**2 * channels).astype(np.float32)
    return state


def with_networks(state, seed=3):
    """With Swin-MoE's networks in the place of the bias tables."""
    state, rng = dict(state), np.random.default_rng(seed)
    for name in [name for name in state if name.endswith("relative_position_bias_table")]:
        rows, heads = state.pop(name).shape
        side, attn = round(rows**0.5), name.removesuffix("relative_position_bias_table")
        for part, shape in (("0.weight", (512, 2)), ("0.bias", 512), ("2.weight", (heads, 512))):
            state[f"{attn}cpb_mlp.{part}"] = rng.standard_normal(shape).astype(np.float32)
        state[f"{attn}relative_coords_table"] = np.zeros((1, side, side, 2), np.float32)
    return state


def shards(state, ranks, slices=1):
    """The files of Swin-MoE's processes: {"rank0": ..., "master": ...}; every expert is cut into `slices`."""
    own = [name for name in state if "._moe_layer.experts." in name]
    files = {"master": {name: value for name, value in state.items() if name not in own}}
    for rank in range(ranks):
        files[f"rank{rank}"] = {}
        for name in own:
            local = len(state[name]) * slices // ranks
            whole = state[name][rank // slices * local :][:local]
            width = -(-whole.shape[1] // slices)
            piece = whole[:, rank % slices * width :][:, :width]
            files[f"rank{rank}"][name] = np.ascontiguousarray(piece)
    return files
