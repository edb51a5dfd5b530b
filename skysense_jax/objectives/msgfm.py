"""The msGFM objective: masked image modelling of one sensor's images, of a place's other sensor half of the time.

    s, images, partners = batch                     one input sensor s, t = pair(s): s2 - s1, hr - dsm
    x, y  = normalised(images), normalised(partners)
    mask  = ceil(mask_ratio * n) of the n cells of mask_cell pixels, drawn for each image
    z     = encode(embed_s(x) with the mask token in hidden places)
    cross = place has both and coin(objective.cross), for each image
    L_MIM = sum over hidden pixels of (|decode_t(z) - y| if cross else |decode_s(z) - x|), mean over the bands
            / (hidden pixels + 1e-5)                the reference's normalisation, over the whole batch
    L     = L_MIM + aux_weight * sum over mixtures of their auxiliary loss
            - distill.weight * mean cos(project(third merging of z), the same of a frozen teacher)

Pixels that were not measured do not count. The paper's text is known in parts only: SimMIM and GFM (its own
models/simmim.py) give the masking, the loss and the distillation (on images of the sensor hr, which is what its
teachers know); that the coin is tossed for each sample, and the partner is compared under the input's mask, is our
reading.

The batch says which sensor it holds, a number: one compiled step serves all sensors, the encoder runs once, and
`lax.switch` picks patch embedding and decoders. The learning rate of the update is scaled by optim.lr_scale of the
batch's sensor; patch embeddings and decoders of other sensors than its own and its pair's stay as they are, and so do
their moments: what Adam remembers of a rare sensor would otherwise move them at the rates of the frequent ones.

Metrics (float32 scalars; "nan" where this batch has none of it):
  loss/total, loss/mim       the sums above
  loss/<input>-<target>      mean absolute error over the hidden pixels, in deviations of the target's bands. 0.8 = as
                             good as the mean (of a normal distribution)
  cross/share                images that reconstruct their partner
  moe/aux                    sum over mixtures of the auxiliary loss, unweighted
  moe/dropped                share of tokens that no expert had a place for. Rising: raise moe.capacity or aux_weight
  moe/load_entropy           entropy of the load of the experts / log E, mean over mixtures. 1 = even, 0 = one expert
  moe/load/<mixture>-<expert>  share of the tokens that the gate of a mixture (they count from the first) sent to an
                             expert. 1/E = even
  moe/load_max               that of the most loaded expert, mean over mixtures
  distill/cosine             mean cosine with the teacher's features
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import config_dict

from skysense_jax.core import trees
from skysense_jax.core.rngs import name_hash
from skysense_jax.core.shapes import FeatureMap, Key, Mask, Scalar
from skysense_jax.core.trees import Tree
from skysense_jax.models import msgfm
from skysense_jax.models.msgfm_outputs import normalised
from skysense_jax.objectives import flops, gfm
from skysense_jax.objectives.base import Objective
from skysense_jax.ops.masking import masked_sums, pixel_mask, random_cells
from skysense_jax.sensors import SENSORS, Contract


def make_objective(cfg: config_dict.ConfigDict, contract: Contract) -> Objective:
    """The objective of a configuration and an input contract. See objectives.base for the functions' contracts.

    params = {"encoder": models.msgfm's}; teacher = memory = {}. With distillation params has "projector" {"kernel",
    "bias"} and teacher "encoder", the frozen network, whose weights run.init_from must put there.

    Args:
        cfg: the whole configuration.
        contract: the input contract.

    Returns:
        The objective.

    Raises:
        ValueError: the configuration contradicts itself.
    """
    model, o, names = msgfm.make_model(cfg.model, contract), cfg.objective, tuple(contract["sensors"])
    cell, side = int(o.mask_cell), int(cfg.model.img_size)
    if side % cell or cell % cfg.model.patch:
        raise ValueError(
            f"config.objective.mask_cell={cell} must divide model.img_size={side} and be a multiple of "
            f"model.patch={cfg.model.patch}"
        )
    if cfg.model.moe.stages and int(cfg.data.batch) % cfg.model.moe.group:
        raise ValueError(f"config.model.moe.group={cfg.model.moe.group} does not divide data.batch={cfg.data.batch}")
    bands = {name: len(rule["bands"]) for name, rule in contract["sensors"].items()}
    targets = {name: tuple(target for target in (name, SENSORS[name].pair) if target in names) for name in names}
    teach = gfm.make_teacher(cfg, contract) if o.distill.weight else None
    scales = tuple(float(cfg.optim.lr_scale[name]) for name in names)

    def init(rng: Key, spec: Tree) -> tuple[Tree, Tree, Tree]:
        params = {"encoder": model.init(rng)}
        if teach is None:
            return params, {}, {}
        student, teacher = (jax.random.fold_in(rng, name_hash(name)) for name in ("projector", "teacher"))
        return {**params, "projector": gfm.projector(student, teach.width)}, {"encoder": teach.init(teacher)}, {}

    def embedding(name: str) -> Callable[..., FeatureMap]:
        def branch(params: Tree, images: Tree, mask: Mask) -> FeatureMap:
            return model.embed(params, name, normalised(contract, name, images)[0], mask)

        return branch

    def errors(name: str) -> Callable[..., jax.Array]:
        """[4]: summed error and pixels of the images that reconstruct themselves, then of those that their partner."""

        def target_sums(
            params: Tree, target: str, images: Tree, final: FeatureMap, mask: Mask
        ) -> tuple[Scalar, Scalar]:
            image, measured = normalised(contract, target, images)
            return masked_sums(model.decode(params, target, final), image, measured * mask[..., None])

        def branch(params: Tree, batch: Tree, final: FeatureMap, mask: Mask, crossing: Mask) -> jax.Array:
            sums = target_sums(params, name, batch["own"], final, mask * (1 - crossing)[:, None, None])
            across = (jnp.zeros(()), jnp.zeros(()))
            for pair in targets[name][1:]:
                across = target_sums(params, pair, batch["pair"], final, mask * crossing[:, None, None])
            return jnp.stack([*sums, *across]).astype(jnp.float32)

        return branch

    def loss(
        params: Tree, teacher: Tree, memory: Tree, batch: Tree, keys: Mapping[str, Key], schedule: Mapping[str, Scalar]
    ) -> tuple[Scalar, tuple[dict[str, Scalar], Tree]]:
        encoder, sensor = params["encoder"], batch["sensor"][0]
        size = batch["sensor"].shape[0]
        cells = random_cells(keys["mask"], size, side // cell, o.mask_ratio)
        crossing = jax.random.bernoulli(keys["cross"], o.cross, (size,)) * batch["paired"]
        outer = {name: weights for name, weights in encoder.items() if name != msgfm.ENCODER}
        tokens = jax.lax.switch(
            sensor, [embedding(name) for name in names], outer, batch["own"], pixel_mask(cells, cell // cfg.model.patch)
        )
        encoded = model.encode(encoder, tokens, train=True, rng=keys["encoder"])
        sums = jax.lax.switch(
            sensor, [errors(name) for name in names], outer, batch, encoded.final, pixel_mask(cells, cell), crossing
        )
        mim = (sums[0] + sums[2]) / (sums[1] + sums[3] + jnp.float32(1e-5))
        mixtures, metrics = moe_metrics(encoded.moe)
        total = mim + o.aux_weight * mixtures
        if teach is not None:
            cosine, known = teach.cosine(params["projector"], teacher["encoder"], encoded.merged, batch)
            total = total - o.distill.weight * cosine
            metrics["distill/cosine"] = jnp.where(known, cosine, jnp.nan)
        metrics |= {"loss/total": total, "loss/mim": mim, "cross/share": crossing.mean()}
        for number, name in enumerate(names):
            for position, target in enumerate(targets[name]):
                error, pixels = sums[2 * position], sums[2 * position + 1]
                reconstructed = (sensor == number) & (pixels > 0)
                metrics[f"loss/{name}-{target}"] = jnp.where(reconstructed, error / jnp.maximum(pixels, 1.0), jnp.nan)
        return total, (jax.lax.stop_gradient(metrics), {})

    def settle(
        params: Tree, teacher: Tree, memory: Tree, settle_inputs: Tree, schedule: Mapping[str, Scalar]
    ) -> tuple[Tree, Tree]:
        return teacher, memory

    def lr_scale(batch: Tree) -> Scalar:
        return jnp.asarray(scales, jnp.float32)[batch["sensor"][0]]

    def taking_part(batch: Tree, params: Tree) -> Tree:
        users: dict[str, Sequence[str]] = {msgfm.EMBED.format(name): (name,) for name in names}
        users |= {msgfm.DECODER.format(name): [user for user in names if name in targets[user]] for name in names}
        users["projector"] = (gfm.TAUGHT,)

        def trained(name: str, _: Any) -> Scalar:
            module = name.removeprefix("encoder/").split("/")[0]
            numbers = [names.index(user) for user in users.get(module, names)]
            return jnp.any(batch["sensor"][0] == jnp.array(numbers))

        return trees.map_named(trained, params)

    return Objective(
        init,
        loss,
        settle,
        sharding_rules(cfg, teach is not None),
        lambda spec: flops.msgfm_step(cfg, bands, targets),
        ("mask", "cross", "encoder"),
        (),
        lr_scale,
        taking_part,
    )


def moe_metrics(moe: Mapping[str, Mapping[str, jax.Array]]) -> tuple[Scalar, dict[str, Scalar]]:
    """(sum of the auxiliary losses, metrics) of what the mixtures of all stages report; (0, {}) of a dense encoder."""
    if not moe:
        return jnp.float32(0), {}
    stats = {key: jnp.concatenate([stage[key] for stage in moe.values()]) for key in ("aux", "load", "dropped")}
    load, aux = stats["load"], stats["aux"].sum()
    entropy = -jnp.sum(jnp.where(load > 0, load * jnp.log(jnp.maximum(load, 1e-30)), 0), -1) / jnp.log(load.shape[-1])
    return aux, {
        "moe/aux": aux,
        "moe/dropped": stats["dropped"].mean(),
        "moe/load_entropy": entropy.mean(),
        "moe/load_max": load.max(-1).mean(),
        **{
            f"moe/load/{mixture}-{expert}": share
            for mixture, shares in enumerate(load)
            for expert, share in enumerate(shares)
        },
    }


def sharding_rules(cfg: config_dict.ConfigDict, distils: bool) -> tuple[tuple[str, str], ...]:
    """Sharding rules over the joined tree {"params", "teacher", "memory"}.

    Args:
        cfg: the whole configuration.
        distils: whether there are a teacher and a projector.

    Returns:
        ((pattern, tactic), ...), tactics of core.sharding.
    """
    experts = r"params/encoder/encoder/.+/moe/fc[12](_bias)?"
    rules = [
        (r"(params|teacher)/encoder/(embed|decoder)_[^/]+/.+", "fsdp"),
        ("params/encoder/mask_token", "replicate"),
        (rf"(?!{experts}$)(params|teacher)/encoder/encoder/.+", "fsdp"),
    ]
    if cfg.model.moe.stages:
        rules.append((experts, "expert"))
    if distils:
        rules.append((r"params/projector/(kernel|bias)", "fsdp"))
    return tuple(rules)
