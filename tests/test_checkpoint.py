"""Checkpoints: digests that see a flipped bit and no sharding, bits that come back on any mesh, damage that is named.

The toy objective on eight fake devices.
"""

from __future__ import annotations

import os
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skysense_jax.core import mesh as meshes
from skysense_jax.run import checkpoint
from skysense_jax.run.stored import digest
from tests.helpers import noise_dataset, toy_objective
from tests.helpers.jobs import flip, largest
from tests.helpers.toy_objective import same, small_state


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> str:
    return noise_dataset.write_dataset(tmp_path_factory.mktemp("places"))


@pytest.fixture()
def cfg(dataset):
    return toy_objective.config(dataset)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_a_digest_sees_any_flipped_bit_and_no_sharding(dtype):
    rng = np.random.default_rng(1)
    x = rng.integers(0, 2 if dtype == "bool" else 200, (8, 24)).astype(jnp.dtype(dtype))
    made = meshes.make_mesh({"data": 1, "fsdp": -1})
    split = jax.device_put(x, meshes.batch_sharding(made))
    whole = digest.tree_digests({"x": x})
    assert digest.tree_digests({"x": split}) == whole
    for _ in range(5):
        y = x.copy()
        y.reshape(-1).view(np.uint8)[rng.integers(y.nbytes)] ^= 1
        assert digest.tree_digests({"x": y}) != whole
    assert digest.tree_digests({"x": x.reshape(24, 8)}) != whole


@pytest.mark.parametrize("shape, spec", [((8, 24), ("fsdp",)), ((3, 16, 5), (None, "fsdp")), ((7,), ()), ((), ())])
@pytest.mark.parametrize("block", [2**18, 7])
def test_a_digest_is_the_same_on_the_host_and_in_a_step(shape, spec, block, monkeypatch):
    monkeypatch.setattr(digest, "_BLOCK", block)
    x = np.random.default_rng(2).normal(size=shape).astype(np.float32)
    made = meshes.make_mesh({"data": 1, "fsdp": -1})
    placed = jax.device_put(x, jax.NamedSharding(made, jax.P(*spec)))
    inside = digest.hexadecimal(jax.device_get(jax.jit(digest.leaf_digest)(placed)))
    for host in (x, placed):
        assert digest.tree_digests({"x": host})["x"].split()[1] == inside


META = {"config": {"steps": 9}, "contract": {}, "dataset_id": "d", "seconds": {}}


@pytest.fixture()
def saved(cfg, tmp_path):
    """A workdir with steps 1 and 2 of a state whose kernels are split over eight devices, and the two states."""
    _, _, shapes, now = small_state(cfg, small=1024)

    def at(n):
        return now._replace(step=jnp.int32(n), params=jax.tree.map(lambda x: x + n, now.params))

    states = [at(1), at(2)]
    saver = checkpoint.Saver(tmp_path, keep=2)
    for one in states:
        assert saver.save(one, {"step": int(one.step)}, META)
        saver.wait()
        assert not saver.save(one, {"step": int(one.step)}, META)  # already there
    saver.close()
    return tmp_path, shapes, states


def test_a_checkpoint_comes_back_bit_for_bit_on_any_mesh(saved, cfg):
    workdir, shapes, states = saved
    found = checkpoint.restore_latest_valid(workdir, shapes)
    assert (found.step, found.data, found.meta["config"]) == (2, {"step": 2}, {"steps": 9})
    assert same(found.state, states[1])
    assert found.state.params["encoder"]["layer"]["kernel"].sharding.spec == jax.P(None, "fsdp")
    other = meshes.make_mesh({"data": 1, "fsdp": 2}, jax.devices()[:2])
    moved = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=meshes.replicated(other)), shapes)
    assert same(checkpoint.restore_latest_valid(workdir, moved).state, states[1])


def test_one_part_loads_alone(saved):
    workdir, _, states = saved
    for path in (workdir, workdir / "checkpoints", workdir / "checkpoints" / "2"):
        assert same(checkpoint.load_tree(path, "teacher"), states[1].teacher)
        assert checkpoint.load_meta(path)["config"] == {"steps": 9}
    assert same(checkpoint.load_tree(workdir, "params", step=1), states[0].params)
    with pytest.raises(ValueError, match="has no 'optimiser'; it has params"):
        checkpoint.load_tree(workdir, "optimiser")
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 7"):
        checkpoint.load_tree(workdir, "params", step=7)


@pytest.mark.parametrize(
    "damage, reason",
    [
        (lambda two: flip(largest(two / "params")), "params"),
        (lambda two: os.truncate(largest(two / "params"), 100), "params"),
        (lambda two: largest(two / "teacher").unlink(), "cannot be read"),
        (lambda two: shutil.rmtree(two / "memory"), "cannot be read"),
        (lambda two: (two / "params" / "_METADATA").unlink(), "cannot be read"),
        (lambda two: flip(two / "meta" / "data.json"), "cannot be read|altered"),
        (lambda two: (two / "data" / "data.json").write_text('{"step": 1}'), "data position was altered"),
        (lambda two: [shutil.rmtree(two), two.mkdir()], "cannot be read"),
    ],
    ids=[
        "flipped byte",
        "truncated",
        "missing file",
        "missing part",
        "no manifest",
        "flipped meta",
        "another position",
        "empty folder",
    ],
)
def test_a_damaged_step_is_named_and_the_one_before_is_used(saved, capfd, damage, reason):
    workdir, shapes, states = saved
    damage(workdir / "checkpoints" / "2")
    found = checkpoint.restore_latest_valid(workdir, shapes)
    assert found.step == 1 and same(found.state, states[0])
    aside = workdir / checkpoint.REJECTED / "2-0"
    said = (aside / "REASON.txt").read_text()
    assert len(said.splitlines()) == 1 and re.search(reason, said), said
    assert f"checkpoint 2 rejected: {said.strip()}" in capfd.readouterr().err
    assert checkpoint.steps(workdir / "checkpoints") == [1]


def test_a_leaf_that_reads_back_wrong_is_named(saved, monkeypatch):
    """Orbax returns flipped bytes as if nothing had happened; the digest names the leaf."""
    workdir, shapes, _ = saved
    honest = checkpoint.ocp.load_checkpointables

    def lying(path, wanted):
        loaded = honest(path, wanted)
        if "params" in loaded and path.name == "2":
            layer = loaded["params"]["encoder"]["layer"]
            layer["kernel"] = layer["kernel"].at[3, 3].add(1e-7)
        return loaded

    monkeypatch.setattr(checkpoint.ocp, "load_checkpointables", lying)
    assert checkpoint.restore_latest_valid(workdir, shapes).step == 1
    said = (workdir / checkpoint.REJECTED / "2-0" / "REASON.txt").read_text()
    assert "params/encoder/layer/kernel: saved float32[10,512]" in said


def test_never_silently_from_scratch(saved):
    workdir, shapes, _ = saved
    for n in (1, 2):
        shutil.rmtree(workdir / "checkpoints" / str(n) / "params")
    with pytest.raises(checkpoint.Damaged, match="none can be trusted"):
        checkpoint.restore_latest_valid(workdir, shapes)
    assert checkpoint.steps(workdir / "checkpoints") == [1, 2]
    assert checkpoint.restore_latest_valid(workdir / "elsewhere", shapes) is None


def test_another_model_is_an_error_that_names_the_leaf(saved):
    workdir, shapes, _ = saved
    centre = jax.ShapeDtypeStruct((600,), jnp.float32, sharding=shapes.memory["centre"].sharding)
    wider = shapes._replace(memory={"centre": centre})
    said = r"another model \(1 leaves differ\): memory/centre: saved float32\[512\], .* float32\[600\]"
    with pytest.raises(ValueError, match=said):
        checkpoint.restore_latest_valid(workdir, wider)


def test_only_the_newest_are_kept(cfg, tmp_path):
    _, _, _, now = small_state(cfg)
    saver = checkpoint.Saver(tmp_path, keep=2)
    for n in (1, 2, 3):
        saver.save(now._replace(step=jnp.int32(n)), {}, META)
        saver.wait()
    saver.close()
    assert checkpoint.steps(tmp_path / "checkpoints") == [2, 3]
