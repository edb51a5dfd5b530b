"""Model FLOPs of one training step of each objective, part by part, by the formulas of `core.flops`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ml_collections import config_dict

from skysense_jax.core import flops
from skysense_jax.core.trees import Tree
from skysense_jax.sensors import Contract


class Views(NamedTuple):
    """Sizes of the views whose cells one head compares; there are two global views per place.

    places: of the global batch; dates: of the head's map; cells: of a global view; local_views: per place, 0 = none;
    local_cells: of a local view.
    """

    places: int
    dates: int
    cells: int
    local_views: int
    local_cells: int


def vit(cfg: config_dict.ConfigDict, images: float, height: int, width: int, bands: int) -> float:
    """FLOPs of a ViT without its UP head.

    Args:
        cfg: a section with the fields of config.model.s2.
        images: how many images.
        height: of an image, in pixels.
        width: of an image, in pixels.
        bands: of an image.

    Returns:
        FLOPs of the forward pass.
    """
    rows, columns = -(-height // cfg.patch), -(-width // cfg.patch)
    embed = flops.linear(images * rows * columns, cfg.patch**2 * bands, cfg.embed_dims)
    tokens = rows * columns + (1 if cfg.cls_token else 0)
    return embed + flops.transformer(images, tokens, cfg.embed_dims, cfg.depth, cfg.mlp_ratio)


def up_head(cfg: config_dict.ConfigDict, images: float, height: int, width: int, out: int) -> float:
    """FLOPs of the UP head after :func:`vit`: each token becomes patch^2 cells of `out` channels.

    Args:
        cfg: a section with the fields of config.model.s2.
        images: how many images.
        height: of an image, in pixels.
        width: of an image, in pixels.
        out: channels of a cell.

    Returns:
        FLOPs of the forward pass.
    """
    return flops.linear(images * -(-height // cfg.patch) * -(-width // cfg.patch), cfg.embed_dims, cfg.patch**2 * out)


def swin(cfg: config_dict.ConfigDict, images: float, height: int, width: int, bands: int) -> float:
    """FLOPs of a Swin-V2. The bias network runs once per block, not per image.

    Args:
        cfg: a section with the fields of config.model.hr.
        images: how many images.
        height: of an image, in pixels.
        width: of an image, in pixels.
        bands: of an image.

    Returns:
        FLOPs of the forward pass.
    """
    rows, columns, channels = -(-height // cfg.patch), -(-width // cfg.patch), cfg.embed_dims
    total = flops.linear(images * rows * columns, cfg.patch**2 * bands, channels)
    for stage, depth in enumerate(cfg.depths):
        if stage:
            rows, columns, channels = -(-rows // 2), -(-columns // 2), 2 * channels
            total += flops.linear(images * rows * columns, 2 * channels, channels)
        window = cfg.window if isinstance(cfg.window, int) else cfg.window[stage]
        heads = cfg.num_heads if isinstance(cfg.num_heads, int) else cfg.num_heads[stage]
        padded = images * -(-rows // window) * -(-columns // window) * window**2
        offsets = (2 * window - 1) ** 2
        block = flops.linear(padded, channels, 4 * channels) + flops.attention(padded, window**2, channels)
        block += (
            flops.mlp(images * rows * columns, channels, cfg.mlp_ratio)
            + flops.linear(offsets, 2, 512)
            + flops.linear(offsets, 512, heads)
        )
        total += depth * block
    return total


def fusion(cfg: config_dict.ConfigDict, cells: float, dates: float, width: int) -> float:
    """FLOPs of the fusion transformer over one sequence of dates per cell, and its extra token.

    The last layer has queries of the extra token alone.

    Args:
        cfg: config.model.fusion.
        cells: how many sequences.
        dates: vectors of a sequence.
        width: of such a vector.

    Returns:
        FLOPs of the forward pass.
    """
    c, tokens = cfg.embed_dims, dates + 1
    last = flops.linear(cells * tokens, c, 3 * c) + flops.attention(cells, tokens, c) + flops.linear(cells, c, c)
    last += flops.mlp(cells, c, cfg.mlp_ratio)
    return (
        flops.linear(cells * dates, width, c) + flops.transformer(cells, tokens, c, cfg.depth - 1, cfg.mlp_ratio) + last
    )


def skysense_encoder(
    cfg: config_dict.ConfigDict, shapes: Mapping[str, tuple[int, ...]], ratio: int
) -> dict[str, float]:
    """Forward FLOPs of a SkySense model by module.

    Args:
        cfg: config.model.
        shapes: sensor -> [places, T, H, W, C] of its images.
        ratio: HR pixels along one base pixel.

    Returns:
        {"hr", "s2", "head_s2", ..., "fusion": FLOPs of the forward pass}.
    """
    modules, dates, cells = {}, 0, 0.0
    for name, (places, t, height, width, bands) in shapes.items():
        if "depths" in cfg[name]:  # an encoder with stages is a Swin
            modules[name] = swin(cfg[name], places * t, height, width, bands)
            height, width = height // ratio, width // ratio
        else:
            modules[name] = vit(cfg[name], places * t, height, width, bands)
            modules[f"head_{name}"] = up_head(cfg[name], places * t, height, width, cfg.width)
        dates, cells = dates + t, float(places * height * width)
    return {**modules, "fusion": fusion(cfg.fusion, cells, dates, cfg.width)}


def geo_query(cfg: config_dict.ConfigDict, cells: float) -> float:
    """FLOPs of the projection of the geo-context's queries, where it has one.

    Args:
        cfg: config.model.
        cells: how many queries.

    Returns:
        FLOPs of the forward pass; 0 where the prototypes are as wide as the fused map, which needs no projection.
    """
    fused_width, prototype_width = cfg.fusion.embed_dims, cfg.geo_context.width
    return flops.linear(cells, fused_width, prototype_width) if fused_width != prototype_width else 0.0


def geo_context(cfg: config_dict.ConfigDict, places: int, cells: float, local_cells: float) -> float:
    """FLOPs of the geo-context in a step: student, teacher, and the products of the bank itself.

    The prototypes have no gradient: forward + backward of the attention is 2 x forward.

    Args:
        cfg: config.model.
        places: of the global batch.
        cells: of all global views.
        local_cells: of all local views.

    Returns:
        FLOPs of a step.
    """
    geo = cfg.geo_context
    query = flops.TRAINED * geo_query(cfg, cells + local_cells) + 2 * geo_query(cfg, cells)
    context = flops.attention(2 * (cells + local_cells) + cells, geo.prototypes, geo.width)
    assigned = flops.attention(cells, geo.prototypes, geo.width) + flops.linear(
        places, places, geo.prototypes * (geo.width + 1)
    )
    spread = flops.linear(places * geo.prototypes, geo.width, geo.prototypes)  # the metric geo/directions needs it
    return query + context + spread + (assigned if geo.bank == "on" else flops.linear(cells, geo.width, geo.prototypes))


def dino_trunk(cfg: config_dict.ConfigDict, rows: float, width: float) -> float:
    """FLOPs of the MLP of a DINO head up to the bottleneck.

    Args:
        cfg: config.objective.head.
        rows: vectors that it projects.
        width: of such a vector.

    Returns:
        FLOPs of the forward pass.
    """
    widths = [width] + [cfg.hidden] * (cfg.layers - 1) + [cfg.bottleneck]
    return sum(flops.linear(rows, d_in, d_out) for d_in, d_out in itertools.pairwise(widths))


def distillation(cfg: config_dict.ConfigDict, width: int, views: Views) -> dict[str, float]:
    """FLOPs of the pixel, object and image terms of one head in a step, forward and backward.

    Args:
        cfg: config.objective.
        width: channels of the head's map.
        views: sizes of the views.

    Returns:
        {"trunks", "prototypes", "matching": FLOPs of a step}.
    """
    places, dates, cells, local_views, local_cells = views
    head, c = cfg.head, cfg.clusters
    maps, local_maps, pairs = 2 * places * dates, local_views * places * dates, 2 * local_views * places * dates
    student_rows = maps * (cells + c + 1) + local_maps * (local_cells + 1) + pairs * c
    teacher_rows = maps * (cells + c + 1) + pairs * c
    targets = maps * (cells + c + 1) + pairs * (local_cells + c + 1)
    trunks = flops.TRAINED * dino_trunk(head, student_rows, width) + dino_trunk(head, teacher_rows, width)
    prototypes = flops.TRAINED * flops.linear(student_rows, head.bottleneck, head.prototypes) + flops.linear(
        targets, head.bottleneck, head.prototypes
    )
    # Cluster scores; assignment there and back; the teacher's centres, and the student's (features have a gradient,
    # weights none).
    matched = flops.linear(maps * cells, cells, 2 * c + head.bottleneck) + flops.linear(
        pairs * local_cells, cells, 2 * c + head.bottleneck
    )
    centres = flops.linear(maps * cells, c, width * (1 + 1 + 2)) + flops.linear(
        pairs * c, width, cells + 2 * local_cells
    )
    means = flops.linear(maps * cells, 1, width * 3) + flops.linear(local_maps * local_cells, 1, width * 2)
    return {"trunks": trunks, "prototypes": prototypes, "matching": matched + centres + means}


def mixture(cfg: config_dict.ConfigDict, images: float, tokens: float, width: float, ratio: float) -> float:
    """FLOPs of a mixture of experts in training: the gate, and every slot of every expert, taken or not.

    Args:
        cfg: config.model.moe.
        images: how many images.
        tokens: of an image.
        width: of a token.
        ratio: hidden width of an expert in units of `width`.

    Returns:
        FLOPs of the forward pass.
    """
    slots = int(cfg.capacity * -(-cfg.group * tokens // cfg.experts))
    return flops.linear(images * tokens, width, cfg.experts) + flops.mlp(
        images / cfg.group * cfg.experts * slots, width, ratio
    )


def swin_v1(cfg: config_dict.ConfigDict, images: float, side: int) -> float:
    """FLOPs of the encoder of msGFM behind the patch embeddings.

    Args:
        cfg: config.model.
        images: how many images.
        side: of an image, in pixels.

    Returns:
        FLOPs of the forward pass.
    """
    rows, width, total = -(-side // cfg.patch), cfg.embed_dims, 0.0
    for stage, depth in enumerate(cfg.depths):
        if stage:
            rows, width = -(-rows // 2), 2 * width
            total += flops.linear(images * rows**2, 2 * width, width)
        window = min(cfg.window, rows)
        padded = images * (-(-rows // window) * window) ** 2
        mixtures = depth // 2 if stage in cfg.moe.stages else 0
        total += depth * (flops.linear(padded, width, 4 * width) + flops.attention(padded, window**2, width))
        total += (depth - mixtures) * flops.mlp(images * rows**2, width, cfg.mlp_ratio)
        total += mixtures * mixture(cfg.moe, images, rows**2, width, cfg.mlp_ratio) if mixtures else 0.0
    return total


def msgfm_step(cfg: config_dict.ConfigDict, bands: Mapping[str, int], targets: Mapping[str, Sequence[str]]) -> float:
    """Model FLOPs of one step of the msGFM objective over the global batch: the mean over the sensors it may hold.

    Args:
        cfg: the whole configuration.
        bands: sensor -> number of its bands.
        targets: sensor -> the sensors that a batch of it reconstructs.

    Returns:
        FLOPs of a step.
    """
    modules = msgfm_parts(cfg, bands, targets)
    outer = [value for name, value in modules.items() if name != "encoder"]
    return modules["encoder"] + sum(outer) / len(bands)


def msgfm_parts(
    cfg: config_dict.ConfigDict, bands: Mapping[str, int], targets: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """Model FLOPs of one step of the msGFM objective, module by module.

    Args:
        cfg: the whole configuration.
        bands: sensor -> number of its bands.
        targets: sensor -> the sensors that a batch of it reconstructs.

    Returns:
        {"encoder": FLOPs of a step, and for each sensor those of its patch embedding and of the decoders that a batch
        of it runs}.
    """
    m, images = cfg.model, int(cfg.data.batch)
    last = m.patch * 2 ** (len(m.depths) - 1)
    modules = {"encoder": flops.TRAINED * swin_v1(m, images, m.img_size)}
    for name in bands:
        embed = flops.linear(images * (m.img_size // m.patch) ** 2, m.patch**2 * bands[name], m.embed_dims)
        cells, width = images * (m.img_size // last) ** 2, m.embed_dims * last // m.patch
        modules[name] = flops.TRAINED * (
            embed + sum(flops.linear(cells, width, last**2 * bands[target]) for target in targets[name])
        )
    return modules


def skysense_step(cfg: config_dict.ConfigDict, contract: Contract, spec: Tree) -> float:
    """Model FLOPs of one step of the SkySense objective over the global batch; see :func:`skysense_parts`.

    Args:
        cfg: the whole configuration.
        contract: the input contract.
        spec: the nested dict of the training batch, with leaves that have a shape.

    Returns:
        FLOPs of a step.
    """
    return sum(skysense_parts(cfg, contract, spec).values())


def skysense_parts(cfg: config_dict.ConfigDict, contract: Contract, spec: Tree) -> dict[str, float]:
    """Model FLOPs of one step of the SkySense objective, module by module.

    Args:
        cfg: the whole configuration.
        contract: the input contract.
        spec: the nested dict of the training batch, with leaves that have a shape.

    Returns:
        {"hr", "s2", "head_s2", ..., "fusion", "trunks", "prototypes", "matching", "align": FLOPs of a step}.
    """

    def shapes(scope: str) -> dict[str, tuple[int, ...]]:
        folded = {}
        for name, sensor in spec[scope]["sensors"].items():
            b, views, *rest = sensor["image"].shape
            folded[name] = (b * views, *rest)
        return folded

    total: dict[str, float] = {}

    def add(modules: Mapping[str, float], times: float = 1.0) -> None:
        for name, value in modules.items():
            total[name] = total.get(name, 0.0) + times * value

    add(skysense_encoder(cfg.model, shapes("global"), contract["ratio"]), flops.TRAINED + 1)  # student and teacher
    places, views, h, w = spec["global"]["coords"].shape[:4]
    local_views, local_cells = 0, 0
    if "local" in spec:
        add(skysense_encoder(cfg.model, shapes("local"), contract["ratio"]), flops.TRAINED)
        local_views = spec["local"]["coords"].shape[1]
        local_cells = spec["local"]["coords"].shape[2] * spec["local"]["coords"].shape[3]
    dates = {name: shape[1] for name, shape in shapes("global").items()}
    for t in dates.values():
        add(distillation(cfg.objective, cfg.model.width, Views(places, t, h * w, local_views, local_cells)))
    fused, geo = cfg.model.fusion.embed_dims, cfg.model.get("geo_context")
    if geo is not None and geo.bank != "none":
        fused += geo.width
        add({"geo": geo_context(cfg.model, places, places * views * h * w, places * local_views * local_cells)})
    add(distillation(cfg.objective, fused, Views(places, 1, h * w, local_views, local_cells)))
    regions, n = places * views * cfg.objective.align_grid**2, len(dates)
    projected = n * flops.linear(regions, cfg.model.width, cfg.objective.align_dim)
    compared = n * (n - 1) / 2 * flops.linear(regions, cfg.objective.align_dim, regions)
    add({"align": flops.TRAINED * (projected + compared)})
    return total
