"""The prototype bank in pretraining: where views lie, what they say about the bank, how its leaves are sharded."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from ml_collections import config_dict

from skysense_jax.core.shapes import Scalar
from skysense_jax.core.trees import Tree
from skysense_jax.models.inputs import PLACE
from skysense_jax.models.skysense import Model, region_side
from skysense_jax.objectives.granularity import Cells
from skysense_jax.ops import prototypes


def located(views: Tree, place: prototypes.Place) -> Tree:
    """Views whose PlaceInput also says where every view is.

    Args:
        views: of a batch, V of each place.
        place: {"lon", "lat"} [B] degrees.

    Returns:
        The views; the sensors' entry has PLACE with {"lon", "lat"} [B, V].
    """
    b, v = views["cell"].shape
    locations = {name: jnp.broadcast_to(place[name][:, None], (b, v)) for name in ("lon", "lat")}
    return {**views, "sensors": {**views["sensors"], PLACE: locations}}


def observe(
    cfg: config_dict.ConfigDict,
    model: Model,
    encoder: Tree,
    bank: prototypes.Bank,
    place: prototypes.Place,
    fused: Cells,
) -> tuple[prototypes.Observed, dict[str, Scalar]]:
    """What the student's global views say about the bank, without gradient; see `prototypes.observe`.

    Args:
        cfg: the whole configuration.
        model: the network's functions.
        encoder: the student's parameters.
        bank: before the batch.
        place: {"lon", "lat"} [B] degrees.
        fused: the fused map's cells [B, V, 1, N, E + D], of which the bank sees the first E.

    Returns:
        (what the batch says about the bank, monitors by metric name).
    """
    features = jax.lax.stop_gradient(fused.features[:, :, 0, :, : cfg.model.fusion.embed_dims])
    observed, monitors = prototypes.observe(
        bank,
        place,
        model.query(encoder, features),
        fused.mask[:, :, 0],
        cfg.objective.sinkhorn_eps,
        cfg.objective.sinkhorn_iters,
        region_side(cfg.model.geo_context),
    )
    return observed, {f"geo/{name}": value for name, value in monitors.items()}


def rules(cfg: config_dict.ConfigDict) -> tuple[tuple[str, str], ...]:
    """Sharding of the bank, and of the query projection where config.model has one.

    The bank is split by region where there are more regions than a prototype is wide, as at full size.
    """
    bank = (("memory/bank/(prototypes|usage)", "fsdp"), ("memory/bank/(visits|cells|l(on|at)_edges)", "replicate"))
    if cfg.geo_context.width == cfg.fusion.embed_dims:
        return bank
    return (("(params|teacher)/encoder/geo/query/.+", "fsdp"), *bank)
