"""msGFM's error behind the mask on held-out places, from every sensor to itself and to its pair.

    python -m experiments.msgfm_held_out RUN      # the table of a run: places held out and places it has learnt from

Whatever is compared sees the same crops behind the same masks.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from skysense_jax import networks
from skysense_jax.core import rngs
from skysense_jax.data.batches import one_sensor
from skysense_jax.models import msgfm, msgfm_outputs
from skysense_jax.ops.masking import masked_sums, pixel_mask, random_cells
from skysense_jax.sensors import SENSORS

MASKS = 17
"""Seed of the held-out crops, masks and order."""


def make_errors(cfg: Any, contract: Mapping[str, Any]) -> Callable[..., Any]:
    """errors(sensor, encoder, batch, key) -> {"<input>-<target>": {"error", "mean": [summed error, pixels]}} of a batch
    of one sensor's images, to itself and to its pair, behind masks drawn from the key.
    """
    model, side, cell = msgfm.make_model(cfg.model, contract), int(cfg.model.img_size), int(cfg.objective.mask_cell)

    @functools.partial(jax.jit, static_argnums=0)
    def errors(name: str, encoder: Any, batch: Any, key: jax.Array) -> dict[str, Any]:
        cells = random_cells(key, len(batch["paired"]), side // cell, cfg.objective.mask_ratio)
        image = msgfm_outputs.normalised(contract, name, batch["own"])[0]
        tokens = model.embed(encoder, name, image, pixel_mask(cells, cell // cfg.model.patch))
        final, hidden = model.encode(encoder, tokens).final, pixel_mask(cells, cell)[..., None]
        found = {}
        for target, part in ((name, "own"), (SENSORS[name].pair, "pair")):
            truth, measured = msgfm_outputs.normalised(contract, target, batch[part])
            guesses = {"error": model.decode(encoder, target, final), "mean": jnp.zeros_like(truth)}
            found[f"{name}-{target}"] = {
                kind: jnp.stack(masked_sums(guess, truth, measured * hidden)) for kind, guess in guesses.items()
            }
        return found

    return errors


def held_out(
    cfg: Any, contract: Mapping[str, Any], errors: Callable[..., Any], encoder: Any, split: str = "test"
) -> dict[str, dict[str, float]]:
    """Mean absolute error over hidden pixels of a split's places, in deviations of the target's bands:
    {"<input>-<target>": {"error": the network's, "mean": of the training images' mean in its stead}}.

    errors: :func:`make_errors` of the same configuration. Whole places, each once as each sensor (as many as fill
    batches); masks from MASKS; the partner as in training: the acquisition nearest in time. As in evaluation elsewhere
    the gates have no noise and no token is dropped.
    """
    cfg, names = cfg.copy_and_resolve_references(), tuple(contract["sensors"])
    cfg.unlock()
    cfg.data.split, cfg.data.scale, cfg.data.aspect, cfg.data.flip = split, (1.0, 1.0), (1.0, 1.0), 0.0
    batches = one_sensor.train_dataset(cfg, contract, MASKS)
    total: dict[str, dict[str, np.ndarray]] = {}
    for number in range(sum(one_sensor.make_plan(cfg, contract, MASKS).rounds.values())):
        batch = batches[number]
        name = names[int(batch.pop("sensor")[0])]
        for direction, kinds in errors(name, encoder, batch, rngs.key(MASKS, "masks", number)).items():
            for kind, pair in kinds.items():
                total.setdefault(direction, {}).setdefault(kind, np.zeros(2))
                total[direction][kind] += np.asarray(pair, np.float64)
    return {
        direction: {kind: float(error / pixels) for kind, (error, pixels) in kinds.items()}
        for direction, kinds in total.items()
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="workdir of an msGFM run, whose datasets are where its configuration says")
    network = networks.open_network(parser.parse_args().run)
    found = network.description
    errors = make_errors(found.config, found.contract)
    test, train = (
        held_out(found.config, found.contract, errors, network.encoder, split) for split in ("test", "train")
    )
    print("| from - to | held out: the mean | held out: network | learnt from: the mean | learnt from: network |")
    print("|---|---|---|---|---|")
    for direction, here in test.items():
        values = (one[kind] for one in (here, train[direction]) for kind in ("mean", "error"))
        print(f"| {direction} | " + " | ".join(f"{value:.3f}" for value in values) + " |")


if __name__ == "__main__":
    main()
