"""The ingest report: counts that add up over places, and the tables printed from them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from skysense_jax.core.days import iso_date
from skysense_jax.data.ingest.catalog import Row

Report = dict[str, Any]
"""What a build did, plain JSON values: see :func:`new_report`."""

REFUSED, USED = "refused", "used"
_MAX_PRINTED, _MAX_FILES = 30, 5


def new_report(sensors: Sequence[str]) -> Report:
    """An empty report: plain JSON values, sums only, so that the reports of parts add up.

    The entry of a sensor counts tiles that have the sensor, acquisitions, dates_squared (the sum over tiles of the
    squared number of acquisitions), dropped acquisitions (without a valid pixel in the tile), pixels, valid and clear
    pixels over the stored acquisitions, and has the first and last day. `files` has one entry per raster with the
    decisions that were taken.
    """
    per_sensor: dict[str, int | None] = {
        "tiles": 0,
        "acquisitions": 0,
        "dates_squared": 0,
        "dropped": 0,
        "pixels": 0,
        "valid": 0,
        "clear": 0,
        "first": None,
        "last": None,
    }
    return {
        "places": 0,
        "tiles": 0,
        "tiles_dropped": 0,
        "labelled": 0,
        "mapped": 0,
        "places_without_tiles": [],
        "sensors": {name: dict(per_sensor) for name in sensors},
        "files": [],
    }


def add_dates(entry: dict[str, Any], days: Iterable[int]) -> None:
    """Widens the first and last day of a sensor's entry, in place.

    Args:
        entry: entry of one sensor in a report.
        days: days since 1970-01-01; negative ones are unknown and left out.
    """
    known = [int(day) for day in days if day >= 0]
    if known:
        entry["first"] = min(known + ([] if entry["first"] is None else [entry["first"]]))
        entry["last"] = max(known + ([] if entry["last"] is None else [entry["last"]]))


def merge(total: Report, part: Report) -> None:
    """Adds one report to another, in place.

    Args:
        total: the report that grows.
        part: the report that is added; it has no sensor that `total` does not have.
    """
    for key in ("places", "tiles", "tiles_dropped", "labelled", "mapped"):
        total[key] += part[key]
    for key in ("places_without_tiles", "files"):
        total[key].extend(part[key])
    for name, entry in part["sensors"].items():
        sums = total["sensors"][name]
        for key, value in entry.items():
            if key not in ("first", "last"):
                sums[key] += value
        add_dates(sums, [day for day in (entry["first"], entry["last"]) if day is not None])


def file_entry(row: Row, status: str, **facts: Any) -> dict[str, Any]:
    """The entry of one catalog row in a report's `files`.

    Args:
        row: the catalog row.
        status: USED or REFUSED.
        **facts: more fields of the entry, as JSON values.

    Returns:
        {"row", "place", "sensor", "path", "status"} and the facts.
    """
    sensor = f"mask:{row.sensor}" if row.kind == "mask" else row.sensor or row.kind
    return {"row": row.number, "place": row.place, "sensor": sensor, "path": row.name, "status": status} | facts


def summary(total: Report) -> dict[str, Any]:
    """The report as places.json stores it.

    The used files are left out (files.jsonl has them); the decisions taken on them are counted.
    """
    decisions: dict[str, int] = {}
    for entry in total["files"]:
        if entry["status"] == USED and "units" in entry:
            source = entry.get("offset_source") or entry.get("units_source")
            offset = (
                f", offset {'/'.join(f'{value:g}' for value in entry['offset_applied'])}"
                if "offset_applied" in entry
                else ""
            )
            key = f"{entry['sensor']}: {entry['units']}{offset}" + (f" ({source})" if source else "")
            decisions[key] = decisions.get(key, 0) + 1
    refused = [entry for entry in total["files"] if entry["status"] == REFUSED]
    notes = Counter(f"{entry['sensor']}: {entry['note']}" for entry in total["files"] if "note" in entry)
    rest = {key: value for key, value in total.items() if key != "files"}
    return rest | {
        "files": {"used": len(total["files"]) - len(refused), "refused": len(refused)},
        "decisions": dict(sorted(decisions.items())),
        "notes": dict(sorted(notes.items())),
        "refused": refused,
    }


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    widths = [max(len(str(row[i])) for row in (head, *rows)) for i in range(len(head))]
    return [
        "  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    ]


def _day(day: int | None) -> str:
    return "-" if day is None else iso_date(day)


def render(report: Mapping[str, Any]) -> str:
    """The report of :func:`summary` as text: counts, dates per sensor, nodata, decisions, refusals with reasons."""
    lines = [
        f"places {report['places']}   tiles {report['tiles']}   tiles without a valid pixel, dropped "
        f"{report['tiles_dropped']}   with scene label {report['labelled']}   with label map {report['mapped']}",
        f"files used {report['files']['used']}, refused {report['files']['refused']}",
        "",
    ]
    rows = []
    for name, entry in report["sensors"].items():
        tiles, count, pixels = entry["tiles"], entry["acquisitions"], entry["pixels"]
        mean = count / tiles if tiles else 0.0
        spread = max(0.0, entry["dates_squared"] / tiles - mean**2) ** 0.5 if tiles else 0.0
        rows.append(
            (
                name,
                tiles,
                f"{mean:.1f} +- {spread:.1f}",
                _day(entry["first"]),
                _day(entry["last"]),
                f"{100 * (1 - entry['valid'] / pixels):.1f}" if pixels else "-",
                f"{100 * entry['clear'] / pixels:.1f}" if pixels else "-",
                entry["dropped"],
            )
        )
    lines += _table(("sensor", "tiles", "dates/tile", "first", "last", "nodata %", "clear %", "dropped dates"), rows)
    if report["decisions"]:
        lines += ["", "what the numbers were taken for (files):"] + [
            f"  {count:6d}  {key}" for key, count in report["decisions"].items()
        ]
    if report["notes"]:
        lines += ["", "to be checked (files):"] + [f"  {count:6d}  {key}" for key, count in report["notes"].items()]
    if report["places_without_tiles"]:
        names = report["places_without_tiles"]
        lines += [
            "",
            f"places without anything usable: {len(names)} "
            f"({', '.join(names[:10])}{', ...' if len(names) > 10 else ''})",
        ]
    return "\n".join(lines + _refusals(report["refused"]))


def _refusals(refused: Sequence[Mapping[str, Any]]) -> list[str]:
    """One block of lines per reason: how many files, and a few of them.

    The hint of a reason differs from file to file and is shown for the first file.
    """
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    for entry in refused:
        grouped.setdefault(entry["reason"].partition(" Hint only:")[0], []).append(entry)
    lines = ["", f"refused ({len(refused)}):"] if refused else []
    for entries in list(grouped.values())[:_MAX_PRINTED]:
        lines.append(f"  {len(entries)} x {entries[0]['reason']}")
        lines += [
            "      " + line
            for line in _table(
                ("row", "place", "sensor", "path"),
                [(entry["row"], entry["place"], entry["sensor"], entry["path"]) for entry in entries[:_MAX_FILES]],
            )
        ]
        if len(entries) > _MAX_FILES:
            lines.append(f"      ... and {len(entries) - _MAX_FILES} more of this reason")
    if len(grouped) > _MAX_PRINTED:
        lines.append(f"  ... and {len(grouped) - _MAX_PRINTED} more reasons (all are in files.jsonl)")
    return lines
