"""Finds the additive offset of a Sentinel-2 raster in metadata. Never from the acquisition date.

Since processing baseline 04.00 ESA's digital numbers carry +1000: reflectance = (DN + OFFSET) / 10000 with OFFSET =
-1000, given per band as BOA_ADD_OFFSET (L2A) or RADIO_ADD_OFFSET (L1C) in the product's MTD_MSI*.xml. Older scenes
were reprocessed with it and many archives have removed it again, so a date says nothing (ESA, Sentinel-2 Products
Specification Document; torchgeo issue 3224).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

import rasterio

from skysense_jax.data.ingest.raster import RasterRefused
from skysense_jax.sensors import SENSORS, band_name

TAGS = ("BOA_ADD_OFFSET", "RADIO_ADD_OFFSET")
PRODUCT_FILES = ("MTD_MSIL2A.xml", "MTD_MSIL1C.xml")
QUANTIFICATION = 10000.0
_MAX_XML = 2**24


def parse_xml(path: Path) -> ElementTree.Element:
    """Root element of a small UTF-8 XML file without document type or entities (no entity bombs). Raises
    RasterRefused.
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


def _product_file(path: Path, root: Path) -> Path | None:
    """The product's metadata file: in the raster's folder, or at the top of the .SAFE folder it lies in; never above
    the catalog's root.
    """
    for folder in (path.parent, *path.parent.parents):
        if not folder.is_relative_to(root):
            return None
        if folder != path.parent and folder.suffix != ".SAFE":
            continue
        found = [folder / name for name in PRODUCT_FILES if (folder / name).is_file()]
        if len(found) > 1:
            raise RasterRefused(
                f"{folder.name} holds both {' and '.join(PRODUCT_FILES)}: give the offset in the catalog"
            )
        if found:
            return found[0].resolve() if found[0].resolve().is_relative_to(root) else None
    return None


def offsets_of_product(path: Path) -> dict[str, float] | None:
    """Band -> offset from a product's MTD_MSI*.xml; all 0 where its baseline is older than 04.00; None where it does
    not say.

    Raises RasterRefused where the quantification is not 10000.
    """
    texts: dict[str, list[tuple[str | None, str]]] = {}
    for element in parse_xml(path).iter():
        name = element.tag.rpartition("}")[2]
        texts.setdefault(name, []).append((element.get("band_id"), (element.text or "").strip()))
    bands = SENSORS["s2"].bands  # the metadata numbers the bands 0..12 in this order
    try:
        for name in ("BOA_QUANTIFICATION_VALUE", "QUANTIFICATION_VALUE"):
            if any(float(value) != QUANTIFICATION for _, value in texts.get(name, ()) if value):
                raise RasterRefused(
                    f"{path.name}: {name} is not {QUANTIFICATION:.0f}; give scale and offset in the catalog"
                )
        for name in TAGS:
            if name in texts:
                return {bands[int(band)]: float(value) for band, value in texts[name] if band is not None}
        baselines = [float(value) for _, value in texts.get("PROCESSING_BASELINE", ())]
    except (ValueError, IndexError) as error:
        if isinstance(error, RasterRefused):
            raise
        raise RasterRefused(f"{path.name}: unreadable offset, quantification or baseline: {error}") from error
    return dict.fromkeys(bands, 0.0) if baselines and max(baselines) < 4.0 else None


def _from_tags(tags: Mapping[str, str], bands: Sequence[str], indexes: Sequence[int], count: int) -> dict[str, float]:
    found: dict[str, float] = {}
    for key, text in tags.items():
        for name in TAGS:
            if not key.upper().startswith(name):
                continue
            try:
                values = [float(part) for part in text.replace(";", ",").replace(" ", ",").split(",") if part]
                suffix = key[len(name) :].strip("_")
                if suffix and len(values) == 1:
                    found[band_name("s2", suffix)] = values[0]
                elif not suffix and len(values) in (1, count):
                    found |= {
                        band: values[0] if len(values) == 1 else values[index - 1]
                        for band, index in zip(bands, indexes)
                    }
                else:
                    raise ValueError(f"{len(values)} values for {count} bands")
            except ValueError as error:
                raise RasterRefused(f"tag {key}={text!r} is not an offset: {error}") from error
    return found


def known_offset(
    file: rasterio.DatasetReader, path: Path, root: Path, bands: Sequence[str], indexes: Sequence[int]
) -> tuple[list[float], str] | None:
    """(offset in DN per band, where it was found), or None where metadata does not say. Raises RasterRefused on
    contradicting metadata.
    """
    tags = _from_tags(file.tags(), bands, indexes, file.count)
    for band, index in zip(bands, indexes):
        tags |= _from_tags(file.tags(index), [band], [1], 1)
    product = _product_file(path, root)
    stated = offsets_of_product(product) if product is not None else None
    if tags and all(band in tags for band in bands):
        if stated and any(stated.get(band, tags[band]) != tags[band] for band in bands):
            raise RasterRefused(
                f"the file's tags say offset {tags}, {product.name} says {stated}: settle it in the catalog's offset "
                f"column"
            )
        return [tags[band] for band in bands], "file tags"
    if stated is not None and all(band in stated for band in bands):
        return [stated[band] for band in bands], product.name
    return None
