"""The SkySense model: any sensors, any dates, masks, scan, remat, precision, sizes, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skysense_jax import sensors
from skysense_jax.configs import skysense_full
from skysense_jax.convert.torch_export import count_parameters
from skysense_jax.models.inputs import normalise
from skysense_jax.models.skysense import cell_mask, make_model, param_shapes
from skysense_jax.nn.attention import drop_path
from skysense_jax.nn.fusion import Fusion
from skysense_jax.nn.position import calendar_rows
from skysense_jax.nn.swin import SwinBlock, SwinTransformerV2, stage_plan
from skysense_jax.nn.vit import TransformerLayer, TransformerStack
from skysense_jax.ops.unit import unit
from tests.helpers import tiny_model as tiny

CONTRACT = tiny.contract()


@pytest.fixture(scope="module")
def model():
    cfg = tiny.config()
    return jax.jit(make_model(cfg, CONTRACT).apply), tiny.params(cfg, CONTRACT)


def close(a, b, tol=2e-5):
    np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=tol, atol=tol)


def test_shapes(model):
    apply, params = model
    out = apply(params, tiny.inputs(CONTRACT))
    assert out["fused"].shape == (2, 4, 4, 8) and out["fused_mask"].shape == (2, 4, 4)
    shapes = {k: v.shape for k, v in out["maps"].items()}
    assert shapes == {"hr": (2, 1, 4, 4, 16), "s2": (2, 3, 4, 4, 16), "s1": (2, 2, 4, 4, 16)}
    assert [m.shape for m in out["hr_stages"]] == [(2, 1, 8, 8, 8), (2, 1, 4, 4, 16)]
    assert out["vit"]["s2"].shape == (2, 3, 2, 2, 8)


@pytest.mark.parametrize("present", [("s2",), ("hr",), ("s1", "hr")])
def test_an_absent_sensor_is_a_sensor_without_valid_pixels(model, present):
    apply, params = model
    inputs = tiny.inputs(CONTRACT)
    alone = apply(params, {name: inputs[name] for name in present})
    for name in set(inputs) - set(present):
        inputs[name]["valid"] = np.zeros_like(inputs[name]["valid"])
    masked = apply(params, inputs)
    close(alone["fused"], masked["fused"])
    assert not masked["mask"][next(iter(set(inputs) - set(present)))].any()


def test_padded_dates_change_nothing(model):
    apply, params = model
    inputs = tiny.inputs(CONTRACT)
    short = apply(params, inputs)
    for name in ("s2", "s1"):
        sensor = inputs[name]
        for key, filler in (("image", 1e4), ("valid", 0), ("bands", 0), ("dates", -1)):
            pad = np.full_like(sensor[key][:, :2], filler)
            sensor[key] = np.concatenate([sensor[key], pad], axis=1)
    padded = apply(params, inputs)
    close(short["fused"], padded["fused"])
    close(short["maps"]["s2"], padded["maps"]["s2"][:, :3])
    assert padded["mask"]["s2"][:, 3:].max() == 0


def test_invalid_pixels_carry_no_value_and_no_nan(model):
    _, params = model
    apply, inputs = jax.jit(make_model(tiny.config(), CONTRACT).apply), {"s2": tiny.inputs(CONTRACT)["s2"]}
    inputs["s2"]["valid"][0, 1, :2] = 0
    inputs["s2"]["bands"][1, 0, 2] = 0
    clean = apply(params, inputs)
    inputs["s2"]["image"][0, 1, :2] = np.nan
    inputs["s2"]["image"][1, 0, :, :, 2] = np.inf
    dirty = apply(params, inputs)
    np.testing.assert_array_equal(clean["fused"], dirty["fused"])
    assert dirty["mask"]["s2"][0, 1].sum() == 8

    def loss(p):
        return jnp.sum(apply(p, inputs)["fused"] ** 2)

    assert all(np.isfinite(g).all() for g in jax.tree.leaves(jax.jit(jax.grad(loss))(params)))


def test_calendar_modes():
    cfg = tiny.config()
    params, inputs = tiny.params(cfg, CONTRACT), tiny.inputs(CONTRACT)
    inputs = {name: inputs[name] for name in ("s2", "s1")}
    fused = {}
    for mode in ("dated", "s2", "none"):
        changed = tiny.config(calendar=mode)
        assert ("ctpe" in param_shapes(changed, CONTRACT)) == (mode != "none")
        fused[mode] = jax.jit(make_model(changed, CONTRACT).apply)(params, inputs)["fused"]
    assert np.abs(fused["dated"] - fused["s2"]).max() > 1e-3 and np.abs(fused["s2"] - fused["none"]).max() > 1e-3
    inputs["s1"]["dates"][:] = -1  # an unknown date adds nothing
    close(jax.jit(make_model(cfg, CONTRACT).apply)(params, inputs)["fused"], fused["s2"])
    table = jnp.arange(365.0)[None, :, None]
    assert calendar_rows(table, jnp.array([0, 364, 365, -1]))[:, 0].tolist() == [0, 364, 364, 0]


def random_like(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: (0.5 * rng.standard_normal(s.shape)).astype(np.float32), shapes)


def test_fusion_order_masks_and_chunks():
    module = Fusion(8, 2, 2)
    x = np.random.default_rng(0).standard_normal((6, 5, 12)).astype(np.float32)
    params = random_like(jax.eval_shape(module.init, jax.random.key(0), x)["params"])

    def run(x, mask=None):
        return np.asarray(module.apply({"params": params}, x, mask)[0])

    plain = run(x)
    np.testing.assert_array_equal(plain, run(x, jnp.ones((6, 5), bool)))
    close(run(x[:, ::-1])[:, 0], plain[:, 0])
    mask = jnp.arange(5)[None] < jnp.array([5, 4, 3, 2, 1, 0])[:, None]
    masked = run(x, mask)
    close(masked[3, 0], run(x[3:4, :2])[0, 0])
    close(masked[5, 0], run(x[5:6, :0])[0, 0])
    close(np.concatenate([run(x[:4], mask[:4]), run(x[4:], mask[4:])]), masked)


@pytest.mark.parametrize("depth, remat", [(3, False), (3, True), (1, False)])
def test_the_token_alone_is_the_first_of_all_tokens(depth, remat):
    module = Fusion(8, depth, 2, remat=remat)
    x = np.random.default_rng(0).standard_normal((6, 5, 12)).astype(np.float32)
    mask = jnp.arange(5)[None] < jnp.array([5, 4, 3, 2, 1, 0])[:, None]
    params = random_like(jax.eval_shape(module.init, jax.random.key(0), x)["params"])

    def total(params, alone):
        tokens, _ = module.apply({"params": params}, x, mask, token_only=alone)
        assert tokens.shape == (6, 1 if alone else 6, 8)
        return jnp.sum(tokens[:, 0] ** 2), tokens[:, 0]

    (_, token), grads = jax.value_and_grad(total, has_aux=True)(params, True)
    (_, first), whole = jax.value_and_grad(total, has_aux=True)(params, False)
    close(token, first)
    jax.tree.map(close, grads, whole)


def test_the_token_alone_has_stochastic_depth_in_every_layer():
    module = Fusion(8, 2, 2, drop=0.999)
    x = np.random.default_rng(0).standard_normal((64, 3, 12)).astype(np.float32)
    params = random_like(jax.eval_shape(module.init, jax.random.key(0), x)["params"])

    def run(**how):
        return module.apply({"params": params}, x, token_only=True, **how)[0]

    dropped = run(train=True, rngs={"drop_path": jax.random.key(1)})
    assert np.abs(dropped - run()).max() > 0.1
    np.testing.assert_array_equal(dropped, run(train=True, rngs={"drop_path": jax.random.key(1)}))


def layer_of(stacked, i):
    """Parameters of layer `i` of those that a scan runs over."""
    return jax.tree.map(lambda leaf: leaf[i], stacked)


def test_scan_is_the_layers_one_after_the_other():
    x = np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)
    stack = TransformerStack(3, 2)
    params = random_like(jax.eval_shape(stack.init, jax.random.key(0), x)["params"])
    scanned, every = stack.apply({"params": params}, x, emit=True)
    h = x
    for i in range(3):
        h, _ = TransformerLayer(2).apply({"params": layer_of(params["layers"], i)}, h, 0.0, None)
        close(h, every[i])
    close(h, scanned)


def test_swin_scan_is_the_blocks_one_after_the_other():
    swin = SwinTransformerV2(4, 1, (5,), (1,), (2,), (0,), outputs=(0,))
    x = np.random.default_rng(0).standard_normal((1, 6, 6, 4)).astype(np.float32)
    params = random_like(jax.eval_shape(swin.init, jax.random.key(0), x)["params"])
    (out,) = swin.apply({"params": params}, x)
    stage = params["stage0"]
    blocks = [layer_of(stage["pairs0"][half], i) for i in range(2) for half in ("plain", "shifted")]
    identity = {"patch_embed": params["patch_embed"], "patch_norm": params["patch_norm"], "norm0": params["norm0"]}
    h = SwinTransformerV2(4, 1, (0,), (1,), (2,), (0,), outputs=()).apply({"params": identity}, x)
    assert h == ()
    h = x @ identity["patch_embed"]["kernel"][0, 0] + identity["patch_embed"]["bias"]
    h = norm(h, identity["patch_norm"])
    for i, block in enumerate([*blocks, stage["block4"]]):
        h = SwinBlock(1, 2, bool(i % 2)).apply({"params": block}, h)
    close(norm(h, identity["norm0"]), out, 1e-4)


def norm(x, p):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(np.var(x, -1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


@pytest.mark.parametrize(
    "depth, every, plan",
    [
        (2, 0, [("pairs", 0, 1)]),
        (5, 0, [("pairs", 0, 2), ("block", 4, 1)]),
        (18, 6, [("pairs", 0, 3), ("norm", 5, 1), ("pairs", 6, 3), ("norm", 11, 1), ("pairs", 12, 3), ("norm", 17, 1)]),
        (5, 3, [("pairs", 0, 1), ("block", 2, 1), ("norm", 2, 1), ("block", 3, 1), ("block", 4, 1)]),
        (2, 1, [("block", 0, 1), ("norm", 0, 1), ("block", 1, 1), ("norm", 1, 1)]),
        (1, 6, [("block", 0, 1)]),
    ],
)
def test_stage_plan(depth, every, plan):
    assert stage_plan(depth, every) == plan


def test_remat_gives_the_same_gradients():
    x = np.random.default_rng(0).standard_normal((2, 4, 4, 4)).astype(np.float32)

    def gradient(module, params, inputs):
        def loss(p):
            out = module.apply({"params": p}, inputs, train=True, rngs={"drop_path": jax.random.key(3)})[0]
            return jnp.sum(out**2)

        return jax.jit(jax.grad(loss))(params)

    for make, inputs in (
        (functools.partial(SwinTransformerV2, 4, 1, (3,), (1,), (2,), (0,), drop=0.2, outputs=(0,)), x),
        (functools.partial(TransformerStack, 2, 2, drop=0.2), x.reshape(2, 16, 4)),
    ):
        params = random_like(jax.eval_shape(make(remat=False).init, jax.random.key(0), inputs)["params"])
        plain, again = (gradient(make(remat=remat), params, inputs) for remat in (False, True))
        jax.tree.map(lambda a, b: close(a, b, 1e-3), plain, again)


def test_bfloat16_computes_near_float32(model):
    apply, params = model
    inputs = tiny.inputs(CONTRACT)
    out = jax.jit(make_model(tiny.config(dtype="bfloat16"), CONTRACT).apply)(params, inputs)
    assert out["fused"].dtype == jnp.bfloat16 and all(x.dtype == np.float32 for x in jax.tree.leaves(params))
    reference = np.asarray(apply(params, inputs)["fused"])
    assert np.linalg.norm(np.asarray(out["fused"], np.float32) - reference) < 0.1 * np.linalg.norm(reference)


def test_stochastic_depth():
    x = jnp.ones((4000, 2, 3))
    kept = np.asarray(drop_path(x, 0.25, jax.random.key(0)))
    assert set(np.unique(kept.astype(np.float32))) == {np.float32(0), np.float32(1 / 0.75)}
    assert abs(kept.mean() - 1) < 0.05 and (kept == kept[:, :1, :1]).all()
    np.testing.assert_array_equal(drop_path(x, 0.25, None), x)
    image = np.random.default_rng(0).standard_normal((64, 2, 2, 4)).astype(np.float32)
    for before, expected in ((True, True), (False, False)):
        block = SwinBlock(1, 2, False, before_norm=before, stochastic=True)
        params = random_like(
            jax.eval_shape(block.init, {"params": jax.random.key(0), "drop_path": jax.random.key(0)}, image)["params"]
        )
        params["norm2"] = jax.tree.map(np.zeros_like, params["norm2"])
        out = np.asarray(block.apply({"params": params}, image, 0.5, rngs={"drop_path": jax.random.key(1)})) - image
        gone = np.all(np.abs(out) < 1e-6, axis=(1, 2, 3))
        only_bias = np.all(np.abs(out - params["norm1"]["bias"]) < 1e-5, axis=(1, 2, 3))
        assert only_bias.any() == expected and gone.any() == (not expected)


def test_training_without_stochastic_depth_is_evaluation(model):
    cfg = tiny.config()
    for part in ("hr", "s2", "s1", "fusion"):
        cfg[part].drop_path = 0.0
    apply, params = model
    inputs = tiny.inputs(CONTRACT)
    run = jax.jit(lambda p, x: make_model(cfg, CONTRACT).apply(p, x, train=True))
    close(run(params, inputs)["fused"], apply(params, inputs)["fused"])


def test_zero_vectors_have_no_gradient():
    x = jnp.array([[0.0, 0.0], [3.0, 4.0]])
    close(unit(x, "zero"), [[0, 0], [0.6, 0.8]])
    gradient = jax.grad(lambda x: jnp.sum(unit(x, "zero") * jnp.array([[1.0, 1.0], [1.0, 0.0]])))(x)
    close(gradient, [[0, 0], [0.128, -0.096]])


@pytest.mark.parametrize("branch_scale", [0.0, 1.0])
def test_invalid_regions_do_not_blow_up_the_first_gradients(branch_scale):
    """Half of the image is 0, as pixels without data are after normalisation; the loss looks at the other half."""
    model = SwinTransformerV2(
        16, 4, (2, 2, 2), (1, 2, 4), (4, 4, 4), (0, 0, 0), outputs=(2,), branch_scale=branch_scale
    )
    rng = np.random.default_rng(0)
    image = rng.standard_normal((1, 128, 128, 3)).astype(np.float32)
    target = rng.standard_normal((1, 4, 8, 64)).astype(np.float32)
    params = jax.jit(model.init)(jax.random.key(0), image)

    @jax.jit
    def norm(image):
        grads = jax.grad(lambda params: jnp.sum(model.apply(params, image)[0][:, 4:] * target))(params)
        return jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(grads)))

    whole = norm(image)
    image[:, :60] = 0
    assert norm(image) < 3 * whole


def test_a_cell_counts_from_half_of_its_pixels_on():
    valid = np.zeros((1, 1, 2, 6), np.float32)
    valid[0, 0, 0, :3] = 1
    assert cell_mask(valid, (1, 3))[0, 0].tolist() == [[1.0, 0.0, 0.0]]


def test_full_size_parameter_counts():
    cfg = skysense_full.get_config()
    counts = count_parameters(param_shapes(cfg.model, sensors.input_contract(cfg.data.bands, cfg.model.ratio)))
    assert counts["hr"] == 655_079_632 and counts["s2"] == 302_738_432 and counts["s1"] == 302_607_360
    assert counts["head_s2"] == counts["head_s1"] == 46_182_400
    assert counts["fusion"] == 305_195_008 and counts["ctpe"] == 1_027_840


def test_what_the_model_refuses(model):
    apply = make_model(tiny.config(), CONTRACT).apply
    _, params = model
    inputs = tiny.inputs(CONTRACT)
    with pytest.raises(ValueError, match="at least one"):
        apply(params, {})
    with pytest.raises(ValueError, match="takes no 'dsm'"):
        apply(params, {"dsm": inputs["hr"]})
    with pytest.raises(ValueError, match="s2: image must be .* with bands"):
        apply(params, {"s2": {**inputs["s2"], "image": inputs["s2"]["image"][..., :2]}})
    with pytest.raises(ValueError, match="s1: dates must have shape"):
        apply(params, {"s1": {**inputs["s1"], "dates": inputs["s1"]["dates"][:, :1]}})
    with pytest.raises(ValueError, match="same grid of cells"):
        apply(params, {"s2": inputs["s2"], "s1": tiny.inputs(CONTRACT, cells=6)["s1"]})
    with pytest.raises(ValueError, match="smaller than the window"):
        apply(params, {"hr": tiny.inputs(CONTRACT, cells=2)["hr"]})
    with pytest.raises(ValueError, match="model.width 20"):
        make_model(tiny.config(width=20), CONTRACT)
    with pytest.raises(ValueError, match="calendar"):
        make_model(tiny.config(calendar="moon"), CONTRACT)
    with pytest.raises(ValueError, match="ratio"):
        make_model(tiny.config(), tiny.contract(ratio=8))
    with pytest.raises(ValueError, match="encodes"):
        make_model(tiny.config(), tiny.contract({"dsm": ("height",)}))


def test_heights_are_seen_above_the_median_of_each_image():
    rule = sensors.input_contract({"dsm": ("height",)}, 2)["sensors"]["dsm"]
    draw = np.random.default_rng(0)
    image = draw.normal(300, 20, (2, 2, 6, 5, 1)).astype(np.float32)
    valid = (draw.random((2, 2, 6, 5)) < 0.7).astype(np.float32)
    valid[1, 1] = 0
    given = {"image": image, "valid": valid, "bands": np.ones((2, 2, 1), np.float32)}
    seen, mask = normalise(given, rule)
    for at in np.ndindex(2, 2):
        use = valid[at] > 0
        middle = np.percentile(image[at][use], 50, method="lower") if use.any() else 0
        np.testing.assert_allclose(
            seen[at], np.where(use[..., None], (image[at] - middle) / rule["std"][0], 0), rtol=1e-5, atol=1e-5
        )
    np.testing.assert_array_equal(mask, valid)
    hidden = np.where(valid[..., None] > 0, image + 512, -9999).astype(np.float32)
    close(normalise({**given, "image": hidden}, rule)[0], seen, 1e-4)
    assert "datum" not in sensors.input_contract({"hr": ("R", "G", "B")}, 2)["sensors"]["hr"]


def test_statistics_of_absolute_heights_are_refused():
    with pytest.raises(ValueError, match="'dsm': these statistics are of absolute heights.* data stats"):
        sensors.input_contract({"dsm": ("height",)}, 2, {"dsm": {"mean": [300.0], "std": [20.0], "source": "old"}})
