"""Images to files and back: every pixel is kept. For any file, the only possible error is Invalid."""

import io
import json
import math
import re
import struct
import zlib
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from PIL import Image as PillowImage

from model.rows import Image
from service.errors import Invalid
from service.http import png as png_module
from service.http.formats import contact_sheet, encode_npy
from service.http.png import encode_png, encode_png16, is_png, to_uint8
from service.http.uploads import decode, most_bytes

Pixels = NDArray[np.unsignedinteger[Any]]
Chunk = tuple[bytes, bytes]

GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6
H, W = 4, 5


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# A separate PNG writer, which can also write files that no encoder would.


def a_header(width: int, height: int, depth: int, colour_type: int, *flags: int) -> Chunk:
    return b"IHDR", struct.pack(">IIBB", width, height, depth, colour_type) + bytes(flags or (0, 0, 0))


def pixel_data(pixels: Pixels) -> Chunk:
    big_endian = pixels.astype(pixels.dtype.newbyteorder(">"))
    return b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in big_endian))


def a_file(*chunks: Chunk) -> bytes:
    file = b"\x89PNG\r\n\x1a\n"
    for name, data in (*chunks, (b"IEND", b"")):
        file += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return file


def a_png(pixels: Pixels, colour_type: int, *extra: Chunk) -> bytes:
    """A PNG of [H, W, C], with extra chunks ahead of the pixels."""
    height, width, _ = pixels.shape
    header = a_header(width, height, 8 * pixels.dtype.itemsize, colour_type)
    return a_file(header, *extra, pixel_data(pixels))


def some_pixels(channels: int, depth: int, seed: int = 0) -> Pixels:
    dtype = np.uint8 if depth == 8 else np.uint16
    return rng(seed).integers(0, 2**depth, (H, W, channels)).astype(dtype)


def opaque(pixels: Pixels) -> Pixels:
    alpha = np.full_like(pixels[:, :, :1], np.iinfo(pixels.dtype).max)
    return np.concatenate([pixels, alpha], axis=2)


def some_image(channels: int, seed: int = 0) -> Image:
    return rng(seed).uniform(-1, 1, (channels, H, W)).astype(np.float32)


def npy(array: NDArray[np.generic], order: str = "C") -> bytes:
    file = io.BytesIO()
    np.save(file, np.asfortranarray(array) if order == "F" else array)
    return file.getvalue()


def npy_with_header(header: str, body: bytes = bytes(4 * 1 * H * W), version: int = 1) -> bytes:
    text = header.encode("latin-1")
    return b"\x93NUMPY" + bytes((version, 0)) + struct.pack("<H" if version == 1 else "<I", len(text)) + text + body


def problem_of(data: bytes, channels: int = 1, value_range: float = 1.0) -> str:
    """The error of a file."""
    with pytest.raises(Invalid) as refusal:
        decode(data, [(channels, H, W)], value_range)
    [error] = refusal.value.errors
    assert error["loc"] == ["image"]
    return error["msg"]


# Images to files


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_those_of_diffusers(channels: int) -> None:
    exact = np.arange(256) / 255 * 2 - 1
    ties = (np.arange(256) + 0.5) / 255 * 2 - 1
    outside = np.array([-1e30, -1.0001, -1, 1, 1.0001, 1e30])
    values = np.concatenate([exact, ties, outside, rng().normal(size=10_000)])
    x = values[: values.size // 6 * 6].astype(np.float32).reshape(channels, -1, 2)
    [theirs] = VaeImageProcessor().postprocess(torch.from_numpy(x)[None], output_type="pil")
    np.testing.assert_array_equal(to_uint8(x).squeeze(), np.asarray(theirs))


def test_each_of_the_256_values_comes_back_from_a_png() -> None:
    values = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    x = decode(a_png(values, GREY), [(1, 16, 16)], 1.0)
    np.testing.assert_array_equal(to_uint8(x), values)
    np.testing.assert_array_equal(decode(encode_png(x, {}), [(1, 16, 16)], 1.0), x)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_an_encoded_png_has_the_pixels_and_its_recipe(channels: int, mode: str) -> None:
    x = some_image(channels)
    recipe = {"seed": 7, "class_label": None, "model": "Ziffern – 数字", "eta": 0.5}
    with PillowImage.open(io.BytesIO(encode_png(x, recipe))) as png:
        assert (png.format, png.mode, png.size) == ("PNG", mode, (W, H))
        assert json.loads(png.info["parameters"]) == recipe
        np.testing.assert_array_equal(np.asarray(png).reshape(H, W, channels), to_uint8(x))


def test_the_same_image_and_recipe_give_the_same_bytes() -> None:
    x = some_image(3)
    assert encode_png(x, {"a": 1, "b": 2}) == encode_png(x.copy(), {"b": 2, "a": 1})
    assert encode_png(x, {"a": 1, "b": 2}) != encode_png(x, {"a": 1, "b": 3})


@given(
    hnp.arrays(np.float32, st.sampled_from([(1, H, W), (3, H, W)]), elements=st.floats(-1, 1, width=32)),
    st.floats(1, 16),
)
def test_sixteen_bits_keep_an_image_within_half_a_step(unit: Image, value_range: float) -> None:
    x = unit * np.float32(value_range) * np.float32(0.999999)
    png, clipped = encode_png16(x, value_range)
    came = decode(png, [(x.shape[0], H, W)], value_range)
    half_a_step = value_range / 65535
    assert clipped == 0
    assert np.abs(came - x).max() <= half_a_step * 1.01  # and float32's rounding


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_keep_the_order_of_channels_and_values(channels: int) -> None:
    pixels = some_pixels(channels, 16)
    x = decode(a_png(pixels, GREY if channels == 1 else RGB), [(channels, H, W)], 2.0)
    png, _ = encode_png16(x, 2.0)
    with PillowImage.open(io.BytesIO(png)) as file:
        assert file.size == (W, H)
    np.testing.assert_array_equal(decode(png, [(channels, H, W)], 2.0), x)


def test_what_sixteen_bits_cannot_hold_is_clipped_and_counted() -> None:
    x = np.zeros((1, H, W), dtype=np.float32)
    x[0, 0] = 2.5
    x[0, 1, 0] = -7
    x[0, 2] = 2  # barely fits
    png, clipped = encode_png16(x, 2.0)
    assert clipped == pytest.approx((W + 1) / (H * W))
    came = decode(png, [(1, H, W)], 2.0)
    np.testing.assert_allclose(came, x.clip(-2, 2), atol=2 / 65535)


def test_an_npy_is_exact() -> None:
    x = rng().normal(0, 100, (3, H, W)).astype(np.float32)
    loaded = np.load(io.BytesIO(encode_npy(x)), allow_pickle=False)
    assert loaded.dtype == np.float32
    np.testing.assert_array_equal(loaded, x)
    np.testing.assert_array_equal(decode(encode_npy(x), [(3, H, W)], 16.0), x)  # value_range is for PNGs


@pytest.mark.parametrize("n", range(1, 18))
@pytest.mark.parametrize("channels", [1, 3])
def test_a_contact_sheet_goes_row_by_row_in_the_smallest_square(n: int, channels: int) -> None:
    images = [some_image(channels, seed) for seed in range(n)]
    sheet = contact_sheet(images)
    columns = next(columns for columns in range(1, n + 1) if columns * columns >= n)
    rows = next(rows for rows in range(1, n + 1) if rows * columns >= n)
    assert sheet.shape == (channels, rows * H, columns * W)
    assert sheet.dtype == np.float32
    for y in range(rows * H):
        for x in range(columns * W):
            i = y // H * columns + x // W
            expected = images[i][:, y % H, x % W] if i < n else np.full(channels, -1)
            np.testing.assert_array_equal(sheet[:, y, x], expected)


# Files to images


@pytest.mark.parametrize("value_range", [1.0, 3.5])
@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("colour_type", [GREY, RGB, GREY_ALPHA, RGBA])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_of_any_kind_is_read_as_the_model_needs_it(
    channels: int, colour_type: int, depth: int, value_range: float
) -> None:
    is_grey = colour_type in (GREY, GREY_ALPHA)
    colours = some_pixels(1 if is_grey or channels == 1 else 3, depth)
    pixels = colours if is_grey else colours.repeat(3 // colours.shape[2], axis=2)
    if colour_type in (GREY_ALPHA, RGBA):
        pixels = opaque(pixels)
    came = decode(a_png(pixels, colour_type), [(channels, H, W)], value_range)
    expected = np.empty((channels, H, W))
    for c in range(channels):
        expected[c] = -value_range + 2 * value_range * colours[:, :, c % colours.shape[2]] / (2.0**depth - 1)
    assert came.shape == (channels, H, W)
    assert came.dtype == np.float32
    np.testing.assert_allclose(came, expected, rtol=1e-6, atol=1e-7 * value_range)


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("colour_type", [GREY_ALPHA, RGBA])
def test_a_png_with_one_pixel_that_is_not_opaque_is_refused(colour_type: int, depth: int) -> None:
    pixels = opaque(some_pixels(1 if colour_type == GREY_ALPHA else 3, depth))
    pixels[1, 2, -1] -= 1
    assert problem_of(a_png(pixels, colour_type), channels=3) == "must be opaque, and has transparent pixels"


@pytest.mark.parametrize(("colour_type", "data"), [(GREY, b"\0\7"), (RGB, b"\0\1\0\2\0\3"), (GREY, b""), (RGB, b"\1")])
def test_a_png_with_a_transparent_colour_is_refused(colour_type: int, data: bytes) -> None:
    png = a_png(some_pixels(1 if colour_type == GREY else 3, 8), colour_type, (b"tRNS", data))
    assert problem_of(png, channels=3) == "must be opaque, and has a transparent colour"


@pytest.mark.parametrize(
    ("mode", "kind"), [("P", "a palette"), ("1", "1-bit values")], ids=["a palette", "black and white"]
)
def test_a_png_of_another_kind_is_refused(mode: str, kind: str) -> None:
    file = io.BytesIO()
    PillowImage.new("L", (W, H)).convert(mode).save(file, "PNG")
    assert problem_of(file.getvalue()) == f"must be grey or RGB with 8 or 16 bits a channel, and has {kind}"


@pytest.mark.parametrize("depth", [8, 16])
def test_colours_are_refused_by_a_grey_model(depth: int) -> None:
    pixels = some_pixels(1, depth).repeat(3, axis=2)
    decode(a_png(pixels, RGB), [(1, H, W)], 1.0)
    pixels[2, 3, 1] ^= 1
    assert problem_of(a_png(pixels, RGB)) == "must be grey, and has colours"


def test_a_png_of_another_size_is_refused_and_both_sizes_are_named() -> None:
    png = a_png(some_pixels(1, 8).transpose(1, 0, 2), GREY)
    assert problem_of(png) == "must be 5x4 pixels (width x height), and is 4x5"


def test_a_png_that_claims_to_be_huge_is_refused_before_it_is_decoded() -> None:
    assert "is 60000x60000" in problem_of(a_file(a_header(60000, 60000, 8, GREY), (b"IDAT", b"")))


@pytest.mark.parametrize("size", [(6, 7), (10_000, 10_000), (60_000, 60_000)])
def test_a_second_header_is_not_believed(size: tuple[int, int]) -> None:
    pixels = some_pixels(1, 8)
    png = a_png(pixels, GREY, a_header(*size, 8, GREY))
    np.testing.assert_array_equal(to_uint8(decode(png, [(1, H, W)], 1.0)), pixels)


def test_what_is_neither_png_nor_npy_is_refused() -> None:
    assert problem_of(b"") == "is empty"
    assert problem_of(b"GIF89a") == "must be a PNG or an .npy file, and is neither"


def test_a_png_must_begin_with_its_header() -> None:
    pixels = pixel_data(some_pixels(1, 8))
    assert problem_of(a_file(pixels, a_header(W, H, 8, GREY))) == "is a PNG without a header"
    assert problem_of(a_file((b"IHDR", bytes(40)), pixels)) == "is a PNG without a header"


def test_a_png_without_pixels_is_refused() -> None:
    assert problem_of(a_file(a_header(W, H, 8, GREY))) == "is a PNG whose pixels cannot be read"


def split(data: bytes, size: int) -> list[Chunk]:
    return [(b"IDAT", data[begin : begin + size]) for begin in range(0, len(data), size)]


@pytest.mark.parametrize("depth", [8, 16])
def test_a_png_of_many_small_chunks_is_read(depth: int) -> None:
    """libpng writes 8192 bytes into each chunk. Some writers use smaller chunks, or empty ones."""
    pixels: Pixels = rng().integers(0, 2**depth, (256, 256, 3)).astype(np.uint8 if depth == 8 else np.uint16)
    _, packed = pixel_data(pixels)
    empty: list[Chunk] = [(b"IDAT", b"")]
    file = a_file(a_header(256, 256, depth, RGB), *empty, *split(packed, 1024), *empty * 50, (b"tEXt", b"a\0b"))
    whole = a_file(a_header(256, 256, depth, RGB), (b"IDAT", packed))
    np.testing.assert_array_equal(decode(file, [(3, 256, 256)], 1.0), decode(whole, [(3, 256, 256)], 1.0))


@pytest.mark.parametrize("chunk", [(b"IDAT", b""), (b"tEXt", b"a\0b"), (b"abCd", b"")], ids=str)
def test_a_png_of_very_many_chunks_is_refused(chunk: Chunk) -> None:
    """A Python loop reads chunks, and passes wait for the interpreter meanwhile."""
    pixels = pixel_data(some_pixels(1, 8))
    assert problem_of(a_file(a_header(W, H, 8, GREY), *[chunk] * 2000, pixels)) == "is a PNG of more than 1024 chunks"


def test_decoders_meet_one_chunk_of_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow also reads chunks in a Python loop."""
    met: list[bytes] = []

    def opening(file: io.BytesIO, formats: list[str]) -> Any:
        met.append(file.getvalue())
        return PillowImage.open(file, formats=formats)

    monkeypatch.setattr(png_module, "PillowImage", SimpleNamespace(open=opening))
    _, packed = pixel_data(some_pixels(1, 8))
    decode(a_file(a_header(W, H, 8, GREY), (b"IDAT", b""), *split(packed, 3)), [(1, H, W)], 1.0)
    assert met == [a_file(a_header(W, H, 8, GREY), (b"IDAT", packed))]


def test_a_png_with_far_more_data_than_pixels_is_refused() -> None:
    packed = zlib.compress(bytes((W + 1) * H)) + bytes(70_000)
    problem = problem_of(a_file(a_header(W, H, 8, GREY), (b"IDAT", packed)))
    assert problem == f"is a PNG with {len(packed)} bytes of compressed pixels, and may have at most {2**16 + 48}"


@pytest.mark.parametrize("flags", [(1, 0, 0), (0, 1, 0), (0, 0, 2)], ids=["compression", "filter", "interlacing"])
def test_a_deep_png_of_an_unknown_method_is_refused(flags: tuple[int, int, int]) -> None:
    """Pillow ignores the first field, and OpenCV ignores all three."""
    png = a_file(a_header(W, H, 16, RGB, *flags), pixel_data(some_pixels(3, 16)))
    assert problem_of(png, channels=3) == "is a PNG whose pixels cannot be read"


# .npy


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f4", ">f4"])
def test_an_npy_of_either_order_and_endianness_is_read(dtype: str, order: str) -> None:
    x = rng().normal(size=(3, H, W)).astype(np.float32)
    came = decode(npy(x.astype(dtype), order), [(3, H, W)], 1.0)
    assert came.dtype == np.float32
    assert came.dtype.isnative
    np.testing.assert_array_equal(came, x)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 4, 5), }     \n",
        "{'shape': (1, 4, 5), 'fortran_order': False, 'descr': '<f4'}",
        '{"descr":"<f4","fortran_order":False,"shape":(1,4,5)}',
    ],
)
def test_an_npy_header_may_be_written_in_any_way(header: str, version: int) -> None:
    decode(npy_with_header(header, version=version), [(1, H, W)], 1.0)


@pytest.mark.parametrize(
    ("array", "came"),
    [
        (np.zeros((1, H, W)), "float64 [1, 4, 5]"),
        (np.zeros((1, H, W), np.uint8), "uint8 [1, 4, 5]"),
        (np.zeros((1, H, W), np.float16), "float16 [1, 4, 5]"),
        (np.zeros((H, W), np.float32), "float32 [4, 5]"),
        (np.zeros((1, 1, H, W), np.float32), "float32 [1, 1, 4, 5]"),
        (np.zeros((H, W, 1), np.float32), "float32 [4, 5, 1]"),
        (np.zeros((), np.float32), "float32 []"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_npy_of_another_kind_is_refused_and_named(array: NDArray[np.generic], came: str) -> None:
    assert problem_of(npy(array)) == f"must be an .npy of float32 [1, 4, 5], and is {came}"


def test_of_latent_diffusion_an_npy_has_latents_and_a_png_has_pixels() -> None:
    latents = rng().normal(size=(4, 2, 3)).astype(np.float32)
    np.testing.assert_array_equal(decode(npy(latents), [(3, H, W)], 1.0, [(4, 2, 3)]), latents)
    png = a_png(some_pixels(3, 8), RGB)
    np.testing.assert_array_equal(decode(png, [(3, H, W)], 1.0, [(4, 2, 3)]), decode(png, [(3, H, W)], 1.0))
    assert [is_png(data) for data in (png, npy(latents), b"")] == [True, False, False]


SIZES = [(3, 4, 5), (3, 8, 8), (3, 5, 4)]


@pytest.mark.parametrize("shape", SIZES)
def test_an_upload_may_have_any_of_the_sizes(shape: tuple[int, int, int]) -> None:
    x = rng().uniform(-1, 1, shape).astype(np.float32)
    np.testing.assert_array_equal(decode(npy(x), SIZES, 1.0), x)
    assert decode(encode_png(x, {}), SIZES, 1.0).shape == shape
    latents = [(4, 2, 2), (4, 4, 4), (4, 3, 2)]
    y = rng().normal(size=latents[SIZES.index(shape)]).astype(np.float32)
    np.testing.assert_array_equal(decode(npy(y), SIZES, 1.0, latents), y)


def test_an_upload_of_another_size_is_refused_and_the_sizes_are_named() -> None:
    files = {
        "must be 5x4, 8x8 or 4x5 pixels (width x height), and is 4x8": encode_png(np.zeros((3, 8, 4), np.float32), {}),
        "must be an .npy of float32 [3, 4, 5], [3, 8, 8] or [3, 5, 4], and is float32 [3, 4, 8]": npy(
            np.zeros((3, 4, 8), np.float32)
        ),
    }
    for expected, file in files.items():
        with pytest.raises(Invalid) as refusal:
            decode(file, SIZES, 1.0)
        [error] = refusal.value.errors
        assert error["msg"] == expected


def test_the_largest_size_decides_how_many_bytes_an_upload_may_have() -> None:
    assert most_bytes(SIZES) == most_bytes([(3, 8, 8)]) > most_bytes([(3, 4, 5)])
    assert most_bytes(SIZES, [(4, 2, 2), (4, 100, 100)]) == most_bytes(SIZES, [(4, 100, 100)])


@pytest.mark.parametrize("shape", [(3, 4, 5), (4, 3, 2), (1, 4, 2, 3)])
def test_an_npy_of_no_latents_is_refused_and_latents_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(Invalid) as refusal:
        decode(npy(np.zeros(shape, np.float32)), [(3, H, W)], 1.0, [(4, 2, 3)])
    [error] = refusal.value.errors
    assert error["msg"] == f"must be an .npy of float32 latents [4, 2, 3], and is float32 {list(shape)}"


def test_pickled_objects_are_never_opened() -> None:
    opened: list[int] = []

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[int]]:
            return opened.append, (1,)

    file = npy(np.array([Trap()], dtype=object))
    opened.clear()
    assert "holds pickled objects" in problem_of(file)
    assert opened == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_npy_with_a_value_that_is_not_finite_is_refused(value: float) -> None:
    x = some_image(1)
    x[0, 1, 1] = value
    assert problem_of(npy(x)) == "must have finite values, and has NaN or infinity"


@pytest.mark.parametrize("difference", [-4, -1, 1, 4])
def test_an_npy_with_too_few_or_too_many_bytes_is_refused(difference: int) -> None:
    file = npy(some_image(1))
    file = file[:difference] if difference < 0 else file + bytes(difference)
    assert problem_of(file) == f"must be an .npy with 80 bytes of values, and has {80 + difference}"


@pytest.mark.parametrize(
    "header",
    [
        "",
        "(" * 5000,
        "-" * 3000 + "1",
        "{[]: 1}",
        "{'descr': (), 'fortran_order': False, 'shape': (1, 4, 5)}",
        "{'descr': '<f4', 'fortran_order': 0, 'shape': (1, 4, 5)}",
        f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({'9' * 5000}, )}}",
        f"{{'descr': '<f4', 'fortran_order': False, 'shape': (0x{'f' * 5000}, )}}",
        " " * 20_000 + "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 4, 5)}",
    ],
    ids=range(9),
)
def test_an_npy_whose_header_makes_no_sense_is_refused(header: str) -> None:
    """numpy's own reader raises TokenError, RecursionError, TypeError or IndexError for some of these."""
    assert problem_of(npy_with_header(header)) == "is an .npy file whose header cannot be read"


@pytest.mark.parametrize(
    "header",
    [
        f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({'9' * 4000}, )}}",
        f"{{'descr': [('{'x' * 4000}', '<f4')], 'fortran_order': False, 'shape': (1, 4, 5)}}",
    ],
    ids=["shape", "type"],
)
def test_a_refusal_does_not_repeat_a_long_header(header: str) -> None:
    assert len(problem_of(npy_with_header(header))) < 200


# Random files

TEXT: Chunk = (b"tEXt", b"parameters\0{}")
PROFILE: Chunk = (b"iCCP", b"sRGB\0\0" + zlib.compress(b"profile"))
VALID = [
    a_png(some_pixels(1, 8), GREY, TEXT),
    a_png(some_pixels(1, 16), GREY, PROFILE),
    a_png(opaque(some_pixels(1, 8)), GREY_ALPHA),
    a_png(opaque(some_pixels(1, 16)), GREY_ALPHA),
    a_png(some_pixels(1, 8).repeat(3, axis=2), RGB),
    a_png(some_pixels(1, 16).repeat(3, axis=2), RGB),
    a_png(opaque(some_pixels(1, 16).repeat(3, axis=2)), RGBA),
    npy(some_image(1)),
    npy_with_header("{'descr': '>f4', 'fortran_order': True, 'shape': (1, 4, 5), }", version=2),
]


def decoded(data: bytes) -> Image | None:
    """The image of a file; None if it is refused. Any other error fails the test, and so does any warning."""
    problem = ""
    try:
        x = decode(data, [(1, H, W)], 1.0)
    except Invalid as error:
        problem = str(error)
    if problem:
        assert len(problem) < 300
        assert not re.search(r"object at|\n", problem)
        return None
    assert x.shape == (1, H, W)
    assert x.dtype == np.float32
    assert np.isfinite(x).all()
    return x


@pytest.mark.parametrize("data", VALID, ids=range(len(VALID)))
def test_a_file_that_is_cut_short_anywhere_is_refused(data: bytes) -> None:
    assert decoded(data) is not None
    for length in range(len(data)):
        assert decoded(data[:length]) is None


@given(st.sampled_from([data for data in VALID if data.startswith(b"\x89PNG")]), st.data())
def test_a_png_with_one_wrong_bit_is_refused(png: bytes, data: st.DataObject) -> None:
    bit = data.draw(st.integers(0, 8 * len(png) - 1))
    damaged = bytearray(png)
    damaged[bit // 8] ^= 1 << bit % 8
    assert decoded(bytes(damaged)) is None


@given(st.sampled_from(VALID), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 8), st.binary(max_size=8))))
def test_a_file_with_any_damage_is_decoded_or_refused(data: bytes, damages: Sequence[tuple[int, int, bytes]]) -> None:
    for begin, length, instead in damages:
        data = data[:begin] + instead + data[begin + length :]
    decoded(data)


@given(st.sampled_from((b"\x89PNG\r\n\x1a\n", b"\x93NUMPY\1\0", b"\x93NUMPY\2\0", b"")), st.binary(max_size=300))
def test_any_bytes_are_decoded_or_refused(magic: bytes, rest: bytes) -> None:
    decoded(magic + rest)


OPTIONAL = (b"iCCP", b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"acTL", b"fcTL", b"fdAT")
optional_chunks = st.lists(st.tuples(st.sampled_from((*OPTIONAL, b"PLTE", b"IHDR", b"abCd")), st.binary(max_size=40)))


@given(st.sampled_from((8, 16)), optional_chunks, optional_chunks)
def test_optional_chunks_of_any_content_change_nothing(depth: int, before: list[Chunk], after: list[Chunk]) -> None:
    """Pillow's parsers of these chunks raise various errors, and warn of an animation without frames."""
    pixels = some_pixels(1, depth)
    png = a_file(a_header(W, H, depth, GREY), *before, pixel_data(pixels), *after)
    came = decoded(png)
    assert came is not None
    np.testing.assert_array_equal(came, decoded(a_png(pixels, GREY)))


@given(
    st.sampled_from((8, 16)),
    st.sampled_from((GREY, RGB, GREY_ALPHA, RGBA)),
    st.tuples(*[st.integers(0, 255)] * 3) | st.tuples(st.just(0), st.just(0), st.integers(0, 1)),
    st.lists(st.binary(max_size=200).map(zlib.compress) | st.binary(max_size=50), max_size=3),
)
def test_pixel_data_of_any_content_is_decoded_or_refused(
    depth: int, colour_type: int, flags: tuple[int, ...], contents: list[bytes]
) -> None:
    pixels = [(b"IDAT", content) for content in contents]
    decoded(a_file(a_header(W, H, depth, colour_type, *flags), *pixels))


header_words = st.lists(
    st.sampled_from(
        [
            *"{}()[],:'\"\\ -1459L",
            "'descr'",
            "'<f4'",
            "'|O'",
            "'fortran_order'",
            "True",
            "False",
            "'shape'",
            "(1, 4, 5)",
        ]
    )
)


@given(header_words.map("".join) | st.text(st.characters(max_codepoint=255)), st.sampled_from((1, 2)))
def test_an_npy_header_of_any_text_is_decoded_or_refused(header: str, version: int) -> None:
    decoded(npy_with_header(header, version=version))


def test_a_header_that_python_fails_to_read_once_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python before 3.11.8 mixes up what two threads parse at a time, and raises SystemError or RecursionError."""
    read, failures = np.lib.format.read_array_header_1_0, [SystemError, RecursionError]

    def fails_first(file: Any) -> Any:
        if failures:
            raise failures.pop()
        return read(file)

    monkeypatch.setattr(np.lib.format, "read_array_header_1_0", fails_first)
    image = np.zeros((1, 2, 2), np.float32)
    assert (decode(encode_npy(image), [image.shape], 1.0) == image).all()
