"""The table of names: official PyTorch key <-> (parameter name, index in a stacked leaf, transform).

It is derived from the configuration. One table serves both directions (torch_import, torch_export) and gradients.

Names are those of the SkySense release: backbone_hr., backbone_s2., backbone_s1., head_s2., head_s1., fusion. (with its
`porj_linear`), ctpe. The release holds no prototype bank; `glbank.` is what its training code called one (SkySense++,
the trainer's freeze list), the names under it are this project's. For msGFM they are those of SimMIM and GFM
checkpoints, encoder. and decoder., with the experts as Swin-MoE (Tutel) has them; a file of several sensors has
patch_embeds.SENSOR. and decoders.SENSOR. in the place of patch_embed. and decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import config_dict

from skysense_jax.models import msgfm, skysense, skysense_modules
from skysense_jax.nn.swin import stage_plan
from skysense_jax.sensors import Contract


class Entry(NamedTuple):
    """One torch tensor and the leaf that it fills, or a part of.

    Attributes:
        torch: its key.
        name: "/"-name of the leaf.
        index: position on the leaf's leading (scanned) axis, or None.
        kind: key of :data:`TRANSFORMS`.
        default: value that fills the tensor where a released file lacks it; None = the tensor is required.
    """

    torch: str
    name: str
    index: int | None = None  # type: ignore[assignment]  # the method tuple.index is never called
    kind: str = "same"
    default: float | None = None


TRANSFORMS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]] = {
    "same": (lambda a: a, lambda a: a),
    "linear": (lambda a: a.T, lambda a: a.T),  # (out, in) <-> [in, out]
    "conv": (lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1)),  # OIHW <-> HWIO
    "conv1x1": (lambda a: a[:, :, 0, 0].T, lambda a: a.T[:, :, None, None]),  # (out, in, 1, 1) <-> [in, out]
    "column": (lambda a: a[:, 0], lambda a: a[:, None]),  # (n, 1) <-> [n]
    "experts": (lambda a: a.transpose(0, 2, 1), lambda a: a.transpose(0, 2, 1)),  # (E, out, in) <-> [E, in, out]
}
"""kind -> (torch tensor to leaf, leaf to torch tensor). All are reorderings: a round trip is bitwise."""

BUFFERS = ("relative_coords_table", "relative_position_index", "attn_mask")
"""Last parts of the names of recomputed quantities: ignored on import wherever they occur."""

PREFIXES = {
    "hr": "backbone_hr.",
    "s2": "backbone_s2.",
    "s1": "backbone_s1.",
    "head_s2": "head_s2.",
    "head_s1": "head_s1.",
    "fusion": "fusion.",
    "geo": "glbank.",
}
"""Top-level parameter of SkySense -> prefix of its official names in a whole-model file. `ctpe` has none."""


EXPERTS = "mlp._moe_layer."
"""Where a Swin-MoE block has its mixture of experts."""


def _affine(torch: str, name: str, index: int | None, kind: str = "linear") -> list[Entry]:
    return [Entry(f"{torch}.weight", f"{name}/kernel", index, kind), Entry(f"{torch}.bias", f"{name}/bias", index)]


def _norm(torch: str, name: str, index: int | None = None, optional: bool = False) -> list[Entry]:
    scale, bias = (1.0, 0.0) if optional else (None, None)
    return [
        Entry(f"{torch}.weight", f"{name}/scale", index, "same", scale),
        Entry(f"{torch}.bias", f"{name}/bias", index, "same", bias),
    ]


def swin_block_entries(torch: str, name: str, index: int | None = None) -> list[Entry]:
    """Lists a SwinBlock; the extra norm belongs to the stage.

    Args:
        torch: prefix of the torch keys, empty or with "." at its end.
        name: prefix of the leaves' names, empty or with "/" at its end.
        index: position on the leaves' leading axis, None where they have none.

    Returns:
        Its entries.
    """
    attn, name_attn = f"{torch}attn.w_msa.", f"{name}attn/"
    return [
        *(Entry(attn + key, name_attn + key, index) for key in ("logit_scale", "q_bias", "v_bias")),
        *_affine(f"{attn}cpb_mlp.0", f"{name_attn}cpb1", index),
        Entry(f"{attn}cpb_mlp.2.weight", f"{name_attn}cpb2/kernel", index, "linear"),
        Entry(f"{attn}qkv.weight", f"{name_attn}qkv/kernel", index, "linear"),
        *_affine(f"{attn}proj", f"{name_attn}proj", index),
        *_norm(f"{torch}norm1", f"{name}norm1", index),
        *_affine(f"{torch}ffn.layers.0.0", f"{name}fc1", index),
        *_affine(f"{torch}ffn.layers.1", f"{name}fc2", index),
        *_norm(f"{torch}norm2", f"{name}norm2", index),
    ]


def swin_entries(depths: Sequence[int], extra_norm_every: int, outputs: Iterable[int]) -> list[Entry]:
    """Lists a SwinTransformerV2.

    Output norms other than the last stage's are optional: released files may hold norm3 only.

    Args:
        depths: blocks of every stage.
        extra_norm_every: an extra norm stands after every this many blocks; 0 = none.
        outputs: stages whose output has a norm.

    Returns:
        Its entries.
    """
    entries = _affine("patch_embed.projection", "patch_embed", None, "conv") + _norm("patch_embed.norm", "patch_norm")
    for stage, depth in enumerate(depths):
        torch, name = f"stages.{stage}.", f"stage{stage}/"
        if stage:
            torch_down, down = f"{torch}downsample.", f"{name}downsample/"
            entries.append(Entry(f"{torch_down}reduction.weight", f"{down}reduction/kernel", None, "linear"))
            entries += _norm(f"{torch_down}norm", f"{down}norm")
        for kind, first, count in stage_plan(depth, extra_norm_every):
            if kind == "pairs":
                for i in range(count):
                    for half, block in enumerate(("plain", "shifted")):
                        entries += swin_block_entries(
                            f"{torch}blocks.{first + 2 * i + half}.", f"{name}pairs{first}/{block}/", i
                        )
            elif kind == "block":
                entries += swin_block_entries(f"{torch}blocks.{first}.", f"{name}block{first}/")
            else:
                entries += _norm(f"{torch}blocks.{first}.norm3", f"{name}extra_norm{first}")
    for stage in outputs:
        entries += _norm(f"norm{stage}", f"norm{stage}", None, optional=stage < len(depths) - 1)
    return entries


def layers_entries(depth: int) -> list[Entry]:
    """Lists the pre-norm layers of a ViT or of the fusion transformer, stacked in the parameter tree."""
    entries: list[Entry] = []
    for i in range(depth):
        torch, name = f"layers.{i}.", "blocks/layers/"
        entries += [
            *_norm(f"{torch}ln1", f"{name}ln1", i),
            Entry(f"{torch}attn.attn.in_proj_weight", f"{name}attn/qkv/kernel", i, "linear"),
            Entry(f"{torch}attn.attn.in_proj_bias", f"{name}attn/qkv/bias", i),
            *_affine(f"{torch}attn.attn.out_proj", f"{name}attn/proj", i),
            *_norm(f"{torch}ln2", f"{name}ln2", i),
            *_affine(f"{torch}ffn.layers.0.0", f"{name}fc1", i),
            *_affine(f"{torch}ffn.layers.1", f"{name}fc2", i),
        ]
    return entries


def vit_entries(depth: int) -> list[Entry]:
    """Lists a VisionTransformer (S2, S1)."""
    return [
        Entry("cls_token", "cls_token"),
        Entry("pos_embed", "pos_embed"),
        *_affine("patch_embed.projection", "patch_embed", None, "conv"),
        *layers_entries(depth),
    ]


def fusion_entries(depth: int) -> list[Entry]:
    """Lists the fusion transformer."""
    return [Entry("cls_token", "cls_token"), *_affine("porj_linear", "proj", None), *layers_entries(depth)]


def uphead_entries() -> list[Entry]:
    """Lists an UP head."""
    return _affine("decoder.0", "proj", None, "conv1x1")


def geo_entries(cfg: config_dict.ConfigDict) -> list[Entry]:
    """Lists geo-context: the query projection where there is one, the bank with its grid and its table of regions."""
    query = _affine("query", "query", None) if cfg.geo_context.width != cfg.fusion.embed_dims else []
    names = ("prototypes", "usage", "visits", "cells", "lon_edges", "lat_edges")
    return query + [Entry(name, f"bank/{name}") for name in names]


def placed(entries: Iterable[Entry], torch: str, name: str) -> list[Entry]:
    """Puts the entries of a module under a prefix on either side.

    Args:
        entries: of a module, without prefixes.
        torch: prefix of the torch keys ("fusion.").
        name: prefix of the leaves' names ("fusion/").

    Returns:
        The same entries with both prefixes.
    """
    return [e._replace(torch=torch + e.torch, name=name + e.name) for e in entries]


def module_entries(module: str, cfg: config_dict.ConfigDict) -> list[Entry]:
    """Lists one top-level parameter of a SkySense model, names without its prefix on either side.

    Args:
        module: its name, a key of :data:`PREFIXES`.
        cfg: config.model.

    Returns:
        Its entries.
    """
    if module == skysense_modules.SWIN:
        return swin_entries(cfg.hr.depths, cfg.hr.extra_norm_every, range(len(cfg.hr.depths)))
    if module == "fusion":
        return fusion_entries(cfg.fusion.depth)
    if module == "geo":
        return geo_entries(cfg)
    return uphead_entries() if module.startswith("head_") else vit_entries(cfg[module].depth)


def skysense_entries(cfg: config_dict.ConfigDict, contract: Contract) -> list[Entry]:
    """Lists a SkySense model, in the names of a whole-model file.

    Args:
        cfg: config.model.
        contract: the input contract.

    Returns:
        The entries of all its tensors.
    """
    modules = skysense.module_names(cfg, contract)
    entries = [e for key in modules for e in placed(module_entries(key, cfg), PREFIXES[key], f"{key}/")]
    return entries + ([Entry("ctpe", "ctpe")] if skysense.has_calendar(cfg, modules) else [])


def experts_entries(torch: str, name: str, index: int | None) -> list[Entry]:
    """Lists a nn.moe.MixtureOfExperts as Tutel stores it in a Swin-MoE block: there the second layer is [hidden, out].

    Args:
        torch: prefix of the torch keys, with "." at its end.
        name: prefix of the leaves' names, with "/" at its end.
        index: position on the leaves' leading axis, None where they have none.

    Returns:
        Its entries.
    """
    return [
        Entry(f"{torch}gates.0.wg.weight", f"{name}gate", index, "linear"),
        Entry(f"{torch}experts.batched_fc1_w", f"{name}fc1", index, "experts"),
        Entry(f"{torch}experts.batched_fc1_bias", f"{name}fc1_bias", index),
        Entry(f"{torch}experts.batched_fc2_w", f"{name}fc2", index),
        Entry(f"{torch}experts.batched_fc2_bias", f"{name}fc2_bias", index),
    ]


def swin_v1_block_entries(torch: str, name: str, index: int | None = None, experts: bool = False) -> list[Entry]:
    """Lists a nn.swin_v1.Block in Microsoft's names.

    Args:
        torch: prefix of the torch keys, with "." at its end.
        name: prefix of the leaves' names, with "/" at its end.
        index: position on the leaves' leading axis, None where they have none.
        experts: whether the block has a mixture of experts in the place of its perceptron.

    Returns:
        Its entries.
    """
    attn, name_attn = f"{torch}attn.", f"{name}attn/"
    mlp = [*_affine(f"{torch}mlp.fc1", f"{name}fc1", index), *_affine(f"{torch}mlp.fc2", f"{name}fc2", index)]
    return [
        *_norm(f"{torch}norm1", f"{name}norm1", index),
        Entry(f"{attn}relative_position_bias_table", f"{name_attn}table", index),
        *_affine(f"{attn}qkv", f"{name_attn}qkv", index),
        *_affine(f"{attn}proj", f"{name_attn}proj", index),
        *_norm(f"{torch}norm2", f"{name}norm2", index),
        *(experts_entries(f"{torch}{EXPERTS}", f"{name}moe/", index) if experts else mlp),
    ]


def swin_v1_entries(depths: Sequence[int], moe_stages: Sequence[int]) -> list[Entry]:
    """Lists a SwinTransformerV1, which begins after the patch embedding.

    In torch a merging belongs to the stage before it.

    Args:
        depths: blocks of every stage.
        moe_stages: stages whose odd blocks have experts.

    Returns:
        Its entries.
    """
    entries: list[Entry] = []
    for stage, depth in enumerate(depths):
        name = f"stage{stage}/"
        if stage:
            torch_down, down = f"layers.{stage - 1}.downsample.", f"{name}downsample/"
            entries += _norm(f"{torch_down}norm", f"{down}norm")
            entries.append(Entry(f"{torch_down}reduction.weight", f"{down}reduction/kernel", None, "linear"))
        for kind, first, count in stage_plan(depth, 0):
            torch = f"layers.{stage}.blocks."
            if kind == "pairs":
                for i in range(count):
                    for half, block in enumerate(("plain", "shifted")):
                        entries += swin_v1_block_entries(
                            f"{torch}{first + 2 * i + half}.",
                            f"{name}pairs{first}/{block}/",
                            i,
                            bool(half) and stage in moe_stages,
                        )
            else:
                entries += swin_v1_block_entries(f"{torch}{first}.", f"{name}block{first}/")
    return entries + _norm("norm", "norm")


def msgfm_entries(cfg: config_dict.ConfigDict, modules: Iterable[str]) -> list[Entry]:
    """Lists top-level parameters of `models.msgfm.make_model(cfg, ...)` in the names of a file of several sensors.

    Args:
        cfg: config.model.
        modules: names of the parameters.

    Returns:
        The entries of their tensors.
    """
    embed, decoder = (name.format("") for name in (msgfm.EMBED, msgfm.DECODER))
    entries: list[Entry] = []
    for module in modules:
        if module == msgfm.MASK_TOKEN:
            entries.append(Entry("encoder.mask_token", module))
        elif module == msgfm.ENCODER:
            entries += placed(swin_v1_entries(cfg.depths, cfg.moe.stages), "encoder.", f"{module}/")
        elif module.startswith(embed):
            patches = _affine("proj", "proj", None, "conv") + _norm("norm", "norm")
            entries += placed(patches, f"encoder.patch_embeds.{module.removeprefix(embed)}.", f"{module}/")
        else:
            torch = f"decoders.{module.removeprefix(decoder)}.0"
            entries += placed(_affine("", "proj", None, "conv1x1"), torch, f"{module}/")
    return entries


def one_sensor(torch: str, sensor: str) -> str:
    """Translates a name in a file of several sensors to a file of one sensor.

    Args:
        torch: key in a file of several sensors.
        sensor: the sensor of the other file.

    Returns:
        The key in a file of that sensor alone.
    """
    return torch.replace(f"patch_embeds.{sensor}.", "patch_embed.").replace(f"decoders.{sensor}.", "decoder.")


def torch_shape(entry: Entry, leaf_shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of an entry's torch tensor.

    Args:
        entry: of the tensor.
        leaf_shape: shape of the leaf, with its leading axis where it is stacked.

    Returns:
        The shape in torch.
    """
    shape = tuple(leaf_shape[1:] if entry.index is not None else leaf_shape)
    return TRANSFORMS[entry.kind][1](np.broadcast_to(np.float32(0), shape)).shape
