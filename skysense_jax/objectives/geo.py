"""The prototype bank in pretraining: where a batch's views lie, what they say about the bank, how its leaves are
sharded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from skysense_jax.models.inputs import PLACE
from skysense_jax.models.skysense import Model, region_side
from skysense_jax.objectives.granularity import Cells
from skysense_jax.ops import prototypes

Tree = Any


def located(views: Tree, place: Mapping[str, jax.Array]) -> Tree:
    """Views whose PlaceInput also says where every view is: {"lon", "lat"} [B, V]."""
    b, v = views["cell"].shape
    where = {name: jnp.broadcast_to(place[name][:, None], (b, v)) for name in ("lon", "lat")}
    return {**views, "sensors": {**views["sensors"], PLACE: where}}


def observe(
    cfg: Any, model: Model, encoder: Tree, bank: Tree, place: Mapping[str, jax.Array], fused: Cells
) -> tuple[prototypes.Observed, dict[str, jax.Array]]:
    """What the student's global views say about the bank, without gradient; see `prototypes.observe`.

    cfg: the whole configuration; fused: the fused map's cells [B, V, 1, N, E + D], of which the bank sees the first E.
    """
    features = jax.lax.stop_gradient(fused.features[:, :, 0, :, : cfg.model.fusion.embed_dims])
    seen, monitors = prototypes.observe(
        bank,
        place,
        model.query(encoder, features),
        fused.mask[:, :, 0],
        cfg.objective.sinkhorn_eps,
        cfg.objective.sinkhorn_iters,
        region_side(cfg.model.geo_context),
    )
    return seen, {f"geo/{name}": value for name, value in monitors.items()}


def rules(cfg: Any) -> tuple[tuple[str, str], ...]:
    """Sharding of the query projection, where config.model has one, and of the bank (by region where they are
    more than a prototype is wide, as at full size)."""
    bank = (("memory/bank/(prototypes|usage)", "fsdp"), ("memory/bank/(visits|cells|l(on|at)_edges)", "replicate"))
    if cfg.geo_context.width == cfg.fusion.embed_dims:
        return bank
    return (("(params|teacher)/encoder/geo/query/.+", "fsdp"), *bank)
