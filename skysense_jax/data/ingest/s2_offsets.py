"""Finds the additive offset of digital numbers in metadata, as ESA writes it for Sentinel-2. Never from the date.

Since processing baseline 04.00 ESA's digital numbers carry +1000: reflectance = (DN + OFFSET) / 10000 with OFFSET =
-1000, given per band as BOA_ADD_OFFSET (L2A) or RADIO_ADD_OFFSET (L1C) in the product's MTD_MSI*.xml. Older scenes
were reprocessed with it and many archives have removed it again, so a date says nothing (ESA, Sentinel-2 Products
Specification Document; torchgeo issue 3224). The names of tags and files stand in the sensor's row
(:class:`skysense_jax.sensor_row.Offset`), so that another sensor's offset is read in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

import rasterio

from skysense_jax.data.ingest.raster import RasterRefused
from skysense_jax.sensors import Offset, Sensor, band_name

_MAX_XML = 2**24


def parse_xml(path: Path) -> ElementTree.Element:
    """Root element of a small UTF-8 XML file without document type or entities (no entity bombs).

    Raises:
        RasterRefused: anything else.
    """
    if path.stat().st_size > _MAX_XML:
        raise RasterRefused(f"{path.name} is larger than {_MAX_XML} bytes")
    data = path.read_bytes()
    if b"<!DOCTYPE" in data.upper() or b"<!ENTITY" in data.upper() or b"\x00" in data:
        raise RasterRefused(f"{path.name} declares a document type or entities, or is not UTF-8: not read")
    try:
        return ElementTree.fromstring(data)
    except ElementTree.ParseError as error:
        raise RasterRefused(f"{path.name} is not XML: {error}") from error


def _product_file(rule: Offset, path: Path, root: Path) -> Path | None:
    """The product's metadata file: in the raster's folder, or at the top of the .SAFE folder that the raster lies in.

    Never above the catalog's root.
    """
    for folder in (path.parent, *path.parent.parents):
        if not folder.is_relative_to(root):
            return None
        if folder != path.parent and folder.suffix != ".SAFE":
            continue
        files = [folder / name for name in rule.product_files if (folder / name).is_file()]
        if len(files) > 1:
            raise RasterRefused(
                f"{folder.name} holds both {' and '.join(file.name for file in files)}: give the offset in the catalog"
            )
        if files:
            return files[0].resolve() if files[0].resolve().is_relative_to(root) else None
    return None


def offsets_of_product(sensor: Sensor, rule: Offset, path: Path) -> dict[str, float] | None:
    """Band -> offset in digital numbers, from a product's metadata file.

    Args:
        sensor: row of the table; the metadata numbers its bands 0, 1, ... in this order.
        rule: the row's `offset`.
        path: the XML file.

    Returns:
        Offsets of all bands, all 0 where the processing baseline is older than 04.00; None where it does not say.

    Raises:
        RasterRefused: the quantification is another than the rule's, or something in it cannot be read.
    """
    texts: dict[str, list[tuple[str | None, str]]] = {}
    for element in parse_xml(path).iter():
        name = element.tag.rpartition("}")[2]
        texts.setdefault(name, []).append((element.get("band_id"), (element.text or "").strip()))
    try:
        for name in ("BOA_QUANTIFICATION_VALUE", "QUANTIFICATION_VALUE"):
            if any(float(value) != rule.quantification for _, value in texts.get(name, ()) if value):
                raise RasterRefused(
                    f"{path.name}: {name} is not {rule.quantification:.0f}; give scale and offset in the catalog"
                )
        for name in rule.tags:
            if name in texts:
                return {sensor.bands[int(band)]: float(value) for band, value in texts[name] if band is not None}
        baselines = [float(value) for _, value in texts.get("PROCESSING_BASELINE", ())]
    except (ValueError, IndexError) as error:
        if isinstance(error, RasterRefused):
            raise
        raise RasterRefused(f"{path.name}: unreadable offset, quantification or baseline: {error}") from error
    return dict.fromkeys(sensor.bands, 0.0) if baselines and max(baselines) < 4.0 else None


def _from_tags(sensor: Sensor, tags: Mapping[str, str], bands: Mapping[str, int], count: int) -> dict[str, float]:
    """Band -> offset that the tags of a file, or of one of its bands (`count` 1), state."""
    offsets: dict[str, float] = {}
    for key, text in tags.items():
        for name in sensor.offset.tags if sensor.offset else ():
            if not key.upper().startswith(name):
                continue
            try:
                values = [float(part) for part in text.replace(";", ",").replace(" ", ",").split(",") if part]
                suffix = key[len(name) :].strip("_")
                if suffix and len(values) == 1:
                    offsets[band_name(sensor.name, suffix)] = values[0]
                elif not suffix and len(values) in (1, count):
                    offsets |= {
                        band: values[0] if len(values) == 1 else values[index - 1] for band, index in bands.items()
                    }
                else:
                    raise ValueError(f"{len(values)} values for {count} bands")
            except ValueError as error:
                raise RasterRefused(f"tag {key}={text!r} is not an offset: {error}") from error
    return offsets


def known_offset(
    sensor: Sensor, file: rasterio.DatasetReader, path: Path, root: Path, bands: Mapping[str, int]
) -> tuple[list[float], str] | None:
    """The offset that metadata state, in digital numbers.

    Args:
        sensor: row of the table.
        file: the open raster.
        path: where it lies.
        root: the catalog's folder; nothing above it is read.
        bands: name of each band to read -> its 1-based index in the file.

    Returns:
        (offset of each band, what states it), or None where metadata do not say.

    Raises:
        RasterRefused: metadata contradict each other, or cannot be read.
    """
    if sensor.offset is None:
        return None
    tags = _from_tags(sensor, file.tags(), bands, file.count)
    for band, index in bands.items():
        tags |= _from_tags(sensor, file.tags(index), {band: 1}, 1)
    product = _product_file(sensor.offset, path, root)
    stated = None if product is None else offsets_of_product(sensor, sensor.offset, product)
    if tags and all(band in tags for band in bands):
        if product and stated and any(stated.get(band, tags[band]) != tags[band] for band in bands):
            raise RasterRefused(
                f"the file's tags say offset {tags}, {product.name} says {stated}: settle it in the catalog's offset "
                "column"
            )
        return [tags[band] for band in bands], "file tags"
    if product and stated is not None and all(band in stated for band in bands):
        return [stated[band] for band in bands], product.name
    return None
