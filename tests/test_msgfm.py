"""msGFM: full-size parameter counts, shapes, masks, windows, precision, its loss, and what it refuses.

Exactness against the reference code: test_parity.py. PyTorch files: test_msgfm_import.py, test_msgfm_export.py.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skysense_jax import cli, recipes, sensors
from skysense_jax.configs import msgfm_base
from skysense_jax.models import msgfm
from skysense_jax.nn.swin_v1 import Block, position_bias
from skysense_jax.nn.windows import OTHER_REGION, relative_index, shift_regions
from skysense_jax.ops.masking import pixel_mask
from tests import resolved_configs
from tests.helpers.msgfm_model import CONTRACT, DENSE, config, random_params
from tests.parity.names import simmim_entries
from tests.parity.reference_forms import masked_l1

ROOT = pathlib.Path(__file__).parents[1]


def images(channels=3, side=16, batch=2, seed=1):
    return np.random.default_rng(seed).standard_normal((batch, side, side, channels)).astype(np.float32)


def close(a, b, tol=2e-5):
    np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=tol, atol=tol)


def size(tree):
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


# ---------------------------------------------------------------------------------------------------------- full size
@pytest.mark.parametrize("stages, expected", [((), 86_725_176), ((2,), 219_043_896), ((2, 3), 277_808_184)])
def test_full_size_parameter_counts(stages, expected):
    full = msgfm_base.get_config()
    full.model.moe.stages = stages
    shapes = msgfm.param_shapes(full.model, sensors.input_contract(full.data.bands, 32))
    assert size(shapes["encoder"]) + size(shapes["embed_hr"]) == expected
    assert {name: size(shapes[f"embed_{name}"]) for name in full.data.bands} == {
        "hr": 6528,
        "s2": 27_008,
        "s1": 4480,
        "dsm": 2432,
    }
    assert {name: size(shapes[f"decoder_{name}"]) for name in full.data.bands} == {
        "hr": 3_148_800,
        "s2": 13_644_800,
        "s1": 2_099_200,
        "dsm": 1_049_600,
    }
    if not stages:
        entries = simmim_entries(full.model, "hr")
        assert len([e for e in entries if e.torch.startswith("encoder.") and "mask_token" not in e.torch]) == 327


def test_inspect_prints_the_counts(capsys):
    assert cli.main(["inspect", "--config", str(ROOT / "configs" / "msgfm_base.py")]) == 0
    words = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["(2,)", "219,043,896"] in words and ["()", "dense", "86,725,176"] in words
    assert ["(2,", "3)", "277,808,184"] in words


@pytest.mark.parametrize("name", ["base", "smoke", "tiny"])
def test_a_configuration_takes_the_sensors_it_is_given(name):
    for given, wanted in (("", list(sensors.SENSORS)), ("s2,s1", ["s2", "s1"]), ("dsm", ["dsm"])):
        config = resolved_configs.load(f"msgfm_{name}", given)
        recipes.check_config(config)
        assert sorted(config.data.bands) == sorted(wanted)
    with pytest.raises(ValueError, match="unknown sensors .'sar'.: hr, s2, s1, dsm"):
        resolved_configs.load(f"msgfm_{name}", "s2,sar")


def test_full_size_shapes():
    full = msgfm_base.get_config()
    contract = sensors.input_contract(full.data.bands, 32)
    model, shapes = msgfm.make_model(full.model, contract), msgfm.param_shapes(full.model, contract)

    def run(params, image, rng):
        encoded = model.encode(params, model.embed(params, "s2", image), train=True, rng=rng)
        return encoded, model.decode(params, "s1", encoded.final)

    image = jax.ShapeDtypeStruct((32, 192, 192, 13), jnp.float32)
    encoded, pixels = jax.eval_shape(run, shapes, image, jax.random.key(0))
    assert [m.shape[1:] for m in encoded.stages] == [(48, 48, 128), (24, 24, 256), (12, 12, 512), (6, 6, 1024)]
    assert encoded.final.shape == (32, 6, 6, 1024) and pixels.shape == (32, 192, 192, 2)
    assert {k: v.shape for k, v in encoded.moe["stage2"].items()} == {"aux": (9,), "load": (9, 8), "dropped": (9,)}
    assert encoded.final.dtype == jnp.bfloat16 and encoded.moe["stage2"]["aux"].dtype == jnp.float32


# -------------------------------------------------------------------------------------------------------- small model
def test_embeddings_and_decoders_start_as_torch_starts_a_convolution():
    """Uniform within 1 / sqrt(fan in), kernel and bias (SimMIM's own initialisation leaves convolutions alone)."""
    params = jax.jit(msgfm.make_model(config(embed_dims=64), CONTRACT).init)(jax.random.key(0))
    for module, inputs in (("embed_s1", 2 * 2 * 2), ("decoder_hr", 128)):
        for leaf in (params[module]["proj"]["kernel"], params[module]["proj"]["bias"]):
            scaled = np.asarray(leaf) * inputs**0.5
            assert 0.9 < np.abs(scaled).max() <= 1.0 and abs(scaled.std() - 3**-0.5) < 0.1


def test_every_sensor_goes_through_one_encoder_to_any_decoder():
    cfg = config()
    model, params = msgfm.make_model(cfg, CONTRACT), random_params(cfg)
    assert set(params) == {"encoder", "mask_token", "embed_hr", "embed_s1", "decoder_hr", "decoder_s1"}
    final = jax.jit(lambda p, x: model.encode(p, model.embed(p, "s1", x)).final)(params, images(2))
    assert model.decode(params, "s1", final).shape == (2, 16, 16, 2)
    assert model.decode(params, "hr", final).shape == (2, 16, 16, 3)


def test_hidden_patches_are_the_mask_token_and_nothing_else():
    cfg = config(moe=DENSE)
    model, params = msgfm.make_model(cfg, CONTRACT), random_params(cfg)
    mask = np.random.default_rng(0).integers(0, 2, (2, 8, 8)).astype(np.int8)
    tokens = np.asarray(model.embed(params, "hr", images(), mask))
    np.testing.assert_array_equal(tokens[mask == 1], np.broadcast_to(params["mask_token"][0], (mask.sum(), 4)))
    np.testing.assert_array_equal(tokens[mask == 0], np.asarray(model.embed(params, "hr", images()))[mask == 0])
    other = images() + 100 * np.asarray(pixel_mask(mask, 2))[..., None]  # what is hidden cannot be seen
    np.testing.assert_array_equal(tokens, model.embed(params, "hr", other, mask))


def test_a_map_that_is_no_multiple_of_the_window_is_padded_with_zeros_that_are_seen():
    block = Block(1, 4, shifted=True, moe={})
    x = np.random.default_rng(0).standard_normal((1, 5, 8, 4)).astype(np.float32)
    params = jax.tree.map(
        lambda s: np.random.default_rng(1).standard_normal(s.shape).astype(np.float32),
        jax.eval_shape(lambda: block.init(jax.random.key(0), x))["params"],
    )
    zero_bias = params | {"norm1": {**params["norm1"], "bias": np.zeros(4, np.float32)}}
    padded = np.concatenate([x, np.zeros((1, 3, 8, 4), np.float32)], axis=1)  # LayerNorm of zeros without bias: zeros
    run = jax.jit(lambda x: block.apply({"params": zero_bias}, x)[0])
    close(run(x), run(padded)[:, :5])


def test_a_map_smaller_than_the_window_uses_the_middle_of_the_table():
    x = images(4, 2)
    large, small = Block(2, 4, shifted=True, moe={}), Block(2, 2, shifted=False, moe={})
    params = jax.tree.map(
        lambda s: np.random.default_rng(1).standard_normal(s.shape).astype(np.float32),
        jax.eval_shape(lambda: large.init(jax.random.key(0), x))["params"],
    )
    middle = params["attn"]["table"].reshape(7, 7, 2)[2:5, 2:5].reshape(9, 2)
    cropped = {**params, "attn": {**params["attn"], "table": middle}}
    close(large.apply({"params": params}, x)[0], small.apply({"params": cropped}, x)[0])
    close(position_bias(params["attn"]["table"], 2, 4), position_bias(middle, 2, 2))


def test_training_and_remat_give_the_same_gradients():
    fields = {"depths": (2,), "num_heads": (1,), "moe": {**config().moe, "stages": (0,)}, "drop_path": 0.3}
    params, tokens = random_params(config(**fields)), images(4, 8)

    def gradient(remat):
        model = msgfm.make_model(config(**fields, remat=remat), CONTRACT)

        def loss(p):
            out = model.encode(p, tokens, train=True, rng=jax.random.key(3))
            return jnp.sum(out.final**2) + jnp.sum(out.moe["stage0"]["aux"])

        return jax.jit(jax.grad(loss))(params)

    plain = gradient(False)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(plain))
    assert np.abs(plain["encoder"]["stage0"]["pairs0"]["shifted"]["moe"]["gate"]).max() > 0
    jax.tree.map(lambda a, b: close(a, b, 1e-3), plain, gradient(True))


def test_bfloat16_computes_near_float32():
    cfg = config(moe=DENSE, depths=(1,), num_heads=(1,))
    params = random_params(cfg)

    def run(cfg):
        model = msgfm.make_model(cfg, CONTRACT)

        def whole(p, x):
            return model.decode(p, "hr", model.encode(p, model.embed(p, "hr", x)).final)

        return jax.jit(whole)(params, images())

    reference, out = np.asarray(run(cfg)), run(config(moe=DENSE, depths=(1,), num_heads=(1,), dtype="bfloat16"))
    assert out.dtype == jnp.bfloat16
    assert np.linalg.norm(np.asarray(out, np.float32) - reference) < 0.1 * np.linalg.norm(reference)


# --------------------------------------------------------------------------------------------------------------- loss
def test_masked_l1_against_numpy():
    rng = np.random.default_rng(0)
    prediction, target = rng.standard_normal((2, 2, 8, 8, 3)).astype(np.float32)
    cells = rng.integers(0, 2, (2, 4, 4))
    pixels = np.kron(cells, np.ones((2, 2), int))
    np.testing.assert_array_equal(pixel_mask(cells, 2), pixels)
    error = np.abs(prediction - target, dtype=np.float64)[pixels == 1]
    close(masked_l1(prediction, target, pixels), error.sum() / (pixels.sum() + 1e-5) / 3, 1e-6)
    close(masked_l1(np.zeros_like(target), target, pixels), np.abs(target[pixels == 1]).mean(), 1e-6)
    nothing = jax.value_and_grad(masked_l1)(prediction, target, np.zeros_like(pixels))
    assert nothing[0] == 0 and not np.any(nothing[1])
    one = np.zeros((2, 8, 8), int)
    one[0, 0, 0] = 1
    ratio = masked_l1(prediction, target, one) * 3 / np.abs(prediction - target)[0, 0, 0].sum()
    close(ratio, 1 / 1.00001, 1e-6)  # the small term counts where little is masked


# ------------------------------------------------------------------------------------------------------------ buffers
def test_our_index_and_regions_are_the_reference_buffers():
    with np.load(ROOT / "tests" / "golden" / "gfm_simmim_img16_w4.npz") as case:
        index = {k: case[k] for k in case.files if k.endswith("relative_position_index")}
        (mask,) = [case[k] for k in case.files if k.endswith("attn_mask")]
    assert {v.shape for v in index.values()} == {(16, 16), (4, 4)}
    for value in index.values():
        np.testing.assert_array_equal(value, relative_index(round(len(value) ** 0.5)))
    regions = shift_regions(8, 8, 4, 2)
    np.testing.assert_array_equal(mask, np.where(regions[:, :, None] != regions[:, None], OTHER_REGION, 0))


# ------------------------------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"img_size": 18}, "model.img_size 18 is not a multiple of the encoder's stride 4"),
        ({"num_heads": (1, 2, 2)}, "model.num_heads has 3 values for 2 stages"),
        ({"moe": {"stages": (0,), "experts": 2}}, r"model.moe.stages has \[0\]: .*no odd block"),
        ({"moe": {"stages": (2,), "experts": 2}}, r"model.moe.stages has \[2\]"),
    ],
)
def test_fields_that_contradict_each_other(changes, message):
    with pytest.raises(ValueError, match=message):
        msgfm.make_model(config(**changes), CONTRACT)


def test_inputs_that_do_not_fit():
    cfg = config()
    model, params = msgfm.make_model(cfg, CONTRACT), random_params(cfg)
    with pytest.raises(ValueError, match="takes no 'dsm'"):
        model.embed(params, "dsm", images(1))
    with pytest.raises(ValueError, match=r"s1: image must be \[B,H,W,2\] with bands \['VV', 'VH'\]"):
        model.embed(params, "s1", images(3))
    with pytest.raises(ValueError, match=r"the mask must be \(2, 8, 8\)"):
        model.embed(params, "hr", images(), np.zeros((2, 16, 16)))
    with pytest.raises(ValueError, match="takes no 's2'"):
        model.decode(params, "s2", jnp.zeros((1, 2, 2, 8)))
    with pytest.raises(ValueError, match="3 images is no multiple of model.moe.group = 2"):
        jax.eval_shape(lambda t: model.encode(params, t, train=True, rng=jax.random.key(0)), jnp.zeros((3, 8, 8, 4)))
