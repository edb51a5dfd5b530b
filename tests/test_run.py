"""What a run is made of: schedules, AdamW, decay by name, skipped updates, metrics, exit codes."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from skysense_jax import recipes, train
from skysense_jax.configs import skysense_smoke, skysense_tiny
from skysense_jax.core import mesh as meshes
from skysense_jax.core import trees
from skysense_jax.run import checkpoint, optim, step
from skysense_jax.run import plan as plans
from skysense_jax.run.folder import COMPLETE
from skysense_jax.run.log import metrics, profiler, records
from tests.helpers import noise_dataset, toy_objective
from tests.helpers.toy_objective import same, small_state

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> str:
    return noise_dataset.write_dataset(tmp_path_factory.mktemp("places"))


@pytest.fixture()
def cfg(dataset):
    return toy_objective.config(dataset)


@pytest.fixture()
def toys(monkeypatch):
    monkeypatch.setitem(recipes.RECIPES, "toy", toy_objective.recipe())


# ---------------------------------------------------------------- schedules and optimiser


def test_schedules_are_dino_s():
    c = skysense_smoke.get_config()
    s = c.schedule
    at = optim.make_schedule(s, c.steps, ("teacher_temp", "last_layer_frozen", "teacher_momentum"))
    values = {name: np.array([float(at(k)[name]) for k in range(c.steps)]) for name in at(0)}
    k = np.arange(c.steps)

    def cosine(first, last, t):
        return last + 0.5 * (first - last) * (1 + np.cos(np.pi * t))

    warm = s.warmup_lr + (s.lr - s.warmup_lr) * k / s.warmup_steps
    decay = cosine(s.lr, s.final_lr, (k - s.warmup_steps) / (c.steps - s.warmup_steps))
    np.testing.assert_allclose(values["lr"], np.where(k < s.warmup_steps, warm, decay), rtol=2e-5, atol=1e-9)
    for name, last in (("weight_decay", s.final_weight_decay), ("teacher_momentum", s.final_teacher_momentum)):
        np.testing.assert_allclose(values[name], cosine(s[name], last, k / c.steps), rtol=1e-5, err_msg=name)
    n = s.warmup_teacher_temp_steps
    rising = np.linspace(s.warmup_teacher_temp, s.teacher_temp, n)
    temps = np.concatenate([rising, np.full(c.steps - n, s.teacher_temp)])
    np.testing.assert_allclose(values["teacher_temp"], temps, rtol=1e-5)
    np.testing.assert_array_equal(values["last_layer_frozen"], k < s.freeze_last_layer_steps)


def test_teacher_temperature_is_the_reference_s():
    golden = np.load(GOLDEN / "dino_loss_sinkhorn.npz")["y_teacher_temps"]
    ours = [float(optim.teacher_temperature(k, 10, 0.04, 0.07)) for k in range(len(golden))]
    np.testing.assert_allclose(ours, golden, rtol=1e-6)


def test_unknown_schedules_are_errors():
    c = skysense_smoke.get_config()
    with pytest.raises(ValueError, match="student_temp"):
        optim.make_schedule(c.schedule, c.steps, ("student_temp",))
    c.schedule.rule = "step"
    with pytest.raises(ValueError, match="config.schedule.rule"):
        optim.make_schedule(c.schedule, c.steps, ())


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("rule", ["gfm_cosine", "pp_cos", "pp_linear", "const"])
def test_adamw_and_learning_rates_are_torch_s(rule, double):
    """torch.optim.AdamW, clip_grad_norm_ and the schedulers of GFM and SkySense++ on a quadratic (parity case
    adamw_schedules).
    """
    z = np.load(GOLDEN / "adamw_schedules.npz")
    m = json.loads(str(z["meta_json"]))
    rates = {
        "gfm_cosine": lambda k: optim.lr_gfm(
            k, optim.Rates(m["steps"], m["warmup_steps"], m["lr"], m["warmup_lr"], m["min_lr"])
        ),
        "pp_cos": lambda k: optim.lr_cosine(k, optim.Rates(m["steps"], m["warmup_steps"], m["lr"], 0.0, 0.0)),
        "pp_linear": lambda k: optim.lr_linear(k, optim.Rates(m["steps"], m["warmup_steps"], m["lr"], 0.0, 0.0)),
        "const": lambda k: jnp.asarray(m["lr"]),
    }
    settings = type("Settings", (), {"b1": m["betas"][0], "b2": m["betas"][1], "eps": m["eps"]})
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", double)
    try:
        dtype = jnp.result_type(float)
        H, target, p, b = (jnp.asarray(z[f"x64_{name}"], dtype) for name in ("H", "target", "p0", "b0"))

        def loss(params):
            d = params["p"] - target
            return 0.5 * d @ H @ d + jnp.sum(params["b"] ** 2) + 0.1 * d.sum() * params["b"].sum()

        params, opt = {"p": p, "b": b}, optim.init({"p": p, "b": b})
        got = {name: [] for name in ("lr", "gnorm", "p", "b", "m", "v", "loss")}
        for k in range(m["steps"]):
            value, grads = jax.value_and_grad(loss)(params)
            grads, norm = optim.clip(grads, m["clip"])
            lr = rates[rule](k)
            params, opt = optim.update(grads, opt, params, {"p": True, "b": False}, lr, m["weight_decay"], settings)
            for name, x in zip(
                got, (lr, norm, params["p"], params["b"], opt["mu"]["p"], opt["nu"]["p"], value), strict=True
            ):
                got[name].append(np.asarray(x, np.float64))
        tolerance = m["tol"]["float64_rel" if double else "float32_rel"]
        for name, values in got.items():
            wanted = z[f"y64_{rule}_{name}"]
            error = np.linalg.norm(np.array(values) - wanted) / max(np.linalg.norm(wanted), 1e-30)
            assert error <= tolerance, (name, error)
    finally:
        jax.config.update("jax_enable_x64", before)


def test_decay_goes_by_name():
    shape = jnp.zeros((2, 3))  # stacked blocks: a bias has two dimensions and still does not decay
    params = trees.nest(
        {
            name: shape
            for name in (
                "encoder/hr/stage0/pairs0/plain/attn/qkv/kernel",
                "encoder/hr/stage0/pairs0/plain/attn/q_bias",
                "encoder/hr/stage0/pairs0/plain/attn/cpb1/kernel",
                "encoder/hr/stage0/pairs0/plain/attn/logit_scale",
                "encoder/s2/blocks/layers/fc1/bias",
                "encoder/s2/blocks/layers/ln1/scale",
                "encoder/s2/cls_token",
                "encoder/s2/pos_embed",
                "encoder/ctpe",
                "heads/s2/last_layer_v",
                "align/s2/kernel",
            )
        }
    )
    decayed = {name for name, on in trees.flatten(optim.decay_mask(params)).items() if on}
    assert decayed == {"encoder/hr/stage0/pairs0/plain/attn/qkv/kernel", "heads/s2/last_layer_v", "align/s2/kernel"}
    with pytest.raises(ValueError, match="weight decay rules: no rule matches: encoder/surprise"):
        optim.decay_mask({"encoder": {"surprise": shape}})


@pytest.mark.parametrize("config", [skysense_smoke, skysense_tiny])
def test_every_parameter_and_every_leaf_of_the_model_has_its_rule(config):
    c = config.get_config()
    made = meshes.make_mesh({"data": 1, "fsdp": 1}, jax.devices()[:1])
    plan = plans.make_plan(c, plans.make_contract(c), made)
    mask = trees.flatten(optim.decay_mask(plan.state.params))
    assert any(mask.values()) and not all(mask.values())
    wrong = [name for name, on in mask.items() if on and name.split("/")[-1] not in ("kernel", "last_layer_v")]
    assert not wrong and not [name for name, on in mask.items() if on and "cpb" in name]


# ---------------------------------------------------------------- one step


def test_a_step_that_is_not_finite_touches_nothing(cfg):
    objective, batch_shapes, shapes, now = small_state(cfg)
    advance = jax.jit(step.make_step(objective, cfg, optim.decay_mask(shapes.params)))
    rng = np.random.default_rng(0)
    batch = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), batch_shapes)
    first, measured = advance(now, batch)
    assert measured["finite"] == 1 and same(first.params, now.params)  # the first learning rate is 0
    second, _ = advance(first, batch)
    assert not same(second.params, first.params) and not same(second.memory, first.memory)

    batch["global"]["sensors"]["s2"]["image"][0, 0, 0, 0, 0, 0] = np.nan
    third, measured = advance(second, batch)
    for name in ("params", "opt", "teacher", "memory"):
        assert same(getattr(third, name), getattr(second, name)), name
    assert (int(third.step), int(third.skipped), float(measured["finite"])) == (3, 1, 0.0)
    assert metrics.plain(measured)["loss"] == "nan"


def test_the_batch_must_divide_by_the_devices(cfg):
    cfg.data.batch = 6
    with pytest.raises(ValueError, match="config.data.batch=6 does not divide by the 8 devices"):
        small_state(cfg)


# ---------------------------------------------------------------- metrics


def test_records_past_the_checkpoint_and_torn_lines_are_dropped(tmp_path):
    file = tmp_path / metrics.FILE
    file.write_text("".join(json.dumps({"step": n}) + "\n" for n in (1, 2, 3, 4)) + '{"step": 5, "lo')
    assert records.truncate(file, 2) == 3
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2]
    assert records.truncate(tmp_path / "none", 2) == 0


# ---------------------------------------------------------------- the command


def go(cfg, workdir) -> int:
    return train.train(train.Options(cfg, workdir))


def test_a_run_ends_once_and_says_so(cfg, toys, tmp_path, capfd):
    assert go(cfg, tmp_path) == 0
    lines = [json.loads(line) for line in (tmp_path / metrics.FILE).read_text().splitlines()]
    assert [r["step"] for r in lines] == [1, 2, 3, 4, 5, 6]
    assert checkpoint.steps(tmp_path / "checkpoints") == [4, 6]
    assert {"config.json", "contract.json", "element_spec.json", "sharding.json", "versions.json", COMPLETE} <= {
        p.name for p in tmp_path.iterdir()
    }
    said = capfd.readouterr().err
    assert all(word in said for word in ("compiled in", "model FLOPs", "replicated", "input wait", "ETA"))
    assert "MFU" not in said  # no peak is known for this device
    before = (tmp_path / metrics.FILE).read_bytes()
    assert go(cfg, tmp_path) == 0
    assert "nothing to do" in capfd.readouterr().err and (tmp_path / metrics.FILE).read_bytes() == before
    cfg.schedule.lr = 1.0
    with pytest.raises(ValueError, match=r"config.schedule.lr was [0-9e.-]+, is 1.0. Use another --workdir"):
        go(cfg, tmp_path)


def test_too_many_skipped_updates_end_the_run_with_65(cfg, monkeypatch, tmp_path, capfd):
    monkeypatch.setitem(recipes.RECIPES, "toy", toy_objective.recipe(broken=True))
    cfg.run.max_skipped = 2
    assert go(cfg, tmp_path) == 65
    lines = [json.loads(line) for line in (tmp_path / metrics.FILE).read_text().splitlines()]
    assert [r["skipped"] for r in lines][:3] == [1, 2, 3] and lines[0]["loss"] == "nan"
    assert "3 updates were not finite, config.run.max_skipped is 2" in capfd.readouterr().err


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--config.optim.nope=3"], "nope"),
        (["--config.optim.clip=much"], "much"),
        (["--nope=3"], "nope"),
        (["--config.data.dir=/nowhere"], "/nowhere is not a dataset of places"),
        (["--config.data.statistics=mine"], "config.data.statistics='mine'"),
        (["--config.data.statistics=dataset"], "skysense-jax data stats"),
        (["--config.model.name=vgg"], "config.model.name='vgg'"),
        (["--config.mesh.fsdp=3"], "mesh"),
        (["--config.data.batch=6"], "does not divide by the 8 devices"),
        (["--profile=5:3"], "FIRST < LAST"),
    ],
)
def test_a_bad_configuration_is_78_and_one_line(arguments, said, dataset, tmp_path, capfd):
    config = pathlib.Path(__file__).parents[1] / "configs" / "skysense_tiny.py"
    base = ["--config", f"{config}:series", "--workdir", str(tmp_path / "run"), f"--config.data.dir={dataset}"]
    assert train.main([*base, *arguments]) == 78
    error = capfd.readouterr().err.strip()
    assert error.startswith("skysense-jax train: ") and said in error, error


def test_a_profiler_window_traces_its_steps_and_no_others(tmp_path):
    for wrong in ("4:2", "2:2", "3", "a:b", "-1:2"):
        with pytest.raises(ValueError, match="FIRST < LAST"):
            profiler.Window(wrong, tmp_path, 9)
    with pytest.raises(ValueError, match="the run has 9 steps"):
        profiler.Window("9:12", tmp_path, 9)

    def traced(text: str, begin: int, end: int) -> list[int]:
        """Numbers of done steps at whose next step a trace runs."""
        window, found = profiler.Window(text, tmp_path, 9), []
        for done in range(begin, end):
            window.before_step(done, jnp.ones(()))
            if running():
                found.append(done)
        window.close()
        assert not running()
        return found

    def running() -> bool:
        try:
            jax.profiler.start_trace(str(tmp_path / "probe"))
        except RuntimeError:  # one at a time
            return True
        jax.profiler.stop_trace()
        return False

    assert traced("", 0, 3) == [] and traced("2:4", 4, 6) == [], "no window; one that is over"
    assert not (tmp_path / profiler.FOLDER).exists()
    assert traced("2:4", 0, 6) == [2, 3]
    assert list((tmp_path / profiler.FOLDER).rglob("*.xplane.pb"))


def test_a_hung_step_is_70_with_the_stacks(tmp_path):
    code = (
        "import pathlib, sys, time; from skysense_jax.run.watchdog import Watchdog\n"
        "def stuck_here(): time.sleep(60)\n"
        "with Watchdog(0.3, pathlib.Path(sys.argv[1])) as dog: dog.beat(); stuck_here()"
    )
    stacks = tmp_path / "stacks.txt"
    done = subprocess.run(
        [sys.executable, "-c", code, str(stacks)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 70
    assert "stuck_here" in stacks.read_text() and "stuck_here" in done.stderr and "watchdog_s=0.3" in done.stderr


def test_clipping_is_torch_s():
    grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    clipped, norm = optim.clip(grads, 1.0)
    assert float(norm) == 5.0 and float(optax.tree.norm(clipped)) == pytest.approx(1 / (1 + 2e-7), rel=1e-6)
    assert same(optim.clip(grads, 10.0)[0], grads)
