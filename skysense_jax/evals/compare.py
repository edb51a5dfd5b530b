"""Methods x probes on the same rows: scores with intervals over places, and paired differences between methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from skysense_jax.evals import baselines, bootstrap, knn, linear, metrics, rows


def _scores(
    target: np.ndarray, output: np.ndarray, place: np.ndarray, weights: np.ndarray, multilabel: bool
) -> dict[str, tuple[float, np.ndarray]]:
    """For every metric (value, bootstrap samples [B]) of one method's class scores [M, K]."""
    if multilabel:
        value = metrics.macro_map(target, output)
        chunks = np.array_split(weights, -(-len(weights) // 64))  # bounds the [resamples, rows] tables
        samples = np.concatenate([metrics.macro_map(target, output, chunk[:, place]) for chunk in chunks])
        return {"macro_map": (float(value), samples)}
    classes = target.shape[1]
    table = metrics.confusion_per_place(target.argmax(1), output.argmax(1), place, classes, weights.shape[1])
    values = metrics.from_confusion(table.sum(0))
    resampled = metrics.from_confusion(np.einsum("bp,pij->bij", weights.astype(np.float64), table))
    return {name: (float(values[name]), resampled[name]) for name in metrics.SINGLE_LABEL}


def compare(
    train: rows.Rows,
    test: rows.Rows,
    *,
    k: int,
    temperature: float,
    resamples: int,
    seed: int,
    statistics: Sequence[str] = ("statistics",),
) -> dict[str, Any]:
    """Scores kNN and linear probe of every method: the training rows fit and choose, the test rows are only scored.

    Args:
        train: labelled rows.
        test: others, with the same methods.
        k: neighbours of the vote.
        temperature: of the vote.
        resamples: of the bootstrap over the test places.
        seed: of the bootstrap.
        statistics: methods whose features are raw statistics in different units, standardised on the training rows
            first.

    Returns:
        A JSON-able dict: "n" (rows and places of both parts), "multilabel", "classes" (columns that occur),
        "untrainable_classes" (in the test part only: they count as errors), "majority" (share of the largest training
        class in the test rows; single label), "results" [{method, probe, scores: {metric: {value, interval}},
        strength?}], "differences" [{probe, metric, first, second, difference, interval, apart}] of the first method
        against every other over the same resamples.

    Raises:
        ValueError: both parts share a place, or there are fewer than two training places.
    """
    shared = set(train.place.tolist()) & set(test.place.tolist())
    if shared:
        raise ValueError(
            f"{len(shared)} place(s) are in the training and in the test part, for example {sorted(shared)[0]!r}; "
            "rebuild the dataset with one split per place"
        )
    occurring = np.flatnonzero(train.target.any(0) | test.target.any(0))
    fit, truth = train.target[:, occurring], test.target[:, occurring]
    multilabel = bool((fit.sum(1) > 1).any() or (truth.sum(1) > 1).any())
    train_place = np.unique(train.place, return_inverse=True)[1]
    places, test_place = np.unique(test.place, return_inverse=True)
    weights = bootstrap.place_weights(len(places), resamples, seed)

    results: list[dict[str, Any]] = []
    samples: dict[tuple[str, str, str], tuple[float, np.ndarray]] = {}
    for method in train.features:
        known, asked = train.features[method], test.features[method]
        if method in statistics:
            known, asked = baselines.standardise(known, asked)
        probe = linear.linear_probe(known, fit, train_place, asked, multilabel=multilabel)
        vote = knn.knn_scores(known, fit, asked, k=k, temperature=temperature)
        for name, output in (("knn", vote), ("linear", probe.scores)):
            scores = _scores(truth, output, test_place, weights, multilabel)
            entry: dict[str, Any] = {"method": method, "probe": name}
            entry["scores"] = {
                metric: {"value": value, "interval": list(bootstrap.interval(resampled))}
                for metric, (value, resampled) in scores.items()
            }
            samples |= {(method, name, metric): score for metric, score in scores.items()}
            if name == "linear":
                entry["strength"] = probe.strength
            results.append(entry)

    differences = []
    first, *others = train.features
    for other in others:
        for name in ("knn", "linear"):
            for metric in results[0]["scores"]:
                first_value, first_samples = samples[first, name, metric]
                other_value, other_samples = samples[other, name, metric]
                differences.append(
                    {
                        "probe": name,
                        "metric": metric,
                        "first": first,
                        "second": other,
                        **bootstrap.paired(first_samples, other_samples, first_value, other_value),
                    }
                )
    return {
        "n": {
            "train_rows": len(fit),
            "train_places": int(train_place.max()) + 1,
            "test_rows": len(truth),
            "test_places": len(places),
        },
        "multilabel": multilabel,
        "classes": [int(label) for label in occurring],
        "untrainable_classes": [int(label) for label in occurring[~fit.any(0)]],
        "majority": None if multilabel else float(truth[:, fit.sum(0).argmax()].mean()),
        "results": results,
        "differences": differences,
    }


def table(report: dict[str, Any], title: str) -> str:
    """Lays a report out as text.

    Args:
        report: of :func:`compare`.
        title: first words of the text.

    Returns:
        One line per method and probe, then the paired differences (* = the interval does not hold 0).
    """
    n, names = report["n"], list(report["results"][0]["scores"])
    lines = [
        f"{title}: {n['test_rows']} test rows of {n['test_places']} places, {n['train_rows']} training rows of "
        f"{n['train_places']} places, {len(report['classes'])} classes"
        + ("" if report["majority"] is None else f", majority class {report['majority']:.3f}")
    ]
    cells = {}
    for entry in report["results"]:
        cells[entry["method"], entry["probe"]] = [
            f"{s['value']:.3f} [{s['interval'][0]:.3f}, {s['interval'][1]:.3f}]" for s in entry["scores"].values()
        ]
    for entry in report["differences"]:
        low, high = entry["interval"]
        cells.setdefault((f"{entry['first']} - {entry['second']}", entry["probe"]), []).append(
            f"{entry['difference']:+.3f} [{low:+.3f}, {high:+.3f}]{'*' if entry['apart'] else ''}"
        )
    width = max(len(method) for method, _ in cells) + 2
    lines.append(f"  {'method':<{width}}{'probe':<8}" + "".join(f"{name:<26}" for name in names).rstrip())
    lines += [
        (f"  {method:<{width}}{probe:<8}" + "".join(f"{cell:<26}" for cell in row)).rstrip()
        for (method, probe), row in cells.items()
    ]
    if report["untrainable_classes"]:
        lines.append(f"  classes without a training row count as errors: {report['untrainable_classes']}")
    return "\n".join(lines)
