"""Opens one raster file safely and reads windows of it with validity. Nothing here knows places or units.

Guards, all before any pixel is allocated: driver allow-list, declared size, CRS, georeferencing, pixel type. GDAL's
sidecar files are not opened (a .aux.xml or .ovr can point GDAL at other files), except an external mask (.msk), which
is opened by us through the same allow-list. A sidecar that carries nodata or scaling is a refusal, because ignoring
it would change values silently.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import rasterio
from affine import Affine
from rasterio._err import CPLE_BaseError  # what PROJ and the warper raise directly; rasterio has no public name for it
from rasterio.crs import CRS
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import CRSError, NotGeoreferencedWarning, RasterioError, RasterioIOError
from rasterio.windows import Window

SIGNATURES = {
    b"II*\x00": "GTiff",
    b"MM\x00*": "GTiff",
    b"II+\x00": "GTiff",
    b"MM\x00+": "GTiff",
    b"\x00\x00\x00\x0cjP  ": "JP2OpenJPEG",
    b"\xff\x4f\xff\x51": "JP2OpenJPEG",
}
"""First bytes of a file -> the one GDAL driver it is opened with. Formats that are opened: GeoTIFF (COG is GeoTIFF)
and JPEG 2000 (ESA's Sentinel-2 SAFE). Everything else is refused: VRT and ENVI headers can name other files, and rare
drivers are where the memory errors of the last years were.
"""

MAX_PIXELS = 2**33
"""Default limit of width * height * bands a file may declare (a 10 m Sentinel-2 tile with 13 bands is 2**30.5)."""

MAX_WINDOW_PIXELS = 2**27
"""Limit of width * height * bands read at once (512 MB as float32)."""

GDAL_ERRORS = (RasterioError, CRSError, CPLE_BaseError)
"""Everything GDAL and PROJ report through rasterio."""

MAX_BANDS = 512
_OPEN_FILES = 128
_SIDECAR_FACTS = (b"<NoDataValue", b"<Scale>", b"<Offset>")


class RasterRefused(ValueError):
    """One file cannot be used; the message is the reason."""


class BrokenFile(RasterRefused):
    """A file that passed inspection failed while its pixels were read."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, reason


class Header(NamedTuple):
    """What a file declares.

    bands: their number. transform: pixel (column, row) -> (x, y). nodata: per band, None where unset. alpha: 1-based
    index or 0. mask: "inside" the file, "beside" it (a .msk file) or "".
    """

    path: Path
    width: int
    height: int
    bands: int
    dtype: np.dtype
    crs: CRS
    transform: Affine
    nodata: tuple[float | None, ...]
    alpha: int
    mask: str

    @property
    def step(self) -> float:
        """Side of a pixel in CRS units (the larger one)."""
        return max(
            float(np.hypot(self.transform.a, self.transform.d)), float(np.hypot(self.transform.b, self.transform.e))
        )


def gdal_settings(cache_mb: int = 64) -> rasterio.Env:
    """GDAL for a worker: a bounded block cache of `cache_mb` MB, no sidecars, no directory listing, one thread.

    The processes are the parallelism.
    """
    return rasterio.Env(
        GDAL_CACHEMAX=cache_mb, GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR", GDAL_NUM_THREADS="1", PROJ_NETWORK="OFF"
    )


def open_raster(path: Path) -> rasterio.DatasetReader:
    """Opens a local file with an allowed driver. Raises RasterRefused."""
    try:
        with path.open("rb") as stream:
            first = stream.read(12)
    except OSError as error:
        raise RasterRefused(f"cannot be read: {error}") from error
    driver = next((name for signature, name in SIGNATURES.items() if first.startswith(signature)), None)
    if driver is None:
        raise RasterRefused(
            "the file is empty"
            if not first
            else "neither a GeoTIFF nor a JPEG 2000 file (no other format is opened; convert it with `rio convert`; a "
            "folder of plain images is built apart, with --no-georeference)"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)  # becomes a refusal in `header`
            return rasterio.open(path, driver=driver, sharing=False)
    except RasterioIOError as error:
        raise RasterRefused(f"truncated or corrupt: {error}") from error


class Files:
    """Open handles of one process, the least recently used closed first.

    A place can have more rasters than a process may open.
    """

    def __init__(
        self, limit: int = _OPEN_FILES, opener: Callable[[Path], rasterio.DatasetReader] = open_raster
    ) -> None:
        """limit: files open at once. opener: path -> the open raster; raises RasterRefused."""
        self._limit, self._opener = limit, opener
        self._open: OrderedDict[Path, rasterio.DatasetReader] = OrderedDict()

    def get(self, path: Path) -> rasterio.DatasetReader:
        """The open raster; RasterRefused where it cannot be opened."""
        if path not in self._open:
            while len(self._open) >= self._limit:
                self._open.popitem(last=False)[1].close()
            self._open[path] = self._opener(path)
        self._open.move_to_end(path)
        return self._open[path]

    def close(self) -> None:
        """Closes all."""
        while self._open:
            self._open.popitem()[1].close()


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _located(file: rasterio.DatasetReader) -> None:
    """Refuses a file that does not say where on Earth its pixels lie."""
    if file.crs is None:
        where = " (it has ground control points only: rectify it first)" if file.gcps[0] else ""
        raise RasterRefused(
            f"no CRS{where}; write the right one into the file, for example `rio edit-info --crs EPSG:32631 FILE`; "
            "images that have none are built apart, with --no-georeference"
        )
    if not (file.crs.is_projected or file.crs.is_geographic):
        raise RasterRefused(
            f"CRS {file.crs.to_string()[:60]!r} is neither projected nor geographic: it cannot be located on Earth"
        )
    if file.transform == Affine.identity() or file.transform.determinant == 0:
        raise RasterRefused("no georeferencing: the file has a CRS but no transform")


def header(
    file: rasterio.DatasetReader, path: Path, catalog_nodata: bool, max_pixels: int, georeferenced: bool = True
) -> Header:
    """Checks what a file declares, before any pixel is read.

    Args:
        file: the open raster.
        path: where it lies.
        catalog_nodata: the catalog says what nodata is, so that a sidecar's word does not matter.
        max_pixels: limit of width * height * bands.
        georeferenced: it must say where it lies on Earth; otherwise CRS and transform are not looked at.

    Returns:
        The header.

    Raises:
        RasterRefused: the file cannot be used; the message is the reason.
    """
    if file.subdatasets:
        raise RasterRefused(
            f"holds {len(file.subdatasets)} images, of which only the first would be read: write each "
            "into a file of its own"
        )
    if file.count < 1 or file.count > MAX_BANDS:
        raise RasterRefused(f"{file.count} bands; between 1 and {MAX_BANDS} are read")
    declared = file.width * file.height * file.count
    if declared > max_pixels:
        raise RasterRefused(
            f"declares {file.width} x {file.height} x {file.count} = {declared:.3g} pixels, more than the limit "
            f"{max_pixels:.3g} (--max-pixels)"
        )
    if georeferenced:
        _located(file)
    dtypes = {np.dtype(name) for name in file.dtypes if not name.startswith("complex")}
    if len(dtypes) != 1 or any(name.startswith("complex") for name in file.dtypes):
        raise RasterRefused(f"pixel types {sorted(set(file.dtypes))}: one real type for all bands is read")
    sidecar = _beside(path, ".aux.xml")
    if not catalog_nodata and sidecar.is_file():
        with sidecar.open("rb") as stream:
            text = stream.read(2**22)
        if any(fact in text for fact in _SIDECAR_FACTS):
            raise RasterRefused(
                f"{sidecar.name} holds nodata or scaling, and sidecars are not read: put them into the catalog "
                "(nodata, scale, offset; nodata=none if there is none)"
            )
    alpha = next((index for index, colour in enumerate(file.colorinterp, 1) if colour == ColorInterp.alpha), 0)
    inside = any(MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags for flags in file.mask_flag_enums)
    return Header(
        path=path,
        width=file.width,
        height=file.height,
        bands=file.count,
        dtype=dtypes.pop(),
        crs=file.crs,
        transform=file.transform,
        nodata=tuple(file.nodatavals),
        alpha=alpha,
        mask="inside" if inside else "beside" if _beside(path, ".msk").is_file() else "",
    )


class Reading(NamedTuple):
    """How a file's pixels become values with validity.

    indexes: 1-based bands to read. nodata: per index. together: a nodata value counts only where all bands have it.
    alpha: band whose 0 is invalid, 0 = none. customary: the instrument's nodata value, on top of the file's.
    """

    header: Header
    indexes: tuple[int, ...]
    nodata: tuple[float | None, ...]
    together: bool
    alpha: int
    customary: float | None = None


def read_window(files: Files, reading: Reading, window: Window) -> tuple[np.ndarray, np.ndarray]:
    """Reads raw values and their validity.

    Args:
        files: open handles of this process.
        reading: how the file is read.
        window: what is read; it lies inside the file.

    Returns:
        (raw values [n, h, w] in the file's type, bool [n, h, w]).

    Raises:
        BrokenFile: the pixels cannot be read, or are too many at once.
    """
    head = reading.header
    pixels = int(window.width * window.height) * len(reading.indexes)
    if pixels > MAX_WINDOW_PIXELS:
        raise BrokenFile(
            head.path,
            f"one tile needs {window.width:.0f} x {window.height:.0f} x {len(reading.indexes)} of its pixels at "
            f"once, more than the limit {MAX_WINDOW_PIXELS:.3g}; resample the file or use smaller tiles",
        )
    try:
        file = files.get(head.path)
        raw = file.read(list(reading.indexes), window=window)
        keep = np.ones(raw.shape[1:], bool)
        if reading.alpha:
            keep &= file.read(reading.alpha, window=window) > 0
        if head.mask == "inside":
            keep &= file.read_masks(1, window=window) > 0
        elif head.mask == "beside":
            keep &= _outer_mask(files, head, window)
    except BrokenFile:
        raise
    except (*GDAL_ERRORS, RasterRefused) as error:
        raise BrokenFile(head.path, f"its pixels cannot be read (truncated or corrupt): {error}") from error
    valid = np.isfinite(raw) if raw.dtype.kind == "f" else np.ones(raw.shape, bool)
    hit = np.stack([_equals(band, value) for band, value in zip(raw, reading.nodata, strict=True)])
    valid &= ~(hit.all(axis=0, keepdims=True) if reading.together else hit)
    if reading.customary is not None:
        valid &= raw != reading.customary
    return raw, valid & keep


def _outer_mask(files: Files, head: Header, window: Window) -> np.ndarray:
    file = files.get(_beside(head.path, ".msk"))
    if (file.width, file.height) != (head.width, head.height):
        raise BrokenFile(
            head.path, f"its mask file is {file.width} x {file.height}, the raster {head.width} x {head.height}"
        )
    return file.read(1, window=window) > 0


def _equals(band: np.ndarray, value: float | None) -> np.ndarray:
    """Where a band holds the nodata value, compared in the band's own type."""
    if value is None or np.isnan(value):
        return np.zeros(band.shape, bool)  # NaN is invalid anyway
    if band.dtype.kind == "f":
        return band == np.array(value).astype(band.dtype)
    limits = np.iinfo(band.dtype) if band.dtype.kind in "iu" else None
    if limits is None or value != int(value) or not limits.min <= value <= limits.max:
        return np.zeros(band.shape, bool)
    return band == band.dtype.type(int(value))


def sample(files: Files, reading: Reading, side: int = 96) -> tuple[np.ndarray, np.ndarray]:
    """Reads nine windows spread over a file; where none has valid pixels, the whole file until a window has some.

    Args:
        files: open handles of this process.
        reading: how the file is read.
        side: pixels along a window.

    Returns:
        (raw values [n, k], bool [n, k] whether they are valid).

    Raises:
        RasterRefused: no pixel of the file is valid.
    """
    head = reading.header
    raws, valids = [], []
    for row in sorted({max(0, int((head.height - side) * part / 2)) for part in range(3)}):
        for column in sorted({max(0, int((head.width - side) * part / 2)) for part in range(3)}):
            window = Window(column, row, min(side, head.width - column), min(side, head.height - row))
            raw, valid = read_window(files, reading, window)
            raws.append(raw.reshape(len(raw), -1))
            valids.append(valid.reshape(len(raw), -1))
    if any(valid.any() for valid in valids):
        return np.concatenate(raws, 1), np.concatenate(valids, 1)
    strip = max(1, 2**22 // max(1, head.width * len(reading.indexes)))
    for row in range(0, head.height, strip):
        raw, valid = read_window(files, reading, Window(0, row, head.width, min(strip, head.height - row)))
        if valid.any():
            return raw.reshape(len(raw), -1), valid.reshape(len(raw), -1)
    raise RasterRefused("no valid pixel: everything is nodata, NaN or masked")
