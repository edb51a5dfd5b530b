"""What the equal shares of geo-context's Sinkhorn cost a bank: prototypes of frozen features, by the update alone.

    python -m experiments.geo_shares RUN --data DATASET --region LON,LAT [--together 1 8 32] [--updates 200]

The update (ops.prototypes) divides the cells of *every view* equally among the prototypes, as the paper has it for
every sample; a view of two classes has to fill all of them. Here the cells of `together` views of different places are
given to it as one, which it then divides as a whole. Nothing else is learnt: the features are RUN's, a network with
geo-context; its own bank is not used. "centred" takes from every feature the mean of its position in a ViT patch, which
leaves what the UP heads' separate projections of the positions do not explain. The places of both splits are used, to
learn from and to score: no label is learnt from. Agreement is the adjusted mutual information with the label map.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from skysense_jax import evaluation, networks
from skysense_jax.commands import prototypes as command
from skysense_jax.evals import assignment, region
from skysense_jax.evals.unit import unit
from skysense_jax.models.skysense import region_side
from skysense_jax.ops import prototypes
from skysense_jax.ops.unit import unit as unit_float32

SIDE = 8
"""Cells along a view."""


def centred(maps: np.ndarray, valid: np.ndarray, patch: int) -> np.ndarray:
    """Unit features [M, h, w, D] without the mean of their position in a patch of patch x patch cells."""
    out, rows, columns = np.array(maps, np.float64), *np.indices(maps.shape[1:3]) % patch
    mean = out[valid].mean(0)
    for at in np.ndindex(patch, patch):
        here = (rows == at[0]) & (columns == at[1])
        out[:, here] += mean - out[:, here][valid[:, here]].mean(0)
    return np.asarray(unit_float32(jnp.asarray(out, jnp.float32), "clamp"))


def learn(
    bank: dict[str, jax.Array],
    seen: region.Seen,
    maps: np.ndarray,
    valid: np.ndarray,
    together: int,
    updates: int,
    momentum: float,
    epsilon: float,
    iterations: int,
) -> np.ndarray:
    """The prototypes [P, D] of the places' region after `updates` updates of one view of together x SIDE^2 cells."""
    rng = np.random.default_rng(0)
    place = {name: jnp.asarray(getattr(seen, name)[:1], jnp.float32) for name in ("lon", "lat")}

    @jax.jit
    def step(bank, view, mask):
        return prototypes.update(bank, prototypes.observe(bank, place, view, mask, epsilon, iterations)[0], momentum)

    for _ in range(updates):
        parts = []
        for number in rng.choice(len(maps), together, replace=False):
            top, left = rng.integers(0, np.array(maps.shape[1:3]) - SIDE + 1)
            window = np.s_[number, top : top + SIDE, left : left + SIDE]
            parts.append((maps[window].reshape(SIDE * SIDE, -1), valid[window].reshape(-1)))
        view, mask = (np.concatenate(one)[None, None] for one in zip(*parts, strict=True))
        bank = step(bank, view, mask.astype(np.float32))
    [row] = np.flatnonzero(np.asarray(bank["visits"]))
    return np.asarray(bank["prototypes"][row])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="workdir, checkpoint or exported folder of a network with geo-context")
    parser.add_argument("--data", required=True, help="dataset with a label map")
    parser.add_argument("--region", required=True, metavar="LON,LAT", help="whose places are used")
    parser.add_argument("--together", type=int, nargs="+", default=[1, 8, 32], help="views divided as one")
    parser.add_argument("--updates", type=int, default=200)
    args = parser.parse_args()
    network = networks.open_network(args.run)
    found, bank = network.description, networks.bank_of(network)
    row = region.region_at(bank, *command.location(args.region), region_side(found.model.geo_context))
    seen = evaluation.places_in_region(network, bank, evaluation.settings(found, None, args.data), row)
    shape, objective = (len(seen.names), *seen.grid), found.config.objective
    count, valid = len(bank["prototypes"][row]), seen.valid.reshape(shape)
    as_they_are = seen.features.reshape(*shape, -1)
    patch = (found.model.get("s2") or found.model.s1).patch
    print(
        "| features | one Sinkhorn divides the cells of | directions | mean cosine | agreement | k-means |\n"
        "|---|---|---|---|---|---|"
    )
    for text, maps in (("as they are", as_they_are), ("centred", centred(as_they_are, valid, patch))):
        cells, label = maps[valid], seen.label.reshape(shape)[valid]
        reference = assignment.agreement(assignment.kmeans(cells, count, 0), label)
        for together in args.together:
            empty = prototypes.empty_bank(jax.random.key(0), 1, count, cells.shape[-1], found.model.geo_context.cell)
            learnt = unit(
                learn(
                    empty,
                    seen,
                    maps,
                    valid,
                    together,
                    args.updates,
                    objective.prototype_momentum,
                    objective.sinkhorn_eps,
                    objective.sinkhorn_iters,
                )
            )
            cosine = cells @ learnt.T
            print(
                f"| {text} | {together} view{'s' * (together > 1)} | {prototypes.directions(learnt):.1f} | "
                f"{cosine.max(-1).mean():.3f} | {assignment.agreement(cosine.argmax(-1), label):.3f} | "
                f"{reference:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
