"""Model FLOPs of one training step of each objective, part by part, by the formulas of `core.flops`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from skysense_jax.core import flops


def vit(cfg: Any, images: float, height: int, width: int, bands: int) -> float:
    """A ViT (fields of config.model.s2) over images of height x width pixels; its UP head apart."""
    rows, columns = -(-height // cfg.patch), -(-width // cfg.patch)
    embed = flops.linear(images * rows * columns, cfg.patch**2 * bands, cfg.embed_dims)
    tokens = rows * columns + (1 if cfg.cls_token else 0)
    return embed + flops.transformer(images, tokens, cfg.embed_dims, cfg.depth, cfg.mlp_ratio)


def up_head(cfg: Any, images: float, height: int, width: int, out: int) -> float:
    """The UP head after :func:`vit`: each token becomes patch^2 cells of `out` channels."""
    return flops.linear(images * -(-height // cfg.patch) * -(-width // cfg.patch), cfg.embed_dims, cfg.patch**2 * out)


def swin(cfg: Any, images: float, height: int, width: int, bands: int) -> float:
    """A Swin-V2 (fields of config.model.hr) over images of height x width pixels. The bias network runs once per block,
    not per image.
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


def fusion(cfg: Any, cells: float, dates: float, width: int) -> float:
    """The fusion transformer (fields of config.model.fusion) over `cells` sequences of `dates` vectors of `width`, and
    its extra token; the last layer looks from that token alone.
    """
    c, tokens = cfg.embed_dims, dates + 1
    last = flops.linear(cells * tokens, c, 3 * c) + flops.attention(cells, tokens, c) + flops.linear(cells, c, c)
    last += flops.mlp(cells, c, cfg.mlp_ratio)
    return (
        flops.linear(cells * dates, width, c) + flops.transformer(cells, tokens, c, cfg.depth - 1, cfg.mlp_ratio) + last
    )


def skysense_encoder(cfg: Any, shapes: Mapping[str, tuple[int, ...]], ratio: int) -> dict[str, float]:
    """Forward FLOPs of a SkySense model by module. cfg: config.model; shapes: sensor -> [places, T, H, W, C]; ratio: HR
    pixels per base pixel.
    """
    parts, dates, cells = {}, 0, 0.0
    for name, (places, t, height, width, bands) in shapes.items():
        if "depths" in cfg[name]:  # an encoder with stages is a Swin
            parts[name] = swin(cfg[name], places * t, height, width, bands)
            height, width = height // ratio, width // ratio
        else:
            parts[name] = vit(cfg[name], places * t, height, width, bands)
            parts[f"head_{name}"] = up_head(cfg[name], places * t, height, width, cfg.width)
        dates, cells = dates + t, float(places * height * width)
    return {**parts, "fusion": fusion(cfg.fusion, cells, dates, cfg.width)}


def geo_query(cfg: Any, cells: float) -> float:
    """The projection of the geo-context's queries (fields of config.model), where it has one."""
    width, own = cfg.fusion.embed_dims, cfg.geo_context.width
    return flops.linear(cells, width, own) if width != own else 0.0


def geo_context(cfg: Any, places: int, cells: float, local_cells: float) -> float:
    """The geo-context in a step. cells, local_cells: of all global and of all local views. The prototypes have no
    gradient: forward + backward of the attention is 2 x forward. Student, teacher, and the bank's own products.
    """
    geo = cfg.geo_context
    query = flops.TRAINED * geo_query(cfg, cells + local_cells) + 2 * geo_query(cfg, cells)
    context = flops.attention(2 * (cells + local_cells) + cells, geo.prototypes, geo.width)
    assigned = flops.attention(cells, geo.prototypes, geo.width) + flops.linear(
        places, places, geo.prototypes * (geo.width + 1)
    )
    spread = flops.linear(places * geo.prototypes, geo.width, geo.prototypes)  # what geo/directions is told by
    return query + context + spread + (assigned if geo.bank == "on" else flops.linear(cells, geo.width, geo.prototypes))


def dino_trunk(cfg: Any, rows: float, width: float) -> float:
    """The MLP of a DINO head (fields of config.objective.head) up to the bottleneck."""
    widths = [width] + [cfg.hidden] * (cfg.layers - 1) + [cfg.bottleneck]
    return sum(flops.linear(rows, a, b) for a, b in zip(widths, widths[1:]))


def distillation(
    cfg: Any, width: int, places: int, dates: int, cells: int, locals_: int, local_cells: int
) -> dict[str, float]:
    """FLOPs of one head's pixel, object and image terms in a step, forward and backward, two global views.

    cfg: config.objective; cells, local_cells: per view; locals_: local views per place (0 = none).
    """
    head, c = cfg.head, cfg.clusters
    maps, local_maps, pairs = 2 * places * dates, locals_ * places * dates, 2 * locals_ * places * dates
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


def mixture(cfg: Any, images: float, tokens: float, width: float, ratio: float) -> float:
    """A mixture of experts (fields of config.model.moe) over `images` of `tokens` tokens in training: the gate, and
    every place of every expert, taken or not.
    """
    places = int(cfg.capacity * -(-cfg.group * tokens // cfg.experts))
    return flops.linear(images * tokens, width, cfg.experts) + flops.mlp(
        images / cfg.group * cfg.experts * places, width, ratio
    )


def swin_v1(cfg: Any, images: float, side: int) -> float:
    """msGFM's encoder (fields of config.model) behind the patch embeddings, over images of side x side pixels."""
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


def msgfm_step(cfg: Any, bands: Mapping[str, int], targets: Mapping[str, Sequence[str]]) -> float:
    """Model FLOPs of one step of the msGFM objective over the global batch: the mean over the sensors it may hold.
    bands: by sensor; targets: the sensors that a batch of a sensor reconstructs.
    """
    parts = msgfm_parts(cfg, bands, targets)
    outer = [value for name, value in parts.items() if name != "encoder"]
    return parts["encoder"] + sum(outer) / len(bands)


def msgfm_parts(cfg: Any, bands: Mapping[str, int], targets: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """The same by part: "encoder", and for each sensor its patch embedding and the decoders a batch of it runs."""
    m, images = cfg.model, int(cfg.data.batch)
    last = m.patch * 2 ** (len(m.depths) - 1)
    parts = {"encoder": flops.TRAINED * swin_v1(m, images, m.img_size)}
    for name in bands:
        embed = flops.linear(images * (m.img_size // m.patch) ** 2, m.patch**2 * bands[name], m.embed_dims)
        cells, width = images * (m.img_size // last) ** 2, m.embed_dims * last // m.patch
        parts[name] = flops.TRAINED * (
            embed + sum(flops.linear(cells, width, last**2 * bands[target]) for target in targets[name])
        )
    return parts


def skysense_step(cfg: Any, contract: Mapping[str, Any], spec: Mapping[str, Any]) -> float:
    """Model FLOPs of one step of the SkySense objective over the global batch; see :func:`skysense_parts`."""
    return sum(skysense_parts(cfg, contract, spec).values())


def skysense_parts(cfg: Any, contract: Mapping[str, Any], spec: Mapping[str, Any]) -> dict[str, float]:
    """The same by part: {"hr", "s2", "head_s2", ..., "fusion", "trunks", "prototypes", "matching", "align"}.

    cfg: the whole configuration; contract: the input contract; spec: the training batch's nested dict with leaves that
    have a shape.
    """

    def shapes(scope: str) -> dict[str, tuple[int, ...]]:
        folded = {}
        for name, sensor in spec[scope]["sensors"].items():
            b, views, *rest = sensor["image"].shape
            folded[name] = (b * views, *rest)
        return folded

    parts: dict[str, float] = {}

    def add(more: Mapping[str, float], times: float = 1.0) -> None:
        for name, value in more.items():
            parts[name] = parts.get(name, 0.0) + times * value

    add(skysense_encoder(cfg.model, shapes("global"), contract["ratio"]), flops.TRAINED + 1)  # student and teacher
    places, views, h, w = spec["global"]["coords"].shape[:4]
    locals_, local_cells = 0, 0
    if "local" in spec:
        add(skysense_encoder(cfg.model, shapes("local"), contract["ratio"]), flops.TRAINED)
        locals_ = spec["local"]["coords"].shape[1]
        local_cells = spec["local"]["coords"].shape[2] * spec["local"]["coords"].shape[3]
    dates = {name: shape[1] for name, shape in shapes("global").items()}
    for name, t in dates.items():
        add(distillation(cfg.objective, cfg.model.width, places, t, h * w, locals_, local_cells))
    fused, geo = cfg.model.fusion.embed_dims, cfg.model.get("geo_context")
    if geo is not None and geo.bank != "none":
        fused += geo.width
        add({"geo": geo_context(cfg.model, places, places * views * h * w, places * locals_ * local_cells)})
    add(distillation(cfg.objective, fused, places, 1, h * w, locals_, local_cells))
    regions, n = places * views * cfg.objective.align_grid**2, len(dates)
    projected = n * flops.linear(regions, cfg.model.width, cfg.objective.align_dim)
    compared = n * (n - 1) / 2 * flops.linear(regions, cfg.objective.align_dim, regions)
    add({"align": flops.TRAINED * (projected + compared)})
    return parts
