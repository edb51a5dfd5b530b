"""Reading compiled programs, and the compile check itself: through the real TPU compiler where libtpu is installed."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skysense_jax.commands import compile_check as command
from skysense_jax.commands import pods
from skysense_jax.configs import skysense_tiny
from skysense_jax.core import flops, sharding
from skysense_jax.core import mesh as meshes
from skysense_jax.core.hardware import chips, hlo
from skysense_jax.ops import contrast
from skysense_jax.run import pod_check

ROOT = pathlib.Path(__file__).resolve().parents[1]
LAYERS, WIDTH, BATCH = 5, 64, 16


def layered(fsdp: int):
    """A scan over layers with split weights, as the model's: mesh, function, arguments with shardings."""
    mesh = meshes.make_mesh({"data": jax.device_count() // fsdp, "fsdp": fsdp})
    split = jax.NamedSharding(mesh, jax.P(None, None, "fsdp"))
    weights = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32, sharding=split)
    x = jax.ShapeDtypeStruct((BATCH, WIDTH), jnp.float32, sharding=meshes.batch_sharding(mesh))

    @jax.checkpoint
    def layer(x, w):
        return jnp.tanh(x @ sharding.gathered(w)), None

    def run(weights, x):
        return jax.lax.scan(layer, x, weights)[0]

    return mesh, run, (weights, x)


@pytest.mark.parametrize("fsdp", [8, 4])
def test_collectives_of_a_loop_count_as_often_as_it_runs(fsdp):
    mesh, run, arguments = layered(fsdp)
    with jax.set_mesh(mesh):
        text = jax.jit(run).lower(*arguments).compile().as_text()
    found = hlo.collectives(hlo.read(text), [0] * 8)
    layer = WIDTH * WIDTH * 4
    assert found["all-gather"].count == LAYERS
    assert found["all-gather"].wire == pytest.approx(LAYERS * layer * (fsdp - 1) / fsdp)
    assert found["all-gather"].largest == layer, "one layer at a time, never all of them"
    assert found["all-gather"].between_slices == 0


def test_gradients_go_into_the_parts_without_gathering_activations():
    mesh, run, (weights, x) = layered(8)
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(lambda w, x: run(w, x).sum()), out_shardings=weights.sharding)
        found = hlo.collectives(hlo.read(gradient.lower(weights, x).compile().as_text()), [0] * 8)
    assert max(one.largest for one in found.values()) <= WIDTH * WIDTH * 4
    assert found["all-gather"].count == 2 * LAYERS, "forward and backward; nothing else is gathered"


def test_pieces_of_the_distillation_are_reduced_over_devices_once_and_give_the_same():
    """The rows of a place in four pieces, float32: values and gradients of one device, and no collective in a loop."""
    places, rows, width, prototypes, pieces = 16, 32, 8, 64, 4
    draw = jax.random.split(jax.random.key(0), 5)
    arrays = [
        jax.random.normal(key, shape)
        for key, shape in zip(
            draw,
            (
                (width, prototypes),
                (places, rows, width),
                (places, rows, 1, width),
                (places, rows, 1),
                (width, prototypes),
            ),
            strict=True,
        )
    ]

    def loss(mine, student, teacher, weight, theirs):
        ce, entropy, assigned = contrast.distil(
            student,
            teacher,
            jnp.square(weight),
            sharding.gathered(mine),
            theirs,
            jnp.zeros(prototypes),
            0.1,
            0.04,
            rows // pieces,
        )
        return ce.sum(), (ce, entropy, assigned)

    wanted = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(*arrays)
    mesh = meshes.make_mesh({"data": 2, "fsdp": 4})
    split = jax.NamedSharding(mesh, jax.P(None, "fsdp"))
    whole, batch = meshes.replicated(mesh), meshes.batch_sharding(mesh)
    placed = [jax.device_put(x, y) for x, y in zip(arrays, (split, batch, batch, batch, whole), strict=True)]
    with jax.set_mesh(mesh):
        step = (
            jax.jit(
                jax.value_and_grad(loss, argnums=(0, 1), has_aux=True),
                out_shardings=((whole, (batch, batch, whole)), (split, batch)),
            )
            .lower(*placed)
            .compile({"xla_backend_optimization_level": 3})  # sums in lanes, as a run has them: within 1e-5
        )
        found = step(*placed)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())
    program = hlo.read(step.as_text())
    assert pieces in program.times.values(), "the pieces are a loop"
    assert set(
        program.times[name]
        for name, body in program.computations.items()
        if name in program.times
        for one in body
        if one.opcode in hlo.COLLECTIVES
    ) == {1}


def test_groups_that_cross_slices_count_between_them():
    mesh, run, arguments = layered(8)
    with jax.set_mesh(mesh):
        program = hlo.read(jax.jit(run).lower(*arguments).compile().as_text())
    one = hlo.collectives(program, [0] * 4 + [1] * 4)["all-gather"]
    assert one.between_slices == pytest.approx(one.wire * (1 / 2) / (7 / 8))  # half of the ring's parts lie over there


def test_what_a_tpu_hands_to_its_host_goes_between_slices():
    text = """ENTRY %main (p: f32[8,128]) -> f32[] {
  %p = f32[8,128]{1,0} parameter(0)
  %after-all = token[] after-all()
  %send = (f32[8,128]{1,0}, u32[], token[]) send(%p, %after-all), channel_id=2, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ALL_REDUCE"}
}"""
    sent = hlo.collectives(hlo.read(text), [0, 1])["send"]
    assert (sent.count, sent.wire, sent.between_slices) == (1, 4096, 4096)


@pytest.mark.parametrize(
    "text, groups",
    [
        ("x), replica_groups={{0,2},{1,3}}, dimensions={0}", [[0, 2], [1, 3]]),
        ("x), replica_groups=[2,2]<=[4], dimensions={0}", [[0, 1], [2, 3]]),
        ("x), replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}", [[0, 2], [1, 3]]),
        ("x), replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_1'}, dimensions={0}", [[0, 1], [2, 3]]),
        ("x), replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0'}, dimensions={0}", [[0, 2], [1, 3]]),
        ("x), replica_groups=mesh['axis_0'=2,'axis_1'=2], device_ids=([2,2]T(1,0)) {'axis_1'}, x", [[0, 2], [1, 3]]),
    ],
)
def test_every_spelling_of_device_groups_is_read(text, groups):
    assert sorted(hlo.device_groups(text)) == groups


def test_hbm_traffic_of_a_loop_counts_slices_and_not_the_whole_stack():
    stack = jax.ShapeDtypeStruct((64, 128, 128), jnp.float32)
    x = jax.ShapeDtypeStruct((128, 128), jnp.float32)
    text = jax.jit(lambda w, x: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]).lower(stack, x).compile().as_text()
    matrix = 128 * 128 * 4
    assert 64 * 3 * matrix <= hlo.hbm_bytes(hlo.read(text)) <= 64 * 16 * matrix  # the whole stack each time: 64 * 64


def test_what_starts_is_counted_once_however_many_arrays_it_takes():
    """Prefetch to the chip and back, an all-gather of two arrays, an all-reduce of two, a permute: as a TPU program
    spells them, operands inside the value of the start.
    """
    text = """%gather (x: f32[4]) -> f32[8] {
  %x = f32[4]{0} parameter(0)
  ROOT %inner = f32[8]{0} all-gather(%x), replica_groups={{0,1}}, dimensions={0}
}

ENTRY %main (p: f32[1000], q: bf16[1000]) -> f32[] {
  %p = f32[1000]{0:T(1024)} parameter(0)
  %q = bf16[1000]{0:T(1024)(128)} parameter(1)
  %in = (f32[1000]{0:T(1024)S(1)}, f32[1000]{0:T(1024)}, u32[]{:S(2)}) copy-start(%p)
  %here = f32[1000]{0:T(1024)S(1)} copy-done(%in)
  %out = (f32[1000]{0:T(1024)}, f32[1000]{0:T(1024)S(1)}, u32[]{:S(2)}) copy-start(%here)
  %back = f32[1000]{0:T(1024)} copy-done(%out)
  %ag = ((f32[1000]{0}, bf16[1000]{0}), (f32[2000]{0}, bf16[2000]{0})) all-gather-start(%p, %q), replica_groups={{0,1}}
  %ag.done = (f32[2000]{0}, bf16[2000]{0}) all-gather-done(%ag)
  %ar = (f32[1000]{0}, bf16[1000]{0}) all-reduce-start(%p, %q), replica_groups={{0,1}}, to_apply=%add
  %ar.done = (f32[1000]{0}, bf16[1000]{0}) all-reduce-done(%ar)
  %cp = (f32[1000]{0}, f32[1000]{0}, u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,1},{1,0}}
  %cp.done = f32[1000]{0} collective-permute-done(%cp)
  %as = ((f32[4]{0}), f32[8]{0}, u32[]) async-start(%p), calls=%gather
  %as.done = f32[8]{0} async-done(%as), calls=%gather
}"""
    program = hlo.read(text)
    found = hlo.collectives(program, [0, 0])
    gathered = found["all-gather"]
    assert (gathered.count, gathered.wire, gathered.largest) == (2, (12_000 + 32) / 2, 12_000)
    assert found["all-reduce"].wire == 2 * 6_000 / 2
    assert found["collective-permute"].wire == 4_000
    prefetch, back, gather, reduce, permute, inner = 4_000, 4_000, 6_000 + 12_000, 2 * 6_000, 8_000 + 8, 16 + 32
    assert hlo.hbm_bytes(program) == prefetch + back + gather + reduce + permute + inner


def test_products_of_a_jaxpr_count_loops_and_rematerialisation():
    def loss(w, x):
        layer = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
        return jax.lax.scan(layer, x, w)[0].sum()

    w, x = jnp.ones((LAYERS, WIDTH, WIDTH)), jnp.ones((BATCH, WIDTH))
    one = 2 * BATCH * WIDTH * WIDTH * LAYERS
    assert flops.of_jaxpr(jax.make_jaxpr(loss)(w, x).jaxpr) == one
    gradient = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(w, x)
    assert flops.of_jaxpr(gradient.jaxpr) == 4 * one  # forward, again, and two products backward


def test_a_described_chip_may_be_several_devices():
    class Device:
        def __init__(self, *coords):
            self.coords = coords

    assert chips.devices_per_chip([Device(0, 0, 0), Device(0, 0, 0), Device(1, 0, 0), Device(1, 0, 0)]) == 2
    assert chips.devices_per_chip(jax.devices()) == 1


def test_table_rows_have_their_own_files_and_show_what_does_not_fit():
    assert len({row.file for row in pods.ROWS}) == len(pods.ROWS)
    result = {
        "row": "skysense_full",
        "topology": "v5e:8x8",
        "slices": 1,
        "devices": 64,
        "devices_per_chip": 1,
        "mesh": {"data": 2, "fsdp": 32},
        "global_batch": 256,
        "microbatches": 4,
        "peak_hbm_bytes": 20 * 2**30,
        "hbm_limit_bytes": int(15.75 * 2**30),
        "fits": False,
        "compile_seconds": 1.0,
    }
    assert "| 20.00 / 15.75 | **no** |" in pods.line(result)


def test_a_row_that_could_not_be_made_is_named_and_what_cannot_work_is_refused_at_once(tmp_path, monkeypatch, capsys):
    def run(*arguments: str) -> int:
        parser = argparse.ArgumentParser()
        pods.add_arguments(parser)
        return pods.run(parser.parse_args([str(tmp_path / "rows"), *arguments]))

    monkeypatch.setattr(sys, "executable", shutil.which("false"))  # ends with 1, as a step that does not fit
    assert run("--only", "base") == 1
    assert f"{pods.ROWS[-1].file} could not be made" in capsys.readouterr().err
    page = tmp_path / "pods.md"
    page.write_text("no marks\n")
    with pytest.raises(ValueError, match="has no lines"):
        run("--out", str(page))
    with pytest.raises(ValueError, match="no row's file contains it"):
        run("--only", "v9z")
    assert not capsys.readouterr().err, "nothing was compiled"


@pytest.mark.parametrize(
    "places, parts, devices, then, said",
    [
        (256, 2, 64, (256, 2), ""),
        (256, 2, 128, (256, 2), ""),
        (256, 2, 256, (256, 1), "config.objective.microbatches=2 is more than the places of a device: compiled with 1"),
        (256, 2, 512, (512, 1), "config.data.batch=256 leaves devices without a place: compiled with 512"),
    ],
)
def test_the_paper_s_recipe_is_fitted_to_larger_pods_and_that_is_said(places, parts, devices, then, said):
    c = skysense_tiny.get_config("series")
    c.data.batch, c.objective.microbatches = places, parts
    note = pod_check.with_every_chip_fed(c, devices)
    assert (c.data.batch, c.objective.microbatches) == then
    assert said in note and bool(note) == (then != (places, parts)) == ("`train` needs the same values" in note)


@pytest.mark.parametrize(
    "size, asked", [("10.51T", 10.51 * 2**40), ("21.61G", 21.61 * 2**30), ("512.5M", 512.5 * 2**20)]
)
def test_what_a_refusal_asks_for_is_read_in_every_unit(size, asked):
    refusal = (
        f"RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries ({size}) "
        "exceeds available HBM (15.75G)."
    )
    assert pod_check.asked_for(refusal) == int(asked)
    assert pod_check.asked_for("RESOURCE_EXHAUSTED") is None


@pytest.mark.parametrize(
    "argument, words",
    [
        ("--json=nowhere/row.json", "there is no folder nowhere"),
        ("--slices=0", "--slices=0"),
        ("--effort=2", "--effort=2"),
    ],
)
def test_what_would_be_lost_after_the_compilation_is_refused_before(argument, words, capfd):
    config = str(ROOT / "configs" / "skysense_tiny.py")
    assert command.main(["--config", config, "--topology", "v5e:2x2", argument]) == 78
    assert words in capfd.readouterr().err


def compile_check(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "skysense_jax.cli", "compile-check", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed here")
def test_without_libtpu_the_command_says_what_to_install():
    done = compile_check("--config", "configs/skysense_tiny.py", "--topology", "v5e:2x2")
    assert done.returncode == 78 and "launch/setup.sh tpu" in done.stderr, done.stderr


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs the TPU compiler: tests/run.sh makes an environment with it (launch/setup.sh tpu)",
)


@pytest.mark.tpu_compiler
@needs_libtpu
@pytest.mark.parametrize(
    "topology, slices, mesh, per_chip",
    [("v5e:2x2", 1, {"data": 1, "fsdp": 4}, 1), ("v5p:2x2x1", 2, {"data": 2, "fsdp": 4}, 1)],
)
def test_the_tiny_step_compiles_for_real_chips(tmp_path, topology, slices, mesh, per_chip):
    file = tmp_path / "row.json"
    done = compile_check(
        "--config",
        "configs/skysense_tiny.py:series",
        "--topology",
        topology,
        "--slices",
        str(slices),
        "--json",
        str(file),
        "--config.mesh.data=-1",
        "--config.mesh.fsdp=4",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    r = json.loads(file.read_text())
    assert r["fits"] and 0 < r["peak_hbm_bytes"] < r["hbm_limit_bytes"]
    assert r["mesh"] == mesh and r["devices_per_chip"] == per_chip and r["devices"] == 4 * slices
    assert r["executed_flops"] * r["devices"] > 0.9 * r["model_flops"]
    assert 0 < r["roofline_mfu"] < 1 and r["roofline_step_seconds"] == max(r["roofline_seconds"].values())
    assert r["collective_bytes"] == pytest.approx(sum(one["wire"] for one in r["collectives"].values()))
    assert (r["dcn_bytes"] > 0) == (slices > 1), "only the gradients' mean crosses slices"
    assert r["largest_replicated_bytes"] < 2**20
    assert "FITS" in done.stdout and "nothing was run" in done.stdout


@pytest.mark.tpu_compiler
@needs_libtpu
def test_a_step_that_does_not_fit_says_by_how_much(tmp_path):
    file = tmp_path / "row.json"
    done = compile_check(
        "--config",
        "configs/skysense_tiny.py",
        "--topology",
        "v5e:2x2",
        "--json",
        str(file),
        "--config.data.batch=100000",
        "--config.mesh.fsdp=4",
    )
    r = json.loads(file.read_text())
    assert done.returncode == 1 and not r["fits"], done.stderr[-2000:]
    assert r["peak_hbm_bytes"] > r["hbm_limit_bytes"] and "DOES NOT FIT" in done.stdout
    assert r["model_flops"] > 0 < r["compile_seconds"]
    assert [r[key] for key in ("collective_bytes", "roofline_step_seconds", "roofline_mfu")] == [None] * 3


@pytest.mark.tpu_compiler
@needs_libtpu
@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--topology", "v9z:2x2"), "v9z"),
        (("--topology", "v5e:2x2", "--config.mesh.fsdp=3"), "mesh"),
        (("--topology", "v5e:2x2", "--config.data.bath=3"), "no such field"),
    ],
)
def test_what_cannot_be_compiled_is_refused(arguments, words):
    done = compile_check("--config", "configs/skysense_tiny.py", *arguments)
    assert done.returncode == 78 and words in done.stderr, done.stderr[-2000:]
