"""Pretraining, the one loop for every model.

    python -m skysense_jax.train --config FILE --workdir DIR [--init_from RUN] [--config.field=value ...]

A workdir that has begun is continued from its newest sound checkpoint; a finished one says so. The run is a function of
the configuration, the seed and the data: kill it anywhere, start it again, and it ends in the same state.

Exit codes: 0 done. 75 preempted (SIGTERM) and saved. 70 no step within config.run.watchdog_s. 65 more than
config.run.max_skipped updates were not finite. 74 a checkpoint or the metrics could not be written (full disk).
78 bad configuration or data.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from absl import flags
from etils import epath
from ml_collections import config_dict, config_flags

from skysense_jax import sensors
from skysense_jax.core import fields, paths, trees, xla_flags
from skysense_jax.core import mesh as meshes
from skysense_jax.data import feed, sources
from skysense_jax.data import spec as specs
from skysense_jax.objectives import msgfm, skysense
from skysense_jax.run import checkpoint, folder, init_from, metrics, optim, pictures, profiler, state, step, watchdog
from skysense_jax.run.folder import say
from skysense_jax.run.preempt import EXIT_PREEMPTED, Preemption

EXIT_DONE, EXIT_NOT_FINITE, EXIT_NOT_WRITTEN, EXIT_BAD_INPUT = 0, 65, 74, 78
OBJECTIVES: dict[str, Callable[..., Any]] = {"skysense": skysense.make_objective, "msgfm": msgfm.make_objective}


class Options(NamedTuple):
    """What the command line says."""

    config: config_dict.ConfigDict
    workdir: epath.Path
    profile: str = ""
    init_from: epath.Path | None = None


class Plan(NamedTuple):
    """A run before anything is allocated: everything the compiler needs, and what the run folder tells about it."""

    contract: dict[str, Any]
    spec: trees.Tree
    objective: Any
    state: state.TrainState  # shapes with shardings
    batch: trees.Tree  # shapes with shardings
    step: Callable[..., Any]  # to be jitted
    flops: float


class Start(NamedTuple):
    """Where the run starts from."""

    state: state.TrainState
    step: int
    seconds: dict[str, float]


def read_flags(
    command: str, argv: Sequence[str], define: Callable[[flags.FlagValues], None], text: str
) -> flags.FlagValues:
    """Flags of a command that takes a configuration: --config FILE, --config.section.field=value, and what `define`
    adds. text: shown by --help. ValueError for an unknown flag or field, a wrong type, an argument that is no flag.
    """
    argv = [f"skysense-jax {command}", *argv]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config",
        None,
        "configuration file; fields: --config.section.field=value",
        flag_values=values,
        sys_argv=argv,
        lock_config=True,
    )
    flags.DEFINE_bool("help", False, "show this text", flag_values=values, short_name="h")
    define(values)
    if "--help" in argv or "-h" in argv:
        print(f"{text}\n{values.get_help()}")
        sys.exit(EXIT_DONE)
    try:
        rest = values(argv)[1:]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"the configuration has no such field, or it takes another type: {error}") from error
    except (flags.Error, FileNotFoundError) as error:
        raise ValueError(str(error)) from error
    if rest:
        raise ValueError(f"unexpected {rest}")
    return values


def parse(argv: Sequence[str]) -> Options:
    """Command line (without the program's name) to options. ValueError as :func:`read_flags`."""

    def define(values: flags.FlagValues) -> None:
        flags.DEFINE_string("workdir", None, "folder of this run; continued where it has begun", flag_values=values)
        flags.DEFINE_string(
            "init_from", None, "workdir or checkpoint whose weights a new run starts from", flag_values=values
        )
        flags.DEFINE_string("profile", "", "trace these steps, as 100:105, into WORKDIR/profile", flag_values=values)

    values = read_flags("train", argv, define, __doc__)
    if values.config is None or values.workdir is None:
        raise ValueError("both --config FILE and --workdir DIR are needed")
    given = None if values.init_from is None else paths.absolute(values.init_from)
    return Options(values.config, paths.absolute(values.workdir), values.profile, given)


def check_config(cfg: config_dict.ConfigDict) -> None:
    """ValueError for a field nothing reads, a missing one, a model that has no objective."""
    fields.check(cfg)
    if cfg.model.name not in OBJECTIVES:
        raise ValueError(
            f"config.model.name={cfg.model.name!r} has no training objective; there are {', '.join(OBJECTIVES)}"
        )


def make_contract(cfg: config_dict.ConfigDict) -> dict[str, Any]:
    """The model's input contract: the configuration's bands with the sensor table's or the dataset's statistics."""
    if cfg.data.statistics not in ("table", "dataset"):
        raise ValueError(f"config.data.statistics={cfg.data.statistics!r}: 'table' or 'dataset'")
    statistics = None
    if cfg.data.statistics == "dataset":
        statistics = {}
        for where in (*reversed(cfg.data.get("also", ())), cfg.data.dir):  # the first that knows a sensor counts
            if not (own := sources.read_metadata(where).get("statistics")):
                raise ValueError(f"{where} has no statistics of its own: run `skysense-jax data stats {where}`")
            statistics |= own
    return sensors.input_contract(cfg.data.bands.to_dict(), cfg.model.ratio, statistics)


def make_plan(cfg: config_dict.ConfigDict, contract: Mapping[str, Any], mesh: jax.sharding.Mesh) -> Plan:
    """Spec, objective, shapes, shardings and step from the configuration alone: no data is read, no array made."""
    spec = specs.batch_spec(cfg, contract)
    objective = OBJECTIVES[cfg.model.name](cfg, contract)
    batch = state.batch_shapes(spec, mesh)
    share = int(cfg.data.batch) // meshes.batch_sharding(mesh).num_devices
    if share % cfg.objective.get("microbatches", 1):
        raise ValueError(
            f"config.objective.microbatches={cfg.objective.microbatches} does not divide the {share} "
            "places of a device, and some would wait for others; 1 always does"
        )
    shapes = state.state_shapes(objective, batch, cfg.seed, mesh)
    update = step.make_step(objective, cfg, optim.decay_mask(shapes.params))
    return Plan(dict(contract), spec, objective, shapes, batch, update, float(objective.flops(batch)))


def jit_step(plan: Plan, mesh: jax.sharding.Mesh) -> Any:
    """The step as jit will compile it: the state updated in place and left where it lies."""
    placed = jax.tree.map(lambda leaf: leaf.sharding, plan.state)
    return jax.jit(plan.step, donate_argnums=0, out_shardings=(placed, meshes.replicated(mesh)))


def compile_step(plan: Plan, mesh: jax.sharding.Mesh) -> Any:
    """The compiled step; prints what it needs per device and what it computes."""
    jitted = jit_step(plan, mesh)
    say("compiling the training step: minutes on a CPU, once where JAX_COMPILATION_CACHE_DIR is set")
    begin = time.monotonic()
    compiled = jitted.lower(plan.state, plan.batch).compile()
    memory = compiled.memory_analysis()
    parts = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "of these in place": memory.alias_size_in_bytes,
    }
    needs = ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in parts.items())
    say(f"compiled in {time.monotonic() - begin:.1f} s; per device: {needs}; model FLOPs of a step: {plan.flops:.3e}")
    return compiled


def where_to_start(
    cfg: config_dict.ConfigDict,
    workdir: epath.Path,
    plan: Plan,
    meta: Mapping[str, Any],
    given: epath.Path | None = None,
) -> Start:
    """1. the newest sound checkpoint of this workdir; 2. the weights of --init_from; 3. scratch."""
    found = checkpoint.restore_latest_valid(
        workdir, plan.state, lambda found: folder.check_same_run(cfg, plan.contract, meta["dataset_id"], found)
    )
    if found is not None:
        position = data_position(cfg, found.step)
        if found.data != position:
            raise ValueError(f"checkpoint {found.step} stands at {found.data} in the data, this run at {position}")
        changed = [name for name, version in meta["code"].items() if found.meta["code"].get(name) != version]
        say(f"resuming from step {found.step}")
        if changed:
            say(f"note: other code wrote it ({', '.join(changed)}); the bits may differ from those of an unbroken run")
        return Start(found.state, found.step, found.meta["seconds"])
    geo, fresh = cfg.model.get("geo_context"), state.create(plan.objective, plan.batch, cfg.seed, plan.state)
    if geo is not None and geo.bank == "on" and geo.table == "places":
        fresh = init_from.with_regions(cfg, fresh)
    if "distill" in cfg.objective and cfg.objective.distill.weight:
        fresh = init_from.with_teacher(cfg, fresh)
    if given is None:
        if geo is not None and geo.bank == "frozen":
            raise ValueError(
                "config.model.geo_context.bank='frozen': a bank that nothing has learnt; start from a run "
                "that has one (--init_from), or take 'on'"
            )
        say("starting from scratch")
        return Start(fresh, 0, {})
    begun, report = init_from.init_from(given, fresh, json.loads(json.dumps(plan.contract)))
    if geo is not None and geo.bank == "frozen" and not jax.device_get(begun.memory["bank"]["visits"]).any():
        raise ValueError(f"config.model.geo_context.bank='frozen': {given} holds no bank that has learnt; take 'on'")
    say(f"starting from the weights of {given}: {len(report['taken'])} leaves")
    for kind in ("new", "widened", "left"):
        if report[kind]:
            say(f"  {kind}: {', '.join(report[kind])}")
    return Start(begun, 0, {})


def data_position(cfg: config_dict.ConfigDict, done: int) -> dict[str, int]:
    """Where the data stream stands after `done` steps: everything that the next batch depends on."""
    batch = int(cfg.data.batch)
    return {"step": done, "seed": int(cfg.seed), "batch": batch, "places_seen": done * batch}


def train(options: Options) -> int:
    """Starts the processes of the job and runs; returns the exit code. SIGTERM is listened to from here on."""
    xla_flags.apply(os.environ)  # before the first device is touched
    process, processes = meshes.start_processes()
    preemption = Preemption()
    try:
        return run(options, process, processes, preemption)
    finally:
        preemption.close()


def run(options: Options, process: int, processes: int, preemption: Preemption) -> int:
    """The run, from the data to TRAIN_COMPLETE; returns the exit code."""
    cfg, workdir = options.config, options.workdir

    # 1. A folder, and what is to be learnt from: the dataset and the input contract.
    check_config(cfg)
    window = profiler.Window(options.profile, workdir, cfg.steps)
    paths.make_folder(workdir)
    data, contract = feed.of(cfg), make_contract(cfg)
    meta = folder.run_meta(cfg, contract, data.check(cfg, contract))

    # 2. Mesh, objective, shapes, shardings.
    mesh = meshes.make_mesh(cfg.mesh.to_dict())
    plan = make_plan(cfg, contract, mesh)
    if (workdir / folder.COMPLETE).exists():
        folder.check_same_run(cfg, contract, meta["dataset_id"], checkpoint.load_meta(workdir))
        say(f"{workdir} is done ({cfg.steps} steps); nothing to do")
        return EXIT_DONE
    folder.write_reports(workdir, plan, mesh, meta)

    with jax.set_mesh(mesh):
        # 3. Compile before anything runs: out of memory and unmatched shapes show here.
        timers = metrics.Timers()
        with timers("compile"):
            train_step = compile_step(plan, mesh)

        # 4. Where do we start from?
        with timers("restore"):
            start = where_to_start(cfg, workdir, plan, meta, options.init_from)
        for name, seconds in start.seconds.items():
            timers.add(name, seconds)
        now, done = start.state, start.step
        saver = checkpoint.Saver(workdir, cfg.run.keep)
        images = cfg.data.batch * (sum(cfg.data.dates.values()) if "dates" in cfg.data else 1)
        log = metrics.Log(workdir, done, cfg.steps, cfg.run.log_every, cfg.data.batch, images, plan.flops, timers)
        batches = data.make_train_iterator(cfg, contract, cfg.seed, done, process, processes)
        draw = pictures.in_training(cfg, contract, workdir, meshes.replicated(mesh), process == 0)

        def save() -> None:
            with timers("save"):
                log.sync()  # the records of every step a checkpoint contains are on disk before it is
                saver.save(now, data_position(cfg, done), {**meta, "seconds": timers.seconds})

        def not_finite() -> int:
            log.close()
            say(
                f"{skipped} updates were not finite, config.run.max_skipped is {cfg.run.max_skipped}; "
                f"the metrics are in {workdir / metrics.FILE}"
            )
            return EXIT_NOT_FINITE

        # 5. The loop. Order matters: save -> next batch -> step -> log; a checkpoint describes one instant of state,
        # data and clocks.
        preemption.enter_loop()
        skipped = 0
        try:
            with watchdog.Watchdog(cfg.run.watchdog_s, workdir / f"stacks-{process}.txt") as dog:
                while done < cfg.steps:
                    stop = preemption.requested(done)
                    if stop or (done % cfg.run.save_every == 0 and done > start.step):
                        save()
                    if stop:
                        saver.wait()
                        log.close()
                        say(f"preempted: saved at step {done}")
                        return EXIT_PREEMPTED
                    with timers("eval"):
                        draw(now.params, done)
                    with timers("data"):
                        batch = state.put_batch(next(batches), plan.batch)
                    window.before_step(done, now)
                    with timers("step"):
                        now, measured = train_step(now, batch)
                        done += 1
                        skipped = log.put(done, measured)
                    dog.beat()
                    if skipped > cfg.run.max_skipped:
                        return not_finite()

                # 6. Finish: the last records, the last checkpoint, the mark.
                skipped = log.flush()
                if skipped > cfg.run.max_skipped:
                    return not_finite()
                with timers("eval"):
                    draw(now.params, done)
                save()
                saver.wait()
                log.close()
        finally:
            window.close()
            batches.close()
            saver.close()
        if process == 0:
            (workdir / folder.COMPLETE).write_text(f"{cfg.steps} steps\n")
        spent = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in timers.seconds.items())
        say(f"done: {cfg.steps} steps in {workdir} ({spent})")
        return EXIT_DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Parses `argv` (without the program's name) and trains; bad configuration or data becomes exit code 78 and one
    line.
    """
    try:
        return train(parse(sys.argv[1:] if argv is None else argv))
    except ValueError as error:
        print(f"skysense-jax train: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except OSError as error:
        print(f"skysense-jax train: {error}", file=sys.stderr)
        return EXIT_NOT_WRITTEN


if __name__ == "__main__":
    sys.exit(main())
