"""Images without georeference: JPEG and PNG decoded into rasters in memory, and rasters cut into tiles by their pixels.

Grey and RGB pictures, each with or without transparency, palettes (as the colours they stand for) and 16-bit grey are
decoded upright (EXIF orientation applied), as every image library shows them. Pictures that have no single meaning as
8-bit red, green, blue (CMYK, 16-bit colour, bilevel) are refused, and the message says what to do. GeoTIFF and
JPEG 2000 are opened as everywhere else.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import rasterio
from PIL import Image, ImageOps, UnidentifiedImageError
from rasterio.enums import ColorInterp
from rasterio.errors import NotGeoreferencedWarning
from rasterio.windows import Window

from skysense_jax.data.ingest.raster import SIGNATURES, Header, RasterRefused, open_raster

_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
_GREY, _ALPHA = ColorInterp.gray, ColorInterp.alpha
_RGB = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)
_BANDS = {"L": (_GREY,), "I;16": (_GREY,), "LA": (_GREY, _ALPHA), "RGB": _RGB, "RGBA": (*_RGB, _ALPHA)}
"""Mode of a decoded picture -> what its bands are."""
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)  # what Pillow's decoders raise


class Cut(NamedTuple):
    """A square of pixels where the ground is not known; it stands for the `grid.Tile` of a georeferenced raster.

    Attributes:
        name: the record's place.
        column, row: first pixel of the square in the picture.
        crs: None, because the ground is not known.
    """

    name: str
    column: int
    row: int
    crs: None = None

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """Left, bottom, right, top: all nan."""
        return (np.nan,) * 4

    def lonlat(self) -> tuple[float, float]:
        """Longitude and latitude of the centre: nan."""
        return np.nan, np.nan

    def window(self, size: int) -> Window:
        """The `size` x `size` pixels of the square in the picture."""
        return Window(self.column, self.row, size, size)


def cuts_of(place: str, head: Header, size: int) -> Iterator[Cut]:
    """The tiles of a picture: as many as fit side by side, without resampling.

    The block of tiles lies in the middle, so that less than one tile is left over along each axis. A single tile has
    the picture's name; several are named PLACE@COLUMN_ROW as tiles of the ground are.

    Args:
        place: name of the picture's place.
        head: header of the picture.
        size: pixels along a tile.

    Yields:
        The tiles, top to bottom, left to right.

    Raises:
        RasterRefused: the picture is smaller than one tile.
    """
    columns, rows = head.width // size, head.height // size
    if not (columns and rows):
        raise RasterRefused(f"smaller than one tile of {size} x {size} pixels, and images are never enlarged (--tile)")
    left, top = (head.width - columns * size) // 2, (head.height - rows * size) // 2
    for row in range(rows):
        for column in range(columns):
            name = place if columns * rows == 1 else f"{place}@{column}_{row}"
            yield Cut(name, left + column * size, top + row * size)


def open_picture(path: Path) -> rasterio.io.DatasetReader | rasterio.io.DatasetWriter:
    """Opens a JPEG, PNG, GeoTIFF or JPEG 2000 file.

    Raises:
        RasterRefused: the file cannot be read, or is of another format.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(26)
    except OSError as error:
        raise RasterRefused(f"cannot be read: {error}") from error
    if start.startswith((_PNG, _JPEG)):
        return _in_memory(_decoded(path, start))
    if start and not start.startswith(tuple(SIGNATURES)):
        raise RasterRefused("not a JPEG, PNG, GeoTIFF or JPEG 2000 file, whatever its name says")
    return open_raster(path)


def _decoded(path: Path, start: bytes) -> Image.Image:
    """The upright picture in a mode of _BANDS. start: the first 26 bytes of the file."""
    # Pillow would cut 16-bit colour to its upper 8 bits; byte 24 of a PNG is its depth, byte 25 its colour type
    if start.startswith(_PNG) and start[24:25] == b"\x10" and start[25:26] != b"\x00":
        raise RasterRefused("a PNG with 16-bit colour: write it as GeoTIFF and declare the scale to 0..255")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=("JPEG", "PNG")) as picture:
                upright = ImageOps.exif_transpose(picture)  # decodes
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise RasterRefused(
            f"more than {Image.MAX_IMAGE_PIXELS} pixels in a file that can only be decoded as a whole: convert it to "
            "GeoTIFF, which is read in parts"
        ) from error
    except _DAMAGED as error:
        # without the path and byte counts Pillow adds: the report groups equal reasons
        unread = isinstance(error, UnidentifiedImageError)
        reason = "its header cannot be read" if unread else str(error).partition(" (")[0]
        raise RasterRefused(f"truncated or corrupt: {reason}") from error
    if upright.mode == "P":
        upright = upright.convert("RGBA" if upright.has_transparency_data else "RGB")
    elif upright.mode in ("L", "RGB") and upright.has_transparency_data:  # one colour that stands for transparent
        upright = upright.convert("LA" if upright.mode == "L" else "RGBA")
    if upright.mode not in _BANDS:
        raise RasterRefused(
            f"pixels of mode {upright.mode}: read are 8-bit grey, RGB and palettes, with or without transparency, and "
            "16-bit grey; convert it (CMYK needs its colour profile for that)"
        )
    return upright


def _in_memory(picture: Image.Image) -> rasterio.io.DatasetWriter:
    """The picture as a GDAL raster without georeference; closing it frees the memory."""
    values = np.atleast_3d(np.asarray(picture))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        file = rasterio.open(
            "/vsimem/picture",  # the driver ignores the name
            "w+",
            driver="MEM",
            width=values.shape[1],
            height=values.shape[0],
            count=values.shape[2],
            dtype=values.dtype,
        )
    file.write(np.moveaxis(values, -1, 0))
    file.colorinterp = _BANDS[picture.mode]
    return file
