"""Decode a window of a JPEG file, at little or no cost for the pixels outside it.

libjpeg-turbo 3 can do this, but no Python package exposes it. So this module calls the
shared library in the wheel ``turbojpeg``, or the system's. The pixels have the same
bits as in the whole decoded image. Without the library the whole image is decoded,
and a crop takes 20 to 25 % longer.
"""

import ctypes
import ctypes.util
import functools
import importlib.metadata
import threading

import numpy as np

# Constants of turbojpeg.h, version 3.
_DECOMPRESS = 1
_SUBSAMPLING, _WIDTH, _HEIGHT, _PRECISION, _COLORSPACE = 4, 5, 6, 7, 8
_PIXELS_RGB, _PIXELS_GREY = 0, 6
_YCBCR, _GREY = 1, 2

# A window starts at a multiple of this width, by the subsampling of colours: 4:4:4,
# 4:2:2, 4:2:0, grey, 4:4:0.
_BLOCK_WIDTHS = {0: 8, 1: 16, 2: 16, 3: 8, 4: 8}

_MARGIN = 2  # pixels around a window that affect its colours at half the resolution


class _Region(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("left", "top", "width", "height")]


class Decoder:
    """A JPEG decoder; each thread needs its own."""

    def __init__(self, library: ctypes.CDLL):
        self._library = library
        self._handle = ctypes.c_void_p(library.tj3Init(_DECOMPRESS))

    def __del__(self) -> None:
        self._library.tj3Destroy(self._handle)

    def size(self, data: bytes) -> tuple[int, int] | None:
        """Height and width; None for files that this decoder does not handle."""
        call = self._library.tj3DecompressHeader
        if call(self._handle, data, ctypes.c_size_t(len(data))):
            return None
        plain = self._get(_COLORSPACE) in (_YCBCR, _GREY) and self._get(_PRECISION) == 8
        if not plain or self._get(_SUBSAMPLING) not in _BLOCK_WIDTHS:
            return None
        return self._get(_HEIGHT), self._get(_WIDTH)

    def window(
        self, data: bytes, top: int, left: int, height: int, width: int, channels: int
    ) -> np.ndarray | None:
        """A window of the file last passed to ``size``, uint8 (height, width, c).

        None after an error or warning of libjpeg.
        """
        block = _BLOCK_WIDTHS[self._get(_SUBSAMPLING)]
        first = max(0, left - _MARGIN) // block * block
        above = max(0, top - _MARGIN)
        right = min(self._get(_WIDTH), left + width + _MARGIN)
        below = min(self._get(_HEIGHT), top + height + _MARGIN)
        region = _Region(first, above, right - first, below - above)
        if self._library.tj3SetCroppingRegion(self._handle, region):
            return None
        pixels = np.empty((region.height, region.width, channels), np.uint8)
        failed = self._library.tj3Decompress8(
            self._handle,
            data,
            ctypes.c_size_t(len(data)),
            ctypes.c_void_p(pixels.ctypes.data),
            0,  # rows without gaps
            _PIXELS_GREY if channels == 1 else _PIXELS_RGB,
        )
        if failed:
            return None
        start, begin = top - above, left - first
        return pixels[start : start + height, begin : begin + width]

    def _get(self, parameter: int) -> int:
        return self._library.tj3Get(self._handle, parameter)


def decoder() -> Decoder | None:
    """This thread's decoder; None without the library."""
    if not hasattr(_threads, "decoder"):
        library = _library()
        _threads.decoder = None if library is None else Decoder(library)
    return _threads.decoder


_threads = threading.local()


@functools.cache
def _library() -> ctypes.CDLL | None:
    for path in (_in_wheel(), ctypes.util.find_library("turbojpeg")):
        if path is None:
            continue
        try:
            library = ctypes.CDLL(path)
            library.tj3Init.restype = ctypes.c_void_p
            library.tj3SetCroppingRegion.argtypes = [ctypes.c_void_p, _Region]
        except (OSError, AttributeError):  # cannot be loaded, or older than version 3
            continue
        return library
    return None


def _in_wheel() -> str | None:
    """The library in the package ``turbojpeg``."""
    try:
        files = importlib.metadata.files("turbojpeg") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = [file for file in files if file.name.startswith("libturbojpeg")]
    return str(found[0].locate()) if found else None
