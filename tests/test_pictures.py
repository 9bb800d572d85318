"""Images as people have them: read, turned, fitted and hashed. For any file, the only possible error is Invalid."""

import base64
import functools
import hashlib
import io
import json
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import cv2
import httpx
import numpy as np
import pytest
from diffusers.image_processor import VaeImageProcessor
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps

from model.rows import Group
from service.errors import Invalid
from service.http.models import RequestModel
from service.http.parsing import MAX_PLAIN_JSON, read_sample
from service.http.photos import MAX_PIXELS, Mode, read_photo
from service.http.pictures import Attached, digest, fitted, image_of, picture_of
from service.plan.fields import SampleRequest
from service.plan.pictures import Picture
from service.plan.served import Served
from tests.properties import examples
from tests.servers import Json
from tests.test_fuzz import BAD_PNGS, GOOD_PNGS, file_of
from tests.test_responses import MODEL, SERVED

W, H = 12, 8
PIXELS = np.random.default_rng(5).integers(0, 256, (H, W, 3), np.uint8)
RGB = Image.fromarray(PIXELS)
GREY = RGB.convert("L")
ALPHA = Image.fromarray(np.random.default_rng(6).integers(0, 256, (H, W), np.uint8))


def file(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    picture.save(out := io.BytesIO(), kind, **options)
    return out.getvalue()


def read(data: bytes, mode: Mode = "RGB") -> NDArray[np.uint8]:
    return np.asarray(read_photo(data, mode, "image").pixels)


def problem_of(data: bytes, mode: Mode = "RGB") -> str:
    with pytest.raises(Invalid) as refusal:
        read_photo(data, mode, "mask_image")
    [error] = refusal.value.errors
    assert error["loc"] == ["mask_image"]
    return error["msg"]


def with_alpha(picture: Image.Image) -> Image.Image:
    picture = picture.copy()
    picture.putalpha(ALPHA)
    return picture


def over_white(pixels: NDArray[np.uint8], alpha: NDArray[np.uint8]) -> NDArray[np.float64]:
    share = alpha[:, :, None] / 255
    return pixels * share + 255 * (1 - share)


# Modes.

DEEP = np.random.default_rng(7).integers(0, 2**16, (H, W, 4), np.uint16)
FEW = RGB.quantize(7)
ON_AND_OFF = GREY.point(lambda value: 255 * (value > 99), "1")


def deep(channels: int) -> bytes:
    """A PNG of 16 bits."""
    return cv2.imencode(".png", DEEP[:, :, [2, 1, 0, 3][:channels] if channels > 1 else 0])[1].tobytes()


MODES: Mapping[str, tuple[bytes, Any]] = {
    "RGB": (file(RGB), PIXELS),
    "grey": (file(GREY), GREY.convert("RGB")),
    "1 bit": (file(ON_AND_OFF), ON_AND_OFF.convert("RGB")),
    "a palette": (file(FEW), FEW.convert("RGB")),
    "16 bits, grey": (deep(1), (DEEP[:, :, 0] >> 8)[:, :, None].repeat(3, axis=2)),
    "16 bits, RGB": (deep(3), DEEP[:, :, :3] >> 8),
    "16 bits, alpha": (
        deep(4),
        over_white((DEEP[:, :, :3] >> 8).astype(np.uint8), (DEEP[:, :, 3] >> 8).astype(np.uint8)),
    ),
    "alpha": (file(with_alpha(RGB)), over_white(PIXELS, np.asarray(ALPHA))),
    "grey with alpha": (
        file(with_alpha(GREY)),
        over_white(np.asarray(GREY)[:, :, None].repeat(3, axis=2), np.asarray(ALPHA)),
    ),
    "a transparent colour": (
        file(GREY, transparency=GREY.getpixel((3, 2))),
        GREY.point(lambda value: 255 if value == GREY.getpixel((3, 2)) else value).convert("RGB"),
    ),
    "a palette with transparent colours": (
        file(FEW, transparency=bytes([0, 128])),
        over_white(np.asarray(FEW.convert("RGB")), np.array([0, 128, *[255] * 5], np.uint8)[np.asarray(FEW)]),
    ),
    "WebP": (file(RGB, "WEBP", lossless=True), PIXELS),
    "WebP with alpha": (
        file(with_alpha(RGB), "WEBP", lossless=True, exact=True),
        over_white(PIXELS, np.asarray(ALPHA)),
    ),
    "an animated WebP": (
        file(RGB, "WEBP", lossless=True, save_all=True, append_images=[Image.new("RGB", RGB.size)]),
        PIXELS,
    ),
    "an animated PNG": (file(RGB, save_all=True, append_images=[Image.new("RGB", RGB.size)]), PIXELS),
    "a profile": (file(RGB, icc_profile=b"no profile at all"), PIXELS),
    "JPEG": (file(RGB, "JPEG"), Image.open(io.BytesIO(file(RGB, "JPEG")))),
    "progressive JPEG": (
        file(RGB, "JPEG", progressive=True, comment=b"a text", icc_profile=bytes(99), dpi=(300, 300)),
        Image.open(io.BytesIO(file(RGB, "JPEG", progressive=True))),
    ),
    "grey JPEG": (file(GREY, "JPEG"), Image.open(io.BytesIO(file(GREY, "JPEG"))).convert("RGB")),
    "CMYK JPEG": (
        file(RGB.convert("CMYK"), "JPEG"),
        Image.open(io.BytesIO(file(RGB.convert("CMYK"), "JPEG"))).convert("RGB"),
    ),
    "two pictures in a JPEG": (
        file(RGB, "MPO", save_all=True, append_images=[Image.new("RGB", RGB.size)]),
        Image.open(io.BytesIO(file(RGB, "JPEG"))),
    ),
}


@pytest.mark.parametrize("kind", MODES)
def test_every_mode_is_read(kind: str) -> None:
    data, expected = MODES[kind]
    colours = read(data)
    assert colours.dtype == np.uint8
    assert np.abs(colours - np.asarray(expected, np.float64)).max() <= (
        0.5 if "alpha" in kind or "transparent" in kind else 0
    )
    np.testing.assert_array_equal(read(data, "L"), np.asarray(Image.fromarray(colours).convert("L")))


# Orientation.


def exif(orientation: int, order: str = ">", kind: int = 3) -> bytes:
    """A directory with another tag and this one."""
    tags = [
        (0x010F, 2, 4, b"abc\0"),
        (0x0112, kind, 1, struct.pack(order + ("H2x" if kind == 3 else "I"), orientation)),
    ]
    begin = {">": b"MM\0*", "<": b"II*\0"}[order] + struct.pack(order + "IH", 8, len(tags))
    return begin + b"".join(struct.pack(order + "HHI", *tag[:3]) + tag[3] for tag in tags) + bytes(4)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_exif_turns(kind: str, orientation: int) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    upright = read(file(RGB, kind, **options))
    for order, size in ((">", 3), ("<", 3), (">", 4), ("<", 4)):
        data = file(RGB, kind, exif=b"Exif\0\0" + exif(orientation, order, size), **options)
        with Image.open(io.BytesIO(data)) as theirs:
            expected = np.asarray(ImageOps.exif_transpose(theirs).convert("RGB"))
        np.testing.assert_array_equal(read(data), expected)
        assert (orientation == 1) == (expected.shape == upright.shape and (expected == upright).all())


def test_transparent_parts_turn_with_the_picture() -> None:
    assert read_photo(file(RGB), "RGB", "image").alpha is None
    for orientation, turned in ((1, ALPHA), (6, ALPHA.transpose(Image.Transpose.ROTATE_270))):
        photo = read_photo(file(with_alpha(RGB), exif=b"Exif\0\0" + exif(orientation)), "RGB", "image")
        assert photo.alpha is not None
        assert photo.pixels.size == photo.alpha.size == turned.size
        np.testing.assert_array_equal(photo.alpha, turned)


@pytest.mark.parametrize("broken", [b"", b"II*\0", exif(6)[:20], exif(0), exif(9), b"MM\0*\xff\xff\xff\xff", bytes(40)])
def test_exif_that_cannot_be_read_turns_nothing(broken: bytes) -> None:
    np.testing.assert_array_equal(read(file(RGB, exif=b"Exif\0\0" + broken)), PIXELS)


# Files that are no images, or too much.


def png_of(width: int, height: int, packed: bytes = b"") -> bytes:
    """A grey PNG with this header and these compressed pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), (b"IDAT", packed), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def webp_of(width: int, height: int) -> bytes:
    canvas = (
        b"VP8X" + struct.pack("<II", 10, 0) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    )
    return b"RIFF" + struct.pack("<I", 4 + len(canvas)) + b"WEBP" + canvas


JPG = file(RGB, "JPEG")
FRAME = JPG.index(b"\xff\xc0")


def jpeg_of(width: int, height: int) -> bytes:
    return JPG[: FRAME + 5] + struct.pack(">HH", height, width) + JPG[FRAME + 9 :]


TOO_LARGE = f"must have at most {MAX_PIXELS} pixels, and 65535 a side, and is "
BAD: Mapping[str, tuple[bytes, str]] = {
    "nothing": (b"", "must be a PNG, JPEG or WebP file, and is empty"),
    "text": (b"GIF89a", "must be a PNG, JPEG or WebP file, and is none of these"),
    "a wide PNG": (png_of(70000, 1, zlib.compress(bytes(70001))), TOO_LARGE + "70000x1"),
    "a large PNG": (png_of(30000, 30000, zlib.compress(bytes(9))), TOO_LARGE + "30000x30000"),
    "a PNG without pixels": (png_of(4, 4), "is a PNG whose pixels cannot be read"),
    "a PNG of nothing": (png_of(0, 4), TOO_LARGE + "0x4"),
    "a PNG that is cut": (file(RGB)[:-20], "is a PNG that is cut short"),
    "a damaged PNG": (file(RGB)[:50] + b"!" + file(RGB)[51:], "is a PNG that is damaged"),
    "a large WebP": (webp_of(2**24, 2**24), TOO_LARGE + "16777216x16777216"),
    "a large lossless WebP": (
        b"RIFF\0\0\0\0WEBPVP8L\0\0\0\0\x2f\xff\xff\xff\x0f" + bytes(9), TOO_LARGE + "16384x16384"
    ),
    "a WebP of something": (b"RIFF\0\0\0\0WEBPJUNK" + bytes(99), "is a WebP without a header"),
    "a WebP that is cut": (file(RGB, "WEBP")[:-20], "is a WebP whose pixels cannot be read"),
    "the beginning of a WebP": (file(RGB, "WEBP")[:20], "is a WebP that is cut short"),
    "a large JPEG": (jpeg_of(40000, 40000), TOO_LARGE + "40000x40000"),
    "a JPEG that is cut": (JPG[:-40], "is a JPEG whose pixels cannot be read"),
    "the beginning of a JPEG": (JPG[:100], "is a JPEG that is cut short"),
    "a JPEG with two sizes": (
        JPG[:FRAME] + jpeg_of(1, 1)[FRAME : FRAME + 19] + JPG[FRAME:], "is a JPEG that tells 2 sizes"
    ),
    "a JPEG with many segments": (JPG[:2] + b"\xff\xe5\0\2" * 2000 + JPG[2:], "is a JPEG of more than 1024 segments"),
    "a JPEG with many scans": (JPG[:-2] + JPG[JPG.index(b"\xff\xda") : -2] * 300, "is a JPEG of more than 256 scans"),
    "a JPEG with a hole": (JPG[:20] + bytes(9) + JPG[20:], "is a JPEG that is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_image_or_too_much_is_refused_in_a_sentence(kind: str) -> None:
    data, said = BAD[kind]
    assert problem_of(data) == said


def test_compressed_pixels_of_a_bomb_are_counted_before_they_are_decoded() -> None:
    packed = zlib.compress(bytes(10**7), 1)
    assert read(png_of(8, 8, packed)).shape == (8, 8, 3)  # the rest is never unpacked
    said = f"is a PNG with {len(packed) + 10**5} bytes of compressed pixels, and may have at most 65680"
    assert problem_of(png_of(8, 8, packed + bytes(10**5))) == said


FILES = [
    *(file_of(png) for png in (*GOOD_PNGS, *BAD_PNGS)),
    *(data for data, _ in MODES.values()),
    file(RGB, "JPEG", exif=b"Exif\0\0" + exif(6)),
    file(RGB, "WEBP", exif=exif(6)),
]


@given(st.sampled_from(FILES), st.data())
@examples(600)
def test_a_damaged_file_is_read_or_refused(data: bytes, draw: st.DataObject) -> None:
    damaged = bytearray(data)
    for _ in range(draw.draw(st.integers(1, 4))):
        place = draw.draw(st.integers(0, len(damaged)))
        kind = draw.draw(st.sampled_from(["cut", "change", "insert", "remove"]))
        noise = draw.draw(st.binary(min_size=1, max_size=6))
        match kind:
            case "cut":
                del damaged[place:]
            case "change":
                damaged[place : place + len(noise)] = noise
            case "insert":
                damaged[place:place] = noise
            case _:
                del damaged[place : place + len(noise)]
    mode: Mode = draw.draw(st.sampled_from(["RGB", "L"]))
    try:
        photo = read_photo(bytes(damaged), mode, "image").pixels
    except Invalid as refused:
        [error] = refused.errors
        assert error["loc"] == ["image"]
    else:
        assert photo.mode == mode
        assert photo.width * photo.height <= MAX_PIXELS


# Fitting.

SIZES = st.tuples(st.integers(1, 90), st.integers(1, 90))


def processed(picture: Image.Image, group: Group, **options: Any) -> NDArray[np.float32]:
    """As diffusers' pipelines prepare images."""
    mode = options.pop("resize_mode", "default")
    processor = VaeImageProcessor(vae_scale_factor=1, **options)
    came: NDArray[np.float32] = processor.preprocess(picture, group.height, group.width, resize_mode=mode)[0].numpy()
    return came


def a_picture(size: tuple[int, int], seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8))


@given(SIZES, SIZES, st.integers(0, 99))
def test_stretching_is_what_diffusers_does(size: tuple[int, int], to: tuple[int, int], seed: int) -> None:
    picture, group = a_picture(size, seed), Group(*to)
    np.testing.assert_array_equal(image_of(fitted(picture, group, "stretch")), processed(picture, group))
    grey = picture.convert("L")
    np.testing.assert_array_equal(image_of(fitted(grey, group, "stretch")), processed(grey, group))
    mask = processed(grey, group, do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    np.testing.assert_array_equal(fitted(grey, group, "stretch") >= 128, mask[0] == 1)


@given(SIZES, SIZES, st.integers(0, 99))
def test_cropping_is_what_diffusers_calls_crop(size: tuple[int, int], to: tuple[int, int], seed: int) -> None:
    picture, group = a_picture(size, seed), Group(*to)
    theirs = processed(picture, group, resize_mode="crop")
    np.testing.assert_array_equal(image_of(fitted(picture, group, "crop")), theirs)


def test_a_very_long_image_is_cropped_in_little_memory() -> None:
    """Scaled as a whole, it would have a billion pixels."""
    strip = Image.new("RGB", (60000, 2), "red")
    strip.paste("blue", (30000, 0, 60000, 2))
    middle = fitted(strip, Group(200, 200), "crop")
    assert middle.shape == (200, 200, 3)
    assert (middle[:, 0] > [250, -1, -1]).all()
    assert (middle[:, -1] > [-1, -1, 250]).all()


# What counts is the decoded picture.


def hash_of(data: bytes, mode: Mode = "RGB") -> str:
    return digest(read_photo(data, mode, "image").pixels)


def test_a_picture_has_one_hash_however_it_was_sent() -> None:
    turned = RGB.transpose(Image.Transpose.ROTATE_90)
    sent = [
        file(RGB), file(RGB, "WEBP", lossless=True), file(RGB, compress_level=0, icc_profile=b"x"),
        file(RGB.convert("RGBA")), file(turned, exif=b"Exif\0\0" + exif(6)),
    ]  # fmt: skip
    assert len({hash_of(data) for data in sent}) == 1
    greys = [file(GREY), file(GREY.convert("RGB")), file(GREY.quantize(256, dither=Image.Dither.NONE))]
    assert len({hash_of(data, mode) for data in greys[:2] for mode in ("RGB", "L")}) == 2
    others = [file(turned), file(GREY), file(RGB.crop((0, 0, W, H - 1))), file(Image.new("RGB", (8, 12)))]
    assert len({hash_of(data) for data in (sent[0], file(Image.new("RGB", (12, 8))), *others)}) == 6


def test_the_hash_is_as_documented() -> None:
    """Lines are hashed in groups, which must not show."""
    picture = a_picture((300, 401), 1)
    written = b"RGB 401x300\n" + np.asarray(picture).tobytes()
    assert hash_of(file(picture)) == hashlib.sha256(written).hexdigest()


# Pictures.

WIDE = replace(
    SERVED,
    model=replace(MODEL, image_shape=(3, 8, 8), sample_shape=(3, 8, 8)),
    groups=(Group(8, 8), Group(8, 16), Group(16, 8)),
)


def pictured(served: Served = WIDE, mask: Image.Image | None = None, **fields: Any) -> Picture:
    return picture_of(Attached(SampleRequest(**fields), file(RGB), None if mask is None else file(mask)), served)


def test_an_image_is_fitted_to_the_size_that_is_asked_for_or_the_nearest() -> None:
    assert pictured().group == (8, 16)  # 12x8, as width x height
    assert pictured(width=8, height=16).group == (16, 8)
    assert pictured(height=16).group == (16, 8)
    with pytest.raises(Invalid, match="height: must, without width, belong"):
        pictured(height=9)
    np.testing.assert_array_equal(pictured().image, processed(RGB, Group(8, 16)))
    cropped = processed(RGB, Group(16, 8), resize_mode="crop")
    np.testing.assert_array_equal(pictured(fit="crop", height=16).image, cropped)


def test_a_mask_is_its_grey_value_at_the_images_size() -> None:
    mask = Image.fromarray(np.tile(np.linspace(0, 255, 24, dtype=np.uint8), (10, 1)))
    picture = pictured(mask=mask)
    assert picture.mask is not None
    assert picture.mask.dtype == bool
    assert picture.mask[0].tolist() == [False] * 8 + [True] * 8
    assert picture.mask_sha256 == hash_of(file(mask), "L")
    same, other = pictured(mask=mask.convert("RGB")), pictured(mask=ImageOps.invert(mask))
    assert same.mask_sha256 == picture.mask_sha256 != other.mask_sha256
    assert other.image_sha256 == picture.image_sha256 == pictured().image_sha256 == hash_of(file(RGB))
    hole = Image.new("RGBA", (16, 8), "black")
    hole.paste((0, 0, 0, 0), (4, 0, 16, 8))
    assert pictured(mask=hole).mask.sum() == 12 * 8  # type: ignore[union-attr]  # transparent is white


def test_a_mask_that_only_its_transparency_tells_is_refused() -> None:
    strokes = Image.new("RGBA", (16, 8), (255, 255, 255, 0))
    strokes.paste("white", (0, 0, 4, 8))
    with pytest.raises(Invalid, match="mask_image: is white everywhere, for its transparent parts are laid over white"):
        pictured(mask=strokes)
    assert pictured(mask=Image.new("RGB", (3, 3), "white")).mask.all()  # type: ignore[union-attr]


def test_a_grey_model_gets_grey_and_others_than_pictures_get_none() -> None:
    def of_channels(channels: int) -> Served:
        shape = (channels, 8, 8)
        return replace(WIDE, model=replace(WIDE.model, image_shape=shape, sample_shape=shape))

    np.testing.assert_array_equal(pictured(of_channels(1)).image, processed(GREY, Group(8, 16)))
    with pytest.raises(Invalid, match="image: must be left out: images of this model have 4 channels"):
        pictured(of_channels(4))
    with pytest.raises(Invalid, match="mask_image: needs an image"):
        picture_of(Attached(SampleRequest(), mask=file(GREY)), WIDE)


# Bodies.

SAMPLE = RequestModel(SampleRequest, WIDE, max_images=2, timeout=9)


def asked(content_type: str, body: bytes) -> tuple[SampleRequest, Attached | None]:
    return read_sample(content_type, body, SAMPLE, MAX_PLAIN_JSON)


def by_json(values: Json) -> tuple[SampleRequest, Attached | None]:
    return asked("application/json", json.dumps(values).encode())


def by_form(files: Any = None, **fields: str) -> tuple[SampleRequest, Attached | None]:
    form = httpx.Request("POST", "http://x", files=files or {"seed": (None, "7")}, data=fields)
    return asked(form.headers["content-type"], form.read())


def in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def refusal(read: Callable[[], object]) -> str:
    with pytest.raises(Invalid) as refused:
        read()
    return str(refused.value)


def test_json_and_forms_carry_the_same() -> None:
    png, jpg = file(RGB), file(GREY, "JPEG")
    fields = SampleRequest(seed=7, strength=0.5, paste_original=True)
    expected = fields, Attached(fields, png, jpg)
    values: Json = {"seed": 7, "strength": 0.5, "paste_original": True}
    broken = base64.encodebytes(png).decode()
    for image in (in_base64(png), broken, broken.replace("\n", "\r\n"), f"data:image/webp;base64,{in_base64(png)}"):
        url = f"data:image/jpeg;base64,{in_base64(jpg)}"
        assert by_json({**values, "image": image, "mask_image": url}) == expected
        sent = {"seed": "7", "strength": "0.5", "paste_original": "true"}
        assert by_form({"image": (None, image), "mask_image": (None, url)}, **sent) == expected
        for name in ("a.png", None):
            assert by_form({"image": (name, png), "mask_image": (name, jpg)}, **sent) == expected
    escaped = json.dumps({**values, "image": in_base64(png), "mask_image": in_base64(jpg)}).replace("/", "\\/")
    assert asked("application/json", escaped.encode()) == expected


def test_without_images_a_body_is_what_it_was() -> None:
    plain = SampleRequest(seed=7), None
    assert by_json({"seed": 7}) == by_json({"seed": 7, "image": None, "mask_image": None}) == plain
    assert by_form() == plain
    assert asked("", b"") == asked("multipart/form-data", b"") == (SampleRequest(), None)
    unchosen = b'--x\r\nContent-Disposition: form-data; name="image"; filename=""\r\n\r\n\r\n--x--\r\n'
    assert asked("multipart/form-data; boundary=x", unchosen) == (SampleRequest(), None)


def test_json_may_be_longer_by_its_images_alone() -> None:
    large = bytes(2 * MAX_PLAIN_JSON)
    fields, attached = by_json({"image": in_base64(large)})
    assert attached == Attached(fields, large)
    for values in ({"prompt": "x" * 2 * MAX_PLAIN_JSON}, {"prompt": '"image"' * MAX_PLAIN_JSON, "image": "AAAA"}):
        assert refusal(functools.partial(by_json, values)).startswith("body: has ")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"image": 3}, "image: must be a string: a PNG, JPEG or WebP file, in base64"),
        ({"mask_image": []}, "mask_image: must be a string: a PNG, JPEG or WebP file, in base64"),
        ({"mask_image": "AAA"}, "mask_image: is not valid base64: Incorrect padding"),
        ({"image": "data:image/gif;base64,AAAA"}, 'image: must be a PNG, JPEG or WebP file, and is "image/gif" by'),
        ({"image": "data:image/png,AAAA"}, 'image: must be in base64, and begins with "data:image/png,AAAA"'),
        ({"images": "AAAA"}, "images: there is no such field"),
        ({"image": "AAAA", "strength": 0}, "strength: must be more than 0 and at most 1, and is 0"),
    ],
)  # fmt: skip
def test_errors_name_the_field_of_json(values: Json, said: str) -> None:
    assert refusal(functools.partial(by_json, values)).startswith(said)


def test_errors_name_the_field_of_a_form() -> None:
    png = ("a.png", file(RGB))
    for files, said in (
        ([("image", png), ("image", png)], "image: is given twice"),
        ([("image", (None, "AAAA")), ("image", png)], "image: is given twice"),
        ([("picture", png)], "picture: is a file, and only image and mask_image may be files"),
        ([("image", png), ("mask_image", png), ("more", png)], "body: is not a readable form: Too many files"),
        ([("mask_image", (None, "???"))], "mask_image: is not valid base64"),
        ([("image", (None, b"\xff\xfe"))], "image: must be text in UTF-8"),
    ):
        assert refusal(functools.partial(by_form, files)).startswith(said)
