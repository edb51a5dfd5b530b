"""Analytic model FLOPs of one training step, the numerator of MFU.

What is counted: every multiply-accumulate of a matrix product or convolution as 2 FLOPs (linear layers, attention
logits and values, patch embedding, heads, prototypes, alignment, the objective's own products); padding that the
architecture itself asks for (Swin windows). Forward + backward of the student = 3 x forward; the teacher and everything
without gradient = 1 x forward. What is not counted: rematerialisation (it is a choice, not work the model needs),
normalisations, softmax, elementwise work, the optimiser. Backward products that nobody needs (gradients of the input
images) are counted by the 3 x convention; they are below 1 %. A test holds these formulas against the products in the
traced step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

TRAINED = 3.0
"""Forward + backward in units of the forward pass."""


def linear(rows: float, d_in: float, d_out: float) -> float:
    """FLOPs of a linear layer.

    Args:
        rows: vectors that it multiplies.
        d_in: their width before it.
        d_out: their width after it.

    Returns:
        FLOPs of the forward pass.
    """
    return 2.0 * rows * d_in * d_out


def attention(rows: float, keys: float, width: float) -> float:
    """FLOPs of an attention's logits and values over all heads; its projections are counted apart.

    Args:
        rows: queries.
        keys: keys that each query sees.
        width: of queries, keys and values, all heads together.

    Returns:
        FLOPs of the forward pass.
    """
    return 4.0 * rows * keys * width


def mlp(rows: float, width: float, ratio: float) -> float:
    """FLOPs of two linear layers width -> ratio * width -> width.

    Args:
        rows: vectors that they multiply.
        width: of the vectors.
        ratio: hidden width in units of `width`.

    Returns:
        FLOPs of the forward pass.
    """
    return 2.0 * linear(rows, width, int(width * ratio))


def transformer(sequences: float, tokens: float, width: float, depth: int, ratio: float) -> float:
    """FLOPs of plain transformer layers.

    Args:
        sequences: how many sequences.
        tokens: of each sequence.
        width: of a token.
        depth: how many layers.
        ratio: hidden width of the MLP in units of `width`.

    Returns:
        FLOPs of the forward pass.
    """
    rows = sequences * tokens
    return depth * (linear(rows, width, 4 * width) + attention(rows, tokens, width) + mlp(rows, width, ratio))


def vit(cfg: Any, images: float, height: int, width: int, bands: int) -> float:
    """A ViT (fields of config.model.s2) over images of height x width pixels; its UP head apart."""
    rows, columns = -(-height // cfg.patch), -(-width // cfg.patch)
    embed = linear(images * rows * columns, cfg.patch**2 * bands, cfg.embed_dims)
    tokens = rows * columns + (1 if cfg.cls_token else 0)
    return embed + transformer(images, tokens, cfg.embed_dims, cfg.depth, cfg.mlp_ratio)


def up_head(cfg: Any, images: float, height: int, width: int, out: int) -> float:
    """The UP head after :func:`vit`: each token becomes patch^2 cells of `out` channels."""
    return linear(images * -(-height // cfg.patch) * -(-width // cfg.patch), cfg.embed_dims, cfg.patch**2 * out)


def swin(cfg: Any, images: float, height: int, width: int, bands: int) -> float:
    """A Swin-V2 (fields of config.model.hr) over images of height x width pixels. The bias network runs once per block,
    not per image.
    """
    rows, columns, channels = -(-height // cfg.patch), -(-width // cfg.patch), cfg.embed_dims
    total = linear(images * rows * columns, cfg.patch**2 * bands, channels)
    for stage, depth in enumerate(cfg.depths):
        if stage:
            rows, columns, channels = -(-rows // 2), -(-columns // 2), 2 * channels
            total += linear(images * rows * columns, 2 * channels, channels)
        window = cfg.window if isinstance(cfg.window, int) else cfg.window[stage]
        heads = cfg.num_heads if isinstance(cfg.num_heads, int) else cfg.num_heads[stage]
        padded = images * -(-rows // window) * -(-columns // window) * window**2
        offsets = (2 * window - 1) ** 2
        block = linear(padded, channels, 4 * channels) + attention(padded, window**2, channels)
        block += (
            mlp(images * rows * columns, channels, cfg.mlp_ratio)
            + linear(offsets, 2, 512)
            + linear(offsets, 512, heads)
        )
        total += depth * block
    return total


def fusion(cfg: Any, cells: float, dates: float, width: int) -> float:
    """The fusion transformer (fields of config.model.fusion) over `cells` sequences of `dates` vectors of `width`, and
    its extra token; the last layer looks from that token alone.
    """
    c, tokens = cfg.embed_dims, dates + 1
    last = linear(cells * tokens, c, 3 * c) + attention(cells, tokens, c) + linear(cells, c, c)
    last += mlp(cells, c, cfg.mlp_ratio)
    return linear(cells * dates, width, c) + transformer(cells, tokens, c, cfg.depth - 1, cfg.mlp_ratio) + last


def skysense_encoder(cfg: Any, shapes: Mapping[str, tuple[int, ...]], ratio: int) -> dict[str, float]:
    """Forward FLOPs of a SkySense model by module. cfg: config.model; shapes: sensor -> [places, T, H, W, C]; ratio: HR
    pixels per base pixel.
    """
    parts, dates, cells = {}, 0, 0.0
    for name, (places, t, height, width, bands) in shapes.items():
        if name == "hr":
            parts[name] = swin(cfg.hr, places * t, height, width, bands)
            height, width = height // ratio, width // ratio
        else:
            parts[name] = vit(cfg[name], places * t, height, width, bands)
            parts[f"head_{name}"] = up_head(cfg[name], places * t, height, width, cfg.width)
        dates, cells = dates + t, float(places * height * width)
    return {**parts, "fusion": fusion(cfg.fusion, cells, dates, cfg.width)}


def geo_query(cfg: Any, cells: float) -> float:
    """The projection of the geo-context's queries (fields of config.model), where it has one."""
    width, own = cfg.fusion.embed_dims, cfg.geo_context.width
    return linear(cells, width, own) if width != own else 0.0


def geo_context(cfg: Any, places: int, cells: float, local_cells: float) -> float:
    """The geo-context in a step. cells, local_cells: of all global and of all local views. The prototypes have no
    gradient: forward + backward of the attention is 2 x forward. Student, teacher, and the bank's own products.
    """
    geo = cfg.geo_context
    query = TRAINED * geo_query(cfg, cells + local_cells) + 2 * geo_query(cfg, cells)
    context = attention(2 * (cells + local_cells) + cells, geo.prototypes, geo.width)
    assigned = attention(cells, geo.prototypes, geo.width) + linear(places, places, geo.prototypes * (geo.width + 1))
    spread = linear(places * geo.prototypes, geo.width, geo.prototypes)  # what geo/directions is told by
    return query + context + spread + (assigned if geo.bank == "on" else linear(cells, geo.width, geo.prototypes))


def dino_trunk(cfg: Any, rows: float, width: float) -> float:
    """The MLP of a DINO head (fields of config.objective.head) up to the bottleneck."""
    widths = [width] + [cfg.hidden] * (cfg.layers - 1) + [cfg.bottleneck]
    return sum(linear(rows, a, b) for a, b in zip(widths, widths[1:]))


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
    trunks = TRAINED * dino_trunk(head, student_rows, width) + dino_trunk(head, teacher_rows, width)
    prototypes = TRAINED * linear(student_rows, head.bottleneck, head.prototypes) + linear(
        targets, head.bottleneck, head.prototypes
    )
    # Cluster scores; assignment there and back; the teacher's centres, and the student's (features have a gradient,
    # weights none).
    matched = linear(maps * cells, cells, 2 * c + head.bottleneck) + linear(
        pairs * local_cells, cells, 2 * c + head.bottleneck
    )
    centres = linear(maps * cells, c, width * (1 + 1 + 2)) + linear(pairs * c, width, cells + 2 * local_cells)
    means = linear(maps * cells, 1, width * 3) + linear(local_maps * local_cells, 1, width * 2)
    return {"trunks": trunks, "prototypes": prototypes, "matching": matched + centres + means}


def of_jaxpr(jaxpr: Any) -> float:
    """FLOPs of all matrix products in a traced function as it is written, rematerialisation included.

    The body of a scan counts times its length.

    Raises:
        ValueError: the function has a convolution; this package has none (nn.patch cuts patches by reshaping).
    """
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            inner = math.prod(equation.invars[0].aval.shape[i] for i in contracted)
            total += 2.0 * inner * math.prod(equation.outvars[0].aval.shape)
        if equation.primitive.name == "conv_general_dilated":
            raise ValueError("convolutions are not counted")
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += times * of_jaxpr(inner)
    return total


def mixture(cfg: Any, images: float, tokens: float, width: float, ratio: float) -> float:
    """A mixture of experts (fields of config.model.moe) over `images` of `tokens` tokens in training: the gate, and
    every place of every expert, taken or not.
    """
    places = int(cfg.capacity * -(-cfg.group * tokens // cfg.experts))
    return linear(images * tokens, width, cfg.experts) + mlp(images / cfg.group * cfg.experts * places, width, ratio)


def swin_v1(cfg: Any, images: float, side: int) -> float:
    """msGFM's encoder (fields of config.model) behind the patch embeddings, over images of side x side pixels."""
    rows, width, total = -(-side // cfg.patch), cfg.embed_dims, 0.0
    for stage, depth in enumerate(cfg.depths):
        if stage:
            rows, width = -(-rows // 2), 2 * width
            total += linear(images * rows**2, 2 * width, width)
        window = min(cfg.window, rows)
        padded = images * (-(-rows // window) * window) ** 2
        mixtures = depth // 2 if stage in cfg.moe.stages else 0
        total += depth * (linear(padded, width, 4 * width) + attention(padded, window**2, width))
        total += (depth - mixtures) * mlp(images * rows**2, width, cfg.mlp_ratio)
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
    parts = {"encoder": TRAINED * swin_v1(m, images, m.img_size)}
    for name in bands:
        embed = linear(images * (m.img_size // m.patch) ** 2, m.patch**2 * bands[name], m.embed_dims)
        cells, width = images * (m.img_size // last) ** 2, m.embed_dims * last // m.patch
        parts[name] = TRAINED * (embed + sum(linear(cells, width, last**2 * bands[target]) for target in targets[name]))
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

    add(skysense_encoder(cfg.model, shapes("global"), contract["ratio"]), TRAINED + 1)  # student and teacher
    places, views, h, w = spec["global"]["coords"].shape[:4]
    locals_, local_cells = 0, 0
    if "local" in spec:
        add(skysense_encoder(cfg.model, shapes("local"), contract["ratio"]), TRAINED)
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
    projected = n * linear(regions, cfg.model.width, cfg.objective.align_dim)
    compared = n * (n - 1) / 2 * linear(regions, cfg.objective.align_dim, regions)
    add({"align": TRAINED * (projected + compared)})
    return parts
