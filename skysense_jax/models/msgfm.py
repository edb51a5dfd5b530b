"""msGFM: one encoder for every sensor, each with its own patch embedding and its own decoder to pixels.

This file wires the model; objectives.msgfm trains it. The model was never released. Its parts follow the code it is
built on (SimMIM and GFM, models/simmim.py and swin_transformer.py): Swin-V1, a mask token in place of hidden patches, a
linear decoder with pixel shuffle.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from ml_collections import config_dict

from skysense_jax.core.rngs import name_hash
from skysense_jax.core.shapes import FeatureMap, Image, Key, Mask
from skysense_jax.nn.attention import layer_norm, trunc_normal
from skysense_jax.nn.heads import UPHead
from skysense_jax.nn.patch import PatchEmbed, conv_bias, torch_linear
from skysense_jax.nn.swin_v1 import Encoded, SwinTransformerV1
from skysense_jax.sensors import Contract, sensor_rule

ENCODER, MASK_TOKEN, EMBED, DECODER = "encoder", "mask_token", "embed_{}", "decoder_{}"
"""Top-level parameters; the last two once per sensor."""

Params = dict[str, Any]


class Model(NamedTuple):
    """The functions of a model, see :func:`make_model`."""

    init: Callable[[Key], Params]
    embed: Callable[..., FeatureMap]
    encode: Callable[..., Encoded]
    decode: Callable[[Params, str, FeatureMap], Image]


class NormedPatches(nn.Module):
    """Patch embedding, then LayerNorm."""

    width: int
    patch: int
    eps: float = 1e-5
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Image) -> FeatureMap:
        """[B, H, W, C] -> [B, ceil(H/patch), ceil(W/patch), width]."""
        x = PatchEmbed(self.width, self.patch, self.dtype, torch_linear, name="proj")(x)
        return layer_norm(self.eps, "norm")(x).astype(self.dtype)


def stage_windows(cfg: config_dict.ConfigDict) -> tuple[int, ...]:
    """The window of each stage's bias table, of config.model.

    It is model.window, or the side of the stage's whole map where that is smaller at model.img_size.
    """
    grids = [cfg.img_size // (cfg.patch * 2**stage) for stage in range(len(cfg.depths))]
    return tuple(min(cfg.window, grid) for grid in grids)


def stride(cfg: config_dict.ConfigDict) -> int:
    """Pixels along one cell of the encoder's last map."""
    return cfg.patch * 2 ** (len(cfg.depths) - 1)


def make_model(cfg: config_dict.ConfigDict, contract: Contract) -> Model:
    """A msGFM model for the sensors of an input contract.

    init(rng) -> params
        "encoder", "mask_token" [1, 1, width], and for each sensor "embed_<sensor>" and "decoder_<sensor>"; float32.
    embed(params, sensor, image, mask=None) -> tokens [B, h, w, width], h = ceil(H / patch)
        image: normalised, [B, H, W, bands of the sensor]. mask: [B, h, w], nonzero = hidden: the token is replaced by
        the mask token. Raises ValueError for an image whose bands are not the contract's.
    encode(params, tokens, *, train=False, rng=None) -> nn.swin_v1.Encoded
        tokens: of any sensor, or sums of those of several. rng: needed with train=True where drop_path is positive or
        the gates have noise.
    decode(params, sensor, final) -> normalised pixels of the sensor [B, h_4 * stride, w_4 * stride, bands]
        final: the last map of `encode`.

    Args:
        cfg: config.model.
        contract: the input contract.

    Returns:
        The four functions.

    Raises:
        ValueError: fields contradict each other.
    """
    sensors = contract["sensors"]
    if len(cfg.num_heads) != len(cfg.depths):
        raise ValueError(f"model.num_heads has {len(cfg.num_heads)} values for {len(cfg.depths)} stages")
    if cfg.img_size % stride(cfg):
        raise ValueError(f"model.img_size {cfg.img_size} is not a multiple of the encoder's stride {stride(cfg)}")
    moe = cfg.moe.to_dict()
    moe_stages = tuple(moe.pop("stages"))
    if wrong := [stage for stage in moe_stages if stage not in range(len(cfg.depths)) or cfg.depths[stage] < 2]:
        raise ValueError(
            f"model.moe.stages has {wrong}: depths {tuple(cfg.depths)} have no odd block there (stages count from 0)"
        )
    dtype = jnp.dtype(cfg.dtype)
    patches = NormedPatches(cfg.embed_dims, cfg.patch, cfg.eps, dtype)
    encoder = SwinTransformerV1(
        tuple(cfg.depths),
        tuple(cfg.num_heads),
        stage_windows(cfg),
        moe_stages,
        moe,
        mlp_ratio=cfg.mlp_ratio,
        drop=cfg.drop_path,
        eps=cfg.eps,
        remat=cfg.remat,
        dtype=dtype,
    )
    width = cfg.embed_dims * 2 ** (len(cfg.depths) - 1)
    decoders = {
        name: UPHead(len(rule["bands"]), stride(cfg), dtype, torch_linear, conv_bias(width))
        for name, rule in sensors.items()
    }

    def init(rng: Key) -> Params:
        def key(name: str) -> Key:
            return jax.random.fold_in(rng, name_hash(name))

        side = cfg.img_size // cfg.patch
        params: Params = {
            ENCODER: encoder.init(key(ENCODER), jnp.zeros((1, side, side, cfg.embed_dims)))["params"],
            MASK_TOKEN: trunc_normal(key(MASK_TOKEN), (1, 1, cfg.embed_dims), jnp.float32),
        }
        for sensor, rule in sensors.items():
            embed, decoder = EMBED.format(sensor), DECODER.format(sensor)
            image = jnp.zeros((1, cfg.patch, cfg.patch, len(rule["bands"])))
            params[embed] = patches.init(key(embed), image)["params"]
            params[decoder] = decoders[sensor].init(key(decoder), jnp.zeros((1, 1, 1, width)))["params"]
        return params

    def embed(params: Params, sensor: str, image: Image, mask: Mask | None = None) -> FeatureMap:
        bands = sensor_rule(contract, sensor)["bands"]
        if image.ndim != 4 or image.shape[-1] != len(bands):
            raise ValueError(f"{sensor}: image must be [B,H,W,{len(bands)}] with bands {bands}, got {image.shape}")
        tokens = cast(FeatureMap, patches.apply({"params": params[EMBED.format(sensor)]}, image))
        if mask is None:
            return tokens
        if mask.shape != tokens.shape[:3]:
            raise ValueError(f"{sensor}: the mask must be {tokens.shape[:3]}, one value per token, got {mask.shape}")
        return jnp.where(mask[..., None] != 0, params[MASK_TOKEN][0, 0].astype(tokens.dtype), tokens)

    def encode(params: Params, tokens: FeatureMap, *, train: bool = False, rng: Key | None = None) -> Encoded:
        rngs = {}
        if train and rng is not None:
            rngs = {stream: jax.random.fold_in(rng, name_hash(stream)) for stream in ("drop_path", "gate")}
        return cast(Encoded, encoder.apply({"params": params[ENCODER]}, tokens, train=train, rngs=rngs))

    def decode(params: Params, sensor: str, final: FeatureMap) -> Image:
        sensor_rule(contract, sensor)  # refuses a sensor that the model does not take
        return cast(Image, decoders[sensor].apply({"params": params[DECODER.format(sensor)]}, final))

    return Model(init, embed, encode, decode)


def module_names(cfg: config_dict.ConfigDict, contract: Contract) -> tuple[str, ...]:
    """Top-level parameters of a model in order.

    Args:
        cfg: config.model. With `modules`, of weights from a file that lacked some, only those count.
        contract: the input contract.

    Returns:
        Their names.
    """
    names = (ENCODER, MASK_TOKEN, *(kind.format(name) for kind in (EMBED, DECODER) for name in contract["sensors"]))
    return tuple(name for name in names if name in cfg.get("modules", names))


def param_shapes(cfg: config_dict.ConfigDict, contract: Contract) -> Params:
    """The parameter tree of a model; nothing is allocated.

    Args:
        cfg: config.model.
        contract: the input contract.

    Returns:
        A tree of ShapeDtypeStructs.
    """
    shapes = jax.eval_shape(make_model(cfg, contract).init, jax.random.key(0))
    return {name: shapes[name] for name in module_names(cfg, contract)}
