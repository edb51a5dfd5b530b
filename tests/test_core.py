"""The ground floor: names and strict rules, shardings, meshes, random streams, compiler flags."""

import functools
import importlib.util
import inspect
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skysense_jax import recipes
from skysense_jax.configs import skysense_tiny
from skysense_jax.core import mesh, rngs, sharding, trees
from skysense_jax.core.hardware import xla_flags
from skysense_jax.models import systems
from tests import resolved_configs
from tests.helpers import config_reads

TREE = {"a": {"kernel": jnp.zeros((4, 8)), "bias": jnp.zeros(8)}, "b": [jnp.zeros(3), jnp.zeros(())]}


def test_names_are_paths_and_nest_undoes_flatten():
    assert list(trees.flatten(TREE)) == ["a/bias", "a/kernel", "b/0", "b/1"]
    plain = {"a": TREE["a"]}
    assert jax.tree.structure(trees.nest(trees.flatten(plain))) == jax.tree.structure(plain)
    with pytest.raises(ValueError, match="same name"):
        trees.flatten({"a": {"b": jnp.zeros(1)}, "a/b": jnp.zeros(1)})


def test_rules_are_strict():
    rules = ((r".*/kernel", 1), (r".*/bias", 2), (r"b/\d", 3))
    assert trees.match(list(trees.flatten(TREE)), rules, "test") == {"a/kernel": 1, "a/bias": 2, "b/0": 3, "b/1": 3}
    with pytest.raises(ValueError, match="no rule matches: b/0, b/1"):
        trees.match(list(trees.flatten(TREE)), rules[:2], "test")
    with pytest.raises(ValueError, match="more than one rule matches: a/bias"):
        trees.match(list(trees.flatten(TREE)), (*rules, (r"a/b.*", 4)), "test")
    with pytest.raises(ValueError, match="match nothing: 'kernel'"):  # the whole name must match
        trees.match(list(trees.flatten(TREE)), (*rules, ("kernel", 4)), "test")
    assert len(trees.match(list(trees.flatten(TREE)), (*rules, ("kernel", 4)), "test", unused_ok=True)) == 4


@pytest.mark.parametrize(
    "shape, expected",
    [
        ((1024, 512), ("fsdp",)),  # the largest
        ((24, 1024, 1024), (None, "fsdp")),  # of equal ones the first, never the stack of blocks
        ((6, 1000, 500), (None, "fsdp")),
        ((4, 4), ()),  # small: replicated
    ],
)
def test_fsdp_splits_the_largest_dimension_that_divides(shape, expected):
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    assert tuple(sharding.leaf_spec("x", leaf, "fsdp", {"data": 2, "fsdp": 4})) == expected


@pytest.mark.parametrize(
    "shape, expected",
    [
        ((2, 4, 1024, 512), (None, "expert", "fsdp")),
        ((1024, 4, 8, 64), ("fsdp", "expert")),
        ((2, 4, 8), (None, "expert")),  # small: its experts are split all the same
    ],
)
def test_experts_are_split_and_the_rest_as_any_leaf(shape, expected):
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    assert tuple(sharding.leaf_spec("x", leaf, "expert", {"fsdp": 2, "expert": 4})) == expected
    assert "expert" not in tuple(sharding.leaf_spec("x", leaf, "expert", {"fsdp": 2, "expert": 1}))


def test_large_leaves_never_stay_replicated():
    odd = jax.ShapeDtypeStruct((1023, 1021), jnp.float32)
    with pytest.raises(ValueError, match="sharding of heads/x: no dimension"):
        sharding.leaf_spec("heads/x", odd, "fsdp", {"fsdp": 4})
    with pytest.raises(ValueError, match="sharding of heads/x: .* may not stay replicated"):
        sharding.leaf_spec("heads/x", odd, "replicate", {"fsdp": 4})
    with pytest.raises(ValueError, match="unknown tactic"):
        sharding.leaf_spec("heads/x", odd, "split", {"fsdp": 4})


def test_report_counts_what_is_replicated():
    made = mesh.make_mesh({"data": 2, "fsdp": -1})
    tree = {"big": jax.ShapeDtypeStruct((1024, 512), jnp.float32), "small": jax.ShapeDtypeStruct((10,), jnp.float32)}
    placed = sharding.shardings(tree, (("big|small", "fsdp"),), made)
    report = sharding.report(tree, placed)
    assert (report.total, report.replicated, report.per_device) == (2**21 + 40, 40, 2**21 // 4 + 40)


def test_a_batch_is_split_over_all_axes_of_its_mesh():
    made = mesh.make_mesh({"data": 2, "fsdp": 2, "expert": 2})
    assert mesh.batch_axes(made) == {"data": 2, "fsdp": 2, "expert": 2} and mesh.batch_axes() == {}
    with jax.set_mesh(made):
        assert mesh.batch_axes() == mesh.batch_axes(made)
    assert mesh.batch_sharding(made).shard_shape((16, 3)) == (2, 3)


def test_mesh_uses_every_device_or_says_so():
    assert mesh.mesh_shape({"data": 2, "fsdp": -1}, 8) == {"data": 2, "fsdp": 4}
    for wrong in ({"data": 3, "fsdp": -1}, {"data": 1, "fsdp": 4}, {"data": -1, "fsdp": -1}, {"data": 0, "fsdp": -1}):
        with pytest.raises(ValueError, match="mesh"):
            mesh.mesh_shape(wrong, 8)
    made = mesh.make_mesh({"data": 1, "fsdp": -1})
    assert dict(made.shape) == {"data": 1, "fsdp": jax.device_count()}
    assert all(kind == jax.sharding.AxisType.Auto for kind in made.axis_types)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1))
def test_streams_are_functions_of_seed_name_and_step(seed, step):
    def data(*args):
        return tuple(np.asarray(jax.random.key_data(rngs.key(*args))))

    assert data(seed, "drop_path", step) == data(seed, "drop_path", step)
    assert data(seed, "drop_path", step) != data(seed, "init", step)
    assert data(seed, "drop_path", step) != data(seed, "drop_path", (step + 1) % 2**31)


def test_streams_are_the_same_traced():
    traced = jax.jit(lambda s: jax.random.key_data(rngs.key(3, "drop_path", s)))(jnp.int32(7))
    assert (np.asarray(traced) == np.asarray(jax.random.key_data(rngs.key(3, "drop_path", 7)))).all()
    with pytest.raises(ValueError, match="repeat"):
        rngs.keys(0, ("a", "a"))


def test_xla_flags_leave_the_user_alone_and_need_no_jax():
    env = {
        "JAX_PLATFORMS": "tpu",
        "TPU_TYPE": "v5litepod-64",
        "LIBTPU_INIT_ARGS": "--xla_tpu_enable_async_collective_fusion=false",
    }
    added = xla_flags.apply(env)
    assert added and env["LIBTPU_INIT_ARGS"].startswith("--xla_tpu_enable_async_collective_fusion=false ")
    assert env["LIBTPU_INIT_ARGS"].count("async_collective_fusion=") == 1
    assert xla_flags.apply(env) == []
    code = "import sys; from skysense_jax.core.hardware import xla_flags; xla_flags.apply({})"
    code += "; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "name, found",
    [
        ("v4-8", "v4"),
        ("v5litepod-256", "v5e"),
        ("tpu-v5-lite-podslice", "v5e"),
        ("v5p-128", "v5p"),
        ("tpu-v5p-slice", "v5p"),
        ("v6e-256", "v6e"),
        ("tpu-v6e-slice", "v6e"),
        ("tpu7x", "tpu7x"),
        ("v9-8", None),
        ("", None),
    ],
)
def test_the_tpu_generation_decides_the_flags(name, found):
    assert xla_flags.generation({"TPU_TYPE": name}) == found
    assert xla_flags.generation({"TPU_ACCELERATOR_TYPE": name, "TPU_TYPE": "v9"}) == found
    env = {"JAX_PLATFORMS": "tpu", "TPU_TYPE": name}
    added = xla_flags.apply(env)
    assert bool(added) == (found is not None)
    assert len({flag.split("=")[0] for flag in added}) == len(added), "one generation, two values of a flag"
    assert ("--xla_tpu_scoped_vmem_limit_kib=98304" in added) == (found == "v6e")


def test_every_xla_flag_says_why_and_who_says_so():
    assert set(xla_flags.VARIABLES) == set(xla_flags.FLAGS)
    for flag in (flag for flags in xla_flags.FLAGS.values() for flag in flags):
        assert flag.text.startswith("--xla_") and "=" in flag.text and flag.reason and flag.source
        assert set(flag.generations) <= set(xla_flags.GENERATIONS.values())


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install .[tpu]")
@pytest.mark.parametrize(
    "flag, accepted",
    [("--xla_tpu_no_such_flag=true", False)]
    + [(" ".join(xla_flags.flags("tpu", name)), True) for name in dict.fromkeys(xla_flags.GENERATIONS.values())],
)
def test_libtpu_accepts_the_flags(flag, accepted):
    code = (
        "from jax.experimental import topologies; topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2')"
    )
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "LIBTPU_INIT_ARGS": flag}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == accepted, done.stderr
    assert accepted or "Unknown command line flag" in done.stderr


@pytest.mark.parametrize("name", resolved_configs.names())
def test_our_configurations_have_the_right_fields(name):
    recipes.check_config(resolved_configs.load(name))


def test_a_field_that_nothing_reads_is_refused_with_the_nearest_one():
    config = skysense_tiny.get_config()
    with config.unlocked():
        config.schedule.warmup_step = 3
        config.data.dates.dsm = 1
        del config.optim.clip
    with pytest.raises(ValueError) as error:
        recipes.check_config(config)
    said = str(error.value)
    assert "nothing reads config.schedule.warmup_step; did you mean config.schedule.warmup_steps?" in said
    assert "nothing reads config.data.dates.dsm" in said and "config.optim.clip is missing" in said


MADE_UP = (
    ("shape", "clip", "get", "items", "mean", "dtype_of"),  # ordinary attributes, some of them used in every file
    {"optim": "warmup_steps", "schedule": "b1", "eval": "aspect", "data": "knn_k", "model.hr": "bank", "run": "batch"},
)
"""Fields that nobody reads: names put into every section, and names of other sections' fields."""


@functools.cache
def unread_fields() -> tuple[set[str], set[str]]:
    """Known fields that nothing in the package reads, and of MADE_UP those that seem to be read."""
    rows = (*recipes.RECIPES.values(), *systems.SYSTEMS.values())
    known: dict[str, set[str]] = {}
    for section, names in (entry for row in rows for entry in row.fields.items()):
        known.setdefault(section, set()).update(names)
    words, elsewhere = MADE_UP
    made_up = {name: {*words, elsewhere.get(name, "shape")} - known[name] for name in known if name != "mesh"}
    entries = {
        (value.__module__, value.__name__): section
        for table, section in ((recipes.RECIPES, ""), (systems.SYSTEMS, "model"))
        for row in table.values()
        for value in row
        if inspect.isfunction(value) and value.__name__ != "<lambda>"
    }
    reads = config_reads.ConfigReads(
        config_reads.package_sources(pathlib.Path(recipes.__file__).parent),
        {name: names | made_up.get(name, set()) for name, names in known.items()},
        entries,
        attributes={"config": "", "model": "model"},  # of a Description, of a command's options
        results={"read_config": ""},
        by_variable={section for row in systems.SYSTEMS.values() for section in row.of_sensors},
    )
    unread = set(reads.unread())
    dotted = {f"{section}.{name}".lstrip(".") for section, names in made_up.items() for name in names}
    return unread - dotted, dotted - unread


def test_every_known_field_is_read_somewhere():
    """As an attribute, an item or by `.get` of its own section, and not as any word that is spelt like it."""
    unread, _ = unread_fields()
    assert not unread


def test_a_field_that_nothing_reads_is_told_from_attributes_of_its_name():
    """`x.shape` is no read of config.optim.shape, `jnp.clip` none of config.schedule.clip."""
    _, seemingly_read = unread_fields()
    assert not seemingly_read
