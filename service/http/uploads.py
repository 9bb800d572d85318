"""Reads the images of /denoise and /noise, exactly: PNG and .npy. Everything is checked before it is decoded."""

import io
import math
from collections.abc import Sequence

import numpy as np

from model.rows import Image
from service.errors import Invalid
from service.http.pieces import Bytes
from service.http.png import either, is_png, read_png

Shape = tuple[int, int, int]

_NPY_MAGIC = b"\x93NUMPY"
_TRIES = 3  # to read a header
_NPY_HEADER = 2**12 + 12  # the most bytes of an .npy before its values; numpy writes 128
_PICTURES = (1, 3)  # the numbers of channels that a PNG can have


def is_image(data: Bytes) -> bool:
    """Whether an upload begins as a PNG or an .npy file does."""
    return is_png(data) or data.startswith(_NPY_MAGIC)


def most_bytes(shapes: Sequence[Shape], latent_shapes: Sequence[Shape] = ()) -> int:
    """The most bytes of an image file, [C, H, W]: twice the values, and 1 MiB for texts and profiles."""
    deepest = max(height * (1 + 8 * width) for _, height, width in shapes)  # a 16-bit RGBA PNG
    return 2**20 + 2 * max(deepest, *(4 * math.prod(shape) for shape in latent_shapes or shapes))


def decode(data: Bytes, shapes: Sequence[Shape], value_range: float, latent_shapes: Sequence[Shape] = ()) -> Image:
    """Read an uploaded PNG or .npy as float32 of one of the shapes, [C, H, W].

    A PNG's values 0 … max stand for −value_range … value_range. For RGB models, grey becomes RGB. For grey models, RGB
    with equal channels becomes grey. Opaque alpha is dropped. An .npy has the model's own scale.

    Args:
        shapes: of the model's images, one for each served size.
        latent_shapes: the same of latents, where the model denoises latents: an .npy then holds latents.

    Raises:
        Invalid: says what the upload must be, and what it is.
    """
    channels = shapes[0][0]
    if data.startswith(_NPY_MAGIC):
        return _decode_npy(data, latent_shapes, "latents ") if latent_shapes else _decode_npy(data, shapes)
    if is_png(data) and channels in _PICTURES:
        return read_png(data, channels, [shape[1:] for shape in shapes], value_range)
    if not data:
        raise _invalid("is empty")
    if channels in _PICTURES:
        raise _invalid("must be a PNG or an .npy file, and is neither")
    raise _invalid(f"must be an .npy file: images of this model have {channels} channels, and are no pictures")


def _npy_header(data: Bytes) -> tuple[io.BytesIO, tuple[int, ...], bool, np.dtype[np.generic]]:
    """The file behind its header, and what the header says: shape, order and type."""
    for _ in range(_TRIES):
        file = io.BytesIO(data[:_NPY_HEADER])
        try:
            version = np.lib.format.read_magic(file)
            read_header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            came, fortran_order, dtype = read_header(file)
        except (SystemError, RecursionError):  # perhaps another thread's: Python's parser before 3.11.8, gh-106905
            continue
        except Exception:  # NumPy parses the header as Python, which can fail in any way
            break
        return file, tuple(came), fortran_order, dtype
    raise _invalid("is an .npy file whose header cannot be read")


def _decode_npy(data: Bytes, shapes: Sequence[Shape], what: str = "") -> Image:
    file, came, fortran_order, dtype = _npy_header(data)
    kind = f"{dtype} {list(came)}"[:100]
    if dtype.hasobject:
        raise _invalid("must be an .npy of float32, and holds pickled objects, which are never opened")
    if dtype.newbyteorder("=") != np.float32 or came not in shapes:
        allowed = either(str(list(shape)) for shape in shapes)
        raise _invalid(f"must be an .npy of float32 {what}{allowed}, and is {kind}")
    size = len(data) - file.tell()
    expected = math.prod(came) * 4
    if size != expected:
        raise _invalid(f"must be an .npy with {expected} bytes of values, and has {size}")
    values = (
        np.frombuffer(data, dtype, offset=file.tell())
        .reshape(came, order="F" if fortran_order else "C")
        .astype(np.float32)
    )
    if not np.isfinite(values).all():
        raise _invalid("must have finite values, and has NaN or infinity")
    return values


def _invalid(problem: str) -> Invalid:
    return Invalid.field("image", problem)
