"""What crossing sensors, experts, unpaired images and distillation do for msGFM, at small scale, over seeds.

    python -m experiments.msgfm_variants FOLDER --data DATASET --seeds 0 1 2 [--out docs/msgfm.md]
    python -m experiments.msgfm_variants FOLDER --table --out docs/msgfm.md      # the tables of what is there

DATASET: places with hr, s2, s1, dsm and scene labels (PLACES=1600 ./launch/local.sh makes one). Everything is kept in
FOLDER and nothing is made twice: FOLDER/paired and FOLDER/unpaired (see `experiments.msgfm_split`), FOLDER/teacher-SEED
(see :func:`teacher`), FOLDER/VARIANT-SEED.json with what a run scored. A seed is that of the network, the masks and the
data order; the places are the same. All variants make the same number of updates with batches of the same size, step by
step in turns.

Scored on the held-out places ("test"): a linear probe and kNN on the frozen features of all sensors, fitted on the
labels of FOLDER/paired, as `skysense-jax eval` has them; and the reconstruction of hidden pixels from each sensor to
itself and to its pair, all variants behind the same masks (experiments.msgfm_held_out). Intervals over
seeds are Student's.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import statistics
import sys
import time
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import msgfm_held_out
from experiments.common import mean_and_interval
from experiments.msgfm_split import NAMES, split_places
from skysense_jax import recipes
from skysense_jax import train as training
from skysense_jax.core import mesh as meshes
from skysense_jax.core import paths
from skysense_jax.core.files import write_atomically, write_between
from skysense_jax.data import records
from skysense_jax.data.batches import one_sensor, whole_places
from skysense_jax.evals import compare, rows
from skysense_jax.models import msgfm, msgfm_outputs
from skysense_jax.objectives import msgfm as msgfm_objective
from skysense_jax.run import init_from, optim, state
from skysense_jax.run import plan as plans
from skysense_jax.run.log import metrics
from skysense_jax.run.step import make_step
from skysense_jax.sensors import SENSORS

CONFIG = pathlib.Path(__file__).resolve().parents[1] / "configs" / "msgfm_smoke.py"


SETTINGS = (
    "steps=1500",
    "data.batch=16",
    "data.statistics=dataset",
    "model.ratio=4",
    "model.img_size=32",
    "model.depths=(2, 2)",
    "model.num_heads=(1, 2)",
    "objective.mask_cell=8",
    "schedule.warmup_steps=20",
)
"""Of every run, on the smoke configuration: 1500 updates with 16 images of 32 x 32 pixels; 4 experts in the last of 4
blocks."""

VARIANTS = {
    "half": "p = 0.5",
    "own": "p = 0: every image reconstructs itself",
    "cross": "p = 1: every paired image reconstructs its partner",
    "dense": "p = 0.5, dense: an MLP in the place of the mixture",
    "unpaired": "p = 0.5, and unpaired images",
    "distilled": "p = 0.5, distilled from a teacher of RGB images",
}
"""What is compared. "unpaired" trains on both datasets, the others on the paired places alone."""

CROSS = {"own": 0.0, "cross": 1.0}
"""objective.cross of the variants, 0.5 of the others."""

ARCHITECTURE = {name: name if name in ("dense", "distilled") else "moe" for name in VARIANTS}
FIELDS = {
    "moe": (),
    "dense": ("model.moe.stages=()",),
    "distilled": ("objective.distill.weight=1", "objective.distill.img_size=32"),
}
"""Of an architecture, beside SETTINGS. A token of any goes through one MLP of the same width: top-1."""

TAUGHT = "hr"
TEACHERS = 1000
"""The teacher's only sensor, and the seed of the first one: a seed's own would start teacher and student alike."""

DIRECTIONS = tuple(f"{name}-{target}" for name in NAMES for target in (name, SENSORS[name].pair))
MARKS = "<!-- rows: python -m experiments.msgfm_variants -->", "<!-- end of rows -->"


class Programs(NamedTuple):
    """What is compiled for one architecture, once for all seeds and probabilities. flops: of a step. init(seed): state;
    step(state, batch, seed, cross): (state, metrics); features(encoder, PlaceInput); errors: of
    :func:`msgfm_held_out.make_errors`."""

    cfg: Any
    contract: dict[str, Any]
    flops: float
    init: Callable[..., Any]
    step: Callable[..., Any]
    features: Callable[..., Any]
    errors: Callable[..., Any]


def configuration(folder: pathlib.Path, *fields: str) -> Any:
    """The configuration of a run on FOLDER/paired."""
    given = [f"--config.{one}" for one in (*SETTINGS, f"data.dir={folder / 'paired'}", *fields)]
    return training.parse(["--config", str(CONFIG), "--workdir", str(folder), *given]).config


def make_programs(cfg: Any) -> Programs:
    """The programs of a configuration: the objective, optimiser and streams of skysense_jax.train, but the seed and
    objective.cross are arguments, or each of fifteen runs would compile a program of its own.
    """
    contract = plans.make_contract(cfg)
    shapes = state.batch_shapes(recipes.recipe_of(cfg).batch_spec(cfg, contract), meshes.make_mesh(cfg.mesh.to_dict()))
    objective = msgfm_objective.make_objective(cfg, contract)
    init = functools.partial(state.init_state, objective, shapes)
    mask = optim.decay_mask(jax.eval_shape(init, 0).params)

    def step(now: Any, batch: Any, seed: jax.Array, cross: jax.Array) -> Any:
        given = types.SimpleNamespace(
            **{name: cfg[name] for name in ("steps", "data", "model", "optim", "schedule")},
            seed=seed,
            objective=types.SimpleNamespace(**(dict(cfg.objective) | {"cross": cross})),
        )
        return make_step(msgfm_objective.make_objective(given, contract), given, mask)(now, batch)

    features = functools.partial(
        msgfm_outputs.encoder_features, cfg.model, contract, msgfm.make_model(cfg.model, contract)
    )
    return Programs(
        cfg,
        contract,
        float(objective.flops(shapes)),
        jax.jit(init),
        jax.jit(step, donate_argnums=0),
        jax.jit(features),
        msgfm_held_out.make_errors(cfg, contract),
    )


def probes(programs: Programs, encoders: Mapping[str, Any]) -> dict[str, Any]:
    """Linear probe and kNN on the frozen features of all sensors, as evals.compare has them. encoders: by method."""

    def method(encoder: Any) -> rows.Method:
        return lambda inputs: {"scene": np.asarray(programs.features(encoder, inputs)["image"])}

    cfg, methods = programs.cfg, {name: method(encoder) for name, encoder in encoders.items()}
    parts = []
    for split in ("train", "test"):
        batches = whole_places.eval_batches(cfg, programs.contract, split, int(cfg.eval.batch))
        parts.append(rows.collect(batches, methods, ("scene",), patch=int(cfg.eval.patch))["scene"])
    return compare.compare(
        *parts, k=cfg.eval.knn_k, temperature=cfg.eval.knn_temp, resamples=cfg.eval.bootstrap, seed=0
    )


def teacher(folder: pathlib.Path, seed: int) -> str:
    """FOLDER/teacher-SEED, the run whose network is the teacher of a seed: the student's without experts, trained alone
    on the HR images of the unpaired places, for as many updates. It stands in for one of natural images: it has seen
    colour pictures of other places, no other sensor and no label. Trained by skysense_jax.train, which goes on with
    what is there.
    """
    workdir = folder / f"teacher-{seed}"
    cfg = configuration(
        folder,
        *FIELDS["dense"],
        f"data.dir={folder / 'unpaired'}",
        f"seed={TEACHERS + seed}",
        "run.picture_every=0",
        "run.save_every=500",
        "run.log_every=100",
    )
    with cfg.unlocked():
        for section in (cfg.data.bands, cfg.data.eval_dates, cfg.optim.lr_scale):
            for name in [name for name in section if name != TAUGHT]:
                del section[name]
    if status := training.train(training.Options(cfg, paths.absolute(workdir))):
        raise RuntimeError(f"the training of {workdir} ended with {status}")
    return str(workdir)


def begin(programs: Mapping[str, Programs], folder: pathlib.Path, name: str, seed: int) -> Any:
    """The state that a variant starts from."""
    fresh = programs[ARCHITECTURE[name]].init(seed)
    if name != "distilled":
        return fresh
    return init_from.with_teacher(
        configuration(folder, *FIELDS[name], f"objective.distill.path={teacher(folder, seed)}"), fresh
    )


def train(programs: Mapping[str, Programs], folder: pathlib.Path, variants: Sequence[str], seed: int) -> dict[str, Any]:
    """The variants of a seed, one step of each in turn on the same batch (of its datasets): variant -> (encoder, what
    each metric said last, seconds of the steps)."""
    states = {name: begin(programs, folder, name, seed) for name in variants}
    streams = {}
    for mixed in {name == "unpaired" for name in variants}:
        also = (str(folder / "unpaired"),) if mixed else ()
        cfg = configuration(folder, f"data.also={also}")
        streams[mixed] = one_sensor.train_dataset(cfg, programs["moe"].contract, seed)
    seconds: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in variants}
    said: dict[str, dict[str, Any]] = {name: {} for name in variants}
    total = programs["moe"].cfg.steps
    for number in range(total):
        batches = {mixed: stream[number] for mixed, stream in streams.items()}
        for name in variants:
            wall, cpu = time.perf_counter(), time.process_time()
            states[name], measured = programs[ARCHITECTURE[name]].step(
                states[name], batches[name == "unpaired"], seed, CROSS.get(name, 0.5)
            )
            measured = metrics.plain(measured)
            seconds[name]["wall"].append(time.perf_counter() - wall)
            seconds[name]["cpu"].append(time.process_time() - cpu)
            said[name] |= {key: value for key, value in measured.items() if value != "nan"}
        if (number + 1) % 25 == 0:
            print(
                f"seed {seed}, step {number + 1} of {total}: "
                + ", ".join(f"{name} {one['loss/mim']:.3f}" for name, one in said.items()),
                file=sys.stderr,
                flush=True,
            )
    return {name: (states[name].params["encoder"], said[name], seconds[name]) for name in variants}


def one_seed(programs: Mapping[str, Programs], folder: pathlib.Path, seed: int) -> None:
    """Runs and scores of a seed, what is missing of them."""
    files = {name: folder / f"{name}-{seed}.json" for name in VARIANTS}
    missing = [name for name, file in files.items() if not file.exists()]
    for name, (encoder, said, seconds) in (train(programs, folder, missing, seed) if missing else {}).items():
        compiled = programs[ARCHITECTURE[name]]
        untrained = {"untrained": compiled.init(seed).params["encoder"]} if name == "half" else {}
        result = probes(compiled, {"trained": encoder, **untrained})
        result |= {
            "held_out": msgfm_held_out.held_out(compiled.cfg, compiled.contract, compiled.errors, encoder),
            "last": said,
            "flops": compiled.flops,
            "batch": int(compiled.cfg.data.batch),
            "seconds": {
                kind: {"median": statistics.median(values[1:]), "least": min(values[1:])}
                for kind, values in seconds.items()
            },
        }
        print(compare.table(result, f"{name} {seed}"), json.dumps(result["held_out"]), sep="\n", flush=True)
        write_atomically(files[name], (json.dumps(result, indent=1) + "\n").encode())


def read_scores(folder: pathlib.Path) -> dict[str, dict[int, Any]]:
    """Variant -> seed -> scores, of what is there."""
    return {
        variant: {
            int(file.stem.rpartition("-")[2]): json.loads(file.read_text())
            for file in sorted(folder.glob(f"{variant}-*.json"))
        }
        for variant in VARIANTS
    }


def score(one: Mapping[str, Any], probe: str, method: str) -> float:
    """Accuracy on the test places; macro average precision where places have several labels."""
    found = next(entry for entry in one["results"] if (entry["probe"], entry["method"]) == (probe, method))
    return next(iter(found["scores"].values()))["value"]


def probe_table(scores: Mapping[str, Mapping[int, Any]]) -> str:
    """Linear probe and kNN, one row per variant, and the difference to p = 0.5 of the same seeds."""
    lines = ["| variant | seeds | linear probe | over p = 0.5 | kNN | over p = 0.5 |", "|---|---|---|---|---|---|"]
    base = scores["half"]
    listed = {name: (text, scores[name], "trained") for name, text in VARIANTS.items()}
    listed["untrained"] = ("the network of p = 0.5 untrained", base, "untrained")
    for name, (text, found, method) in listed.items():
        cells = [text, str(len(found))]
        for probe in ("linear", "knn"):
            gain = [
                score(one, probe, method) - score(base[seed], probe, "trained")
                for seed, one in found.items()
                if seed in base
            ]
            cells += [
                mean_and_interval([score(one, probe, method) for one in found.values()]) if found else "",
                mean_and_interval(gain, "+") if gain and name != "half" else "",
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def reconstruction_table(scores: Mapping[str, Mapping[int, Any]]) -> str:
    """Held-out error, one row per direction, one column per variant that has scores."""
    scores = {name: found for name, found in scores.items() if found}
    columns = [f"{name}, seeds: {len(found)}" for name, found in scores.items()]
    lines = ["| from - to | the mean | " + " | ".join(columns) + " |", "|---|---|" + "---|" * len(columns)]
    for direction in DIRECTIONS:
        means = {one["held_out"][direction]["mean"] for found in scores.values() for one in found.values()}
        cells = [f"{max(means):.3f}" if means else ""]
        for found in scores.values():
            cells.append(mean_and_interval([one["held_out"][direction]["error"] for one in found.values()]))
        lines.append(f"| {direction} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def speed_table(scores: Mapping[str, Mapping[int, Any]]) -> str:
    """Time of a step, dense and with the mixture, and what the mixture adds; means over seeds."""
    lines = ["| step | model FLOPs | CPU time, median | fastest step | images/s of it |", "|---|---|---|---|---|"]
    both = [(scores["dense"][seed], scores["half"][seed]) for seed in scores["half"] if seed in scores["dense"]]
    if not both:
        return "\n".join(lines)

    def seconds(one: Mapping[str, Any], kind: str, which: str) -> float:
        return one["seconds"][kind][which]

    for at, text in enumerate(("dense", "4 experts, top-1, capacity 1.25")):
        cpu = np.mean([seconds(pair[at], "cpu", "median") for pair in both])
        wall = min(seconds(pair[at], "wall", "least") for pair in both)
        lines.append(
            f"| {text} | {both[0][at]['flops']:.2e} | {cpu * 1e3:.1f} ms | {wall * 1e3:.1f} ms "
            f"| {both[0][at]['batch'] / wall:.0f} |"
        )
    more = [
        mean_and_interval([100 * (seconds(mixed, *key) / seconds(dense, *key) - 1) for dense, mixed in both], "+")
        for key in (("cpu", "median"), ("wall", "least"))
    ]
    flops = 100 * (both[0][1]["flops"] / both[0][0]["flops"] - 1)
    return "\n".join([*lines, f"| the mixture adds, % | {flops:+.1f} | {more[0]} | {more[1]} | |"])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--data", type=pathlib.Path, help="dataset whose places are used, read once")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="only the tables of the scores that are there")
    parser.add_argument("--out", type=pathlib.Path, help="page with the marks to write the tables between")
    args = parser.parse_args()
    folder = args.folder.resolve()
    if not args.table:
        if not (folder / "paired" / records.METADATA).exists():
            if args.data is None:
                parser.error(f"{folder} has no places yet: give --data DATASET")
            split_places(args.data.resolve(), folder)
        programs = {name: make_programs(configuration(folder, *fields)) for name, fields in FIELDS.items()}
        for seed in args.seeds:
            one_seed(programs, folder, seed)
    scores = read_scores(folder)
    text = "\n\n".join((probe_table(scores), reconstruction_table(scores), speed_table(scores))) + "\n"
    print(text)
    if args.out:
        write_between(args.out, MARKS, text)


if __name__ == "__main__":
    main()
