"""Malformed uploads of every kind: each gives a clear refusal or an image, in bounded memory."""

import base64
import contextlib
import io
import json
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from service.errors import Invalid, ServiceError
from service.http.models import RequestModel
from service.http.parsing import read_upload
from service.http.uploads import decode
from service.plan.fields import NoiseRequest
from tests.checkpoints import save_latent_pipeline, small_autoencoder, small_unet
from tests.properties import examples
from tests.reference import AutoencoderKL
from tests.servers import ROOT, Json, ServerProcess, problem, read_npy, serving, side_by_side, write_npy
from tests.test_responses import SERVED

NOISE = RequestModel(NoiseRequest, SERVED, max_images=1, timeout=1)
SHAPE = (1, 16, 16)  # of the images of these tests' server
GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6
CHANNELS = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGBA: 4}
MAGIC = b"\x89PNG\r\n\x1a\n"


# Files of every kind, mostly valid. A PNG is a list of chunks, so that each can be damaged.


@dataclass(frozen=True)
class Chunk:
    """A chunk of a PNG. Its length and checksum are right unless given."""

    name: bytes
    data: bytes = b""
    length: int | None = None
    checksum: int | None = None

    def file(self) -> bytes:
        length = len(self.data) if self.length is None else self.length
        checksum = zlib.crc32(self.name + self.data) if self.checksum is None else self.checksum
        return struct.pack(">I", length) + self.name + self.data + struct.pack(">I", checksum)


Png = list[Chunk]


def header(depth: int, colour: int, width: int = 16, height: int = 16, interlaced: int = 0) -> Chunk:
    return Chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced))


def pixels(depth: int, colour: int) -> NDArray[Any]:
    """Random pixels that are valid for a grey model: all channels equal, and opaque."""
    top = 2**depth - 1
    grey = np.random.default_rng(depth + colour).integers(0, top + 1, (16, 16, 1))
    colours = grey.repeat(3 if colour in (RGB, RGBA) else 1, axis=2)
    return np.dstack([colours, np.full_like(grey, top)]) if colour in (GREY_ALPHA, RGBA) else colours


def rows(values: NDArray[Any], depth: int) -> bytes:
    if depth < 8:
        bits = values.reshape(len(values), -1, 1) >> np.arange(depth)[::-1] & 1
        packed = np.packbits(bits.reshape(len(values), -1).astype(np.uint8), axis=1)
        return b"".join(b"\0" + row.tobytes() for row in packed)
    return b"".join(b"\0" + row.astype(">u2" if depth == 16 else np.uint8).tobytes() for row in values)


ADAM7 = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]


def still(depth: int, colour: int, interlaced: bool = False, *extra: Chunk) -> Png:
    values = pixels(depth, colour)
    passes = [values[y::dy, x::dx] for y, x, dy, dx in ADAM7] if interlaced else [values]
    data = zlib.compress(b"".join(rows(part, depth) for part in passes))
    half = len(data) // 2
    kept = [header(depth, colour, interlaced=int(interlaced)), *extra]
    return [*kept, Chunk(b"IDAT", data[:half]), Chunk(b"IDAT", data[half:]), Chunk(b"IEND")]


COLOURS = Chunk(b"PLTE", bytes(range(256)) * 3)
FRAME = struct.pack(">IIIIIHHBB", 0, 16, 16, 0, 0, 1, 1, 0, 0)
KINDS = [(depth, colour) for depth in (8, 16) for colour in (GREY, GREY_ALPHA, RGB, RGBA)]
GOOD_PNGS: Sequence[Png] = [
    *(still(depth, colour, interlaced) for depth, colour in KINDS for interlaced in (False, True)),
    still(8, GREY, False, Chunk(b"tEXt", b"parameters\0{}"), Chunk(b"zTXt", b"a\0\0" + zlib.compress(b"text"))),
    still(8, GREY, False, Chunk(b"gAMA", b"\0\0\xb1\x8f"), Chunk(b"eXIf", b"MM\0*" + bytes(9))),
    still(8, GREY, False, Chunk(b"acTL", struct.pack(">II", 2, 0)), Chunk(b"fcTL", FRAME)),
]
BAD_PNGS: Sequence[Png] = [
    *(still(depth, PALETTE, False, COLOURS) for depth in (1, 2, 4, 8)),
    *(still(depth, GREY) for depth in (1, 2, 4)),
    still(8, GREY, False, Chunk(b"tRNS", b"\0\3")),
    still(8, RGB, False, Chunk(b"tRNS", bytes(6))),
    still(8, PALETTE, False, COLOURS, Chunk(b"tRNS", bytes(256))),
]
GOOD_ARRAYS = [
    write_npy(np.asarray(np.random.default_rng(0).normal(size=SHAPE), dtype, order=order))
    for dtype in ("<f4", ">f4")
    for order in ("C", "F")
]
BAD_ARRAYS = [
    write_npy(np.zeros(SHAPE, dtype)) for dtype in ("<f2", "<f8", "u1", "<i4", "<c8", "?", "S4", "M8[s]", "V7", "f4,f4")
]  # fmt: skip


def file_of(png: Png) -> bytes:
    return MAGIC + b"".join(chunk.file() for chunk in png)


@pytest.mark.parametrize("png", GOOD_PNGS, ids=range(len(GOOD_PNGS)))
def test_the_good_pngs_are_good(png: Png) -> None:
    """So mutations start from files that are read to their end. Pillow decodes them to the same pixels."""
    with Image.open(io.BytesIO(file_of(png))) as theirs:
        grey = np.asarray(theirs, np.float64).reshape(16, 16, -1)[:, :, 0]
    came = decoded(file_of(png))
    assert came is not None
    top = 255 if grey.max() < 256 else 65535
    np.testing.assert_allclose((came[0] + 1) / 2 * top, grey, atol=top / 255 + 1)


@pytest.mark.parametrize("png", BAD_PNGS, ids=range(len(BAD_PNGS)))
def test_the_bad_pngs_are_refused(png: Png) -> None:
    with Image.open(io.BytesIO(file_of(png))) as theirs:
        theirs.load()  # they are valid PNGs
    assert decoded(file_of(png)) is None


def test_the_arrays_are_what_they_should_be() -> None:
    assert all(decoded(data) is not None for data in GOOD_ARRAYS)
    assert all(decoded(data) is None for data in BAD_ARRAYS)


# Mutations.

WORDS = st.sampled_from((0, 1, 2, 15, 16, 17, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1))
KNOWN = b"IHDR PLTE IDAT IEND tRNS acTL fcTL fdAT iCCP zTXt iTXt tEXt eXIf gAMA cHRM sBIT bKGD hIST sPLT tIME"
NAMES = st.sampled_from([*KNOWN.split(), b"abCd", b"\0\0\0\0", b"\xff\n\r "])


@st.composite
def bits_flipped(draw: st.DrawFn, data: bytes) -> bytes:
    damaged = bytearray(data)
    for _ in range(draw(st.integers(1, 4)) if data else 0):
        damaged[draw(st.integers(0, len(data) - 1))] ^= 1 << draw(st.integers(0, 7))
    return bytes(damaged)


@st.composite
def cut_and_pasted(draw: st.DrawFn, data: bytes) -> bytes:
    """Drop, repeat, move or replace a piece."""
    begin, end = sorted((draw(st.integers(0, len(data))), draw(st.integers(0, len(data)))))
    end = min(end, begin + draw(st.sampled_from((1, 2, 8, 100, 10**6))))
    piece, place = data[begin:end], draw(st.integers(0, len(data)))
    kind = draw(st.sampled_from(("left out", "repeated", "moved", "replaced")))
    if kind == "repeated":
        return data[:place] + piece * draw(st.sampled_from((1, 2, 50))) + data[place:]
    rest = data[:begin] + data[end:]
    return {
        "left out": rest,
        "moved": rest[:place] + piece + rest[place:],
        "replaced": data[:begin] + draw(st.binary(max_size=12)) + data[end:],
    }[kind]


@st.composite
def a_chunk(draw: st.DrawFn) -> Chunk:
    content = st.binary(max_size=40)
    packed = st.binary(max_size=600).map(zlib.compress)
    frames = st.builds(lambda a, b: struct.pack(">II", a, b), WORDS, WORDS)
    return Chunk(draw(NAMES), draw(content | packed | frames | packed.map(lambda data: b"a\0\0" + data)))


@st.composite
def a_damaged_chunk(draw: st.DrawFn, chunk: Chunk) -> Chunk:
    kind = draw(st.sampled_from(("bits", "pieces", "name", "length", "checksum", "size", "pixels", "pixels")))
    if kind == "bits":
        return replace(
            chunk, data=draw(bits_flipped(chunk.data)), checksum=draw(st.none() | st.just(zlib.crc32(chunk.data)))
        )
    if kind == "pieces":
        return replace(chunk, data=draw(cut_and_pasted(chunk.data)))
    if kind == "name":
        return replace(chunk, name=draw(NAMES))
    if kind == "length":
        return replace(chunk, length=draw(WORDS | st.integers(0, 2 * len(chunk.data) + 20)))
    if kind == "checksum":
        return replace(chunk, checksum=draw(WORDS))
    if kind == "size" and len(chunk.data) == 13:
        width, height = draw(WORDS), draw(WORDS)
        flags = draw(st.tuples(*[st.integers(0, 20)] * 2, *[st.integers(0, 2)] * 3))
        return replace(
            chunk, data=struct.pack(">II", *draw(st.sampled_from(((16, 16), (width, height))))) + bytes(flags)
        )
    return replace(chunk, data=zlib.compress(draw(st.binary(max_size=2000))[: draw(st.integers(0, 2000))]))


@st.composite
def pngs(draw: st.DrawFn) -> bytes:
    """A PNG with chunks dropped, repeated, moved, inserted or damaged. The other chunks stay intact."""
    png = list(draw(st.sampled_from([*GOOD_PNGS, *BAD_PNGS])))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(png) - 1))
        kind = draw(st.sampled_from(("left out", "repeated", "moved", "put in", "damaged", "damaged", "damaged")))
        if kind == "left out" and len(png) > 1:
            del png[place]
        elif kind == "repeated":
            png[place:place] = [png[place]] * draw(st.sampled_from((1, 3, 200)))
        elif kind == "moved":
            png.insert(draw(st.integers(0, len(png) - 1)), png.pop(place))
        elif kind == "put in":
            png.insert(place, draw(a_chunk()))
        else:
            png[place] = draw(a_damaged_chunk(png[place]))
    data = file_of(png)
    return draw(st.just(data) | cut_and_pasted(data))


SHAPES = st.sampled_from(
    ["(1, 16, 16)", "(1,16,16L)", "(16, 16)", "()", "(256,)", "(1, 16, -16)", "(0, 16, 16)", "(1, 16, 16.0)", "'abc'",
     "(2**40,)", "(99999999999999999999,)", "(1, 4294967296, 4294967296)", "(True, 16, 16)", "[1, 16, 16]", "None"]
)  # fmt: skip
DTYPES = st.sampled_from(
    ["'<f4'", "'>f4'", "'=f4'", "'f4'", "'|O'", "'<f8'", "'V2147483647'", "'S999999999'", "[('a', '<f4')]",
     "'<f4, <f4'", "('<f4', (2, 3))", "('<f4', (9999, 9999, 9999))", "[('a', [('b', '|O')])]", "'M8[s]'", "None", "5"]
)  # fmt: skip
ORDERS = st.sampled_from(["False", "True", "0", "'C'", "None"])


@st.composite
def arrays(draw: st.DrawFn) -> bytes:
    """An .npy with its own header, or with damage anywhere."""
    if draw(st.booleans()):
        data = draw(st.sampled_from([*GOOD_ARRAYS, *BAD_ARRAYS]))
        return draw(bits_flipped(data) | cut_and_pasted(data))
    text = f"{{'descr': {draw(DTYPES)}, 'fortran_order': {draw(ORDERS)}, 'shape': {draw(SHAPES)}, }}"
    text = draw(st.just(text) | cut_and_pasted(text.encode()).map(lambda damaged: damaged.decode("latin-1")))
    head = text.ljust(draw(st.sampled_from((0, 117, 20_000)))).encode("latin-1") + b"\n"
    major, minor = draw(st.sampled_from(((1, 0), (2, 0), (3, 0), (1, 1), (0, 0), (9, 255))))
    length = draw(st.just(len(head)) | WORDS)
    words = struct.pack("<H", length % 2**16) if major == 1 else struct.pack("<I", length)
    values = draw(st.sampled_from((GOOD_ARRAYS[0][-1024:], b"", b"\x80\x04N.", bytes(1023), b"\xff" * 1024)))
    return b"\x93NUMPY" + bytes((major, minor)) + words + head + values


files = st.one_of(pngs(), arrays())


# Properties of every file.

TELLTALE = re.compile(r"Traceback|File \"|\.py\b|site-packages|/usr/|/tmp/|/home/|/work/|at 0x[0-9a-f]")


def decoded(data: bytes) -> NDArray[np.float32] | None:
    """The image of a file; None if it is refused. Any other error fails the test, and so does any warning."""
    refusal: Invalid | None = None
    try:
        image = decode(data, [SHAPE], 1.0)
    except Invalid as error:
        refusal = error
    if refusal is not None:
        assert [one["loc"] for one in refusal.errors] == [["image"]]
        assert len(str(refusal)) < 300
        assert not TELLTALE.search(str(refusal))
        return None
    assert image.shape == SHAPE
    assert image.dtype == np.float32
    assert np.isfinite(image).all()
    return image


@examples(1000)
@given(pngs())
def test_any_png_is_an_image_or_refused(data: bytes) -> None:
    decoded(data)


@examples(1000)
@given(arrays())
def test_any_npy_is_an_image_or_refused(data: bytes) -> None:
    decoded(data)


@examples(300)
@given(st.sampled_from([*GOOD_PNGS, *BAD_PNGS]), st.data())
def test_a_png_with_any_wrong_checksum_is_refused(png: Png, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(png) - 1))
    right = zlib.crc32(png[place].name + png[place].data)
    wrong = data.draw(st.integers(0, 2**32 - 1).filter(lambda checksum: checksum != right))
    assert decoded(file_of([*png[:place], replace(png[place], checksum=wrong), *png[place + 1 :]])) is None


# Forms.

TYPE = b"multipart/form-data; boundary=BOUNDARY"
DISPOSITION = b'Content-Disposition: form-data; name="%s"'
FILE = DISPOSITION % b"image" + b'; filename="a"'


def form(*parts: tuple[bytes, bytes]) -> bytes:
    """A form of parts with these headers and contents."""
    lines = [b"--BOUNDARY\r\n%b\r\n\r\n%b\r\n" % part for part in parts]
    return b"".join(lines) + b"--BOUNDARY--\r\n"


def upload(data: bytes) -> bytes:
    return form((FILE, data), (DISPOSITION % b"timestep", b"9"))


# Memory.


LEAST = 64 * 2**20  # bytes; every bomb's content is at least as large, and reading one never takes as much


def deflated(size: int) -> bytes:
    """A zlib stream of `size` zeros, without its end."""
    block = zlib.compressobj(9, zlib.DEFLATED, -15)
    megabyte = block.compress(bytes(2**20)) + block.flush(zlib.Z_FULL_FLUSH)
    return b"\x78\xda" + megabyte * (size // 2**20)


def a_bomb(*chunks: Chunk, depth: int = 8, colour: int = GREY) -> bytes:
    return file_of([header(depth, colour), *chunks, *still(depth, colour)[1:]])


def npy_of(text: str, version: int = 1, body: bytes = b"") -> bytes:
    head = text.encode() + b"\n"
    return b"\x93NUMPY" + struct.pack("<BBH" if version == 1 else "<BBI", version, 0, len(head)) + head + body


def image_bombs() -> dict[str, bytes]:
    """Files of at most two megabytes."""
    gigabytes = Chunk(b"IDAT", deflated(2**31))
    huge = "{'descr': '<f4', 'fortran_order': False, 'shape': (%s), }"
    return {
        "IDAT": file_of([header(8, GREY), gigabytes, Chunk(b"IEND")]),
        "IDAT, 16 bit": file_of([header(16, RGB), gigabytes, Chunk(b"IEND")]),
        "IDAT, interlaced": file_of([header(8, RGBA, interlaced=1), gigabytes, Chunk(b"IEND")]),
        "IDAT of a huge size": file_of([header(8, GREY, 2**15, 2**15), gigabytes, Chunk(b"IEND")]),
        "a second size": a_bomb(header(8, RGBA, 2**15, 2**15), gigabytes),
        "many chunks": file_of([header(8, GREY), *[Chunk(b"IDAT", b"x")] * 150_000, Chunk(b"IEND")]),
        "zTXt": a_bomb(Chunk(b"zTXt", b"a\0\0" + gigabytes.data)),
        "iTXt": a_bomb(Chunk(b"iTXt", b"a\0\1\0\0\0" + gigabytes.data), depth=16, colour=RGB),
        "iCCP": a_bomb(Chunk(b"iCCP", b"a\0\0" + gigabytes.data), colour=RGB),
        "frames": a_bomb(Chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0)), Chunk(b"fcTL", FRAME)),
        "length": file_of([header(8, GREY), Chunk(b"IDAT", b"", length=2**32 - 1), Chunk(b"IEND")]),
        "shape": npy_of(huge % "1, 65536, 65536"),
        "huge shape": npy_of(huge % "1, 4294967296, 4294967296", body=bytes(1024)),
        "item": npy_of("{'descr': 'V2147483647', 'fortran_order': False, 'shape': (1, 16, 16), }"),
        "subarray": npy_of("{'descr': ('<f4', (99999, 9999)), 'fortran_order': False, 'shape': (1, 16, 16), }"),
        "header": npy_of("(" * 1_000_000, version=2),
        "numbers": npy_of("[" + "0," * 1_000_000 + "]", version=2),
        "header's length": b"\x93NUMPY\2\0" + b"\xff" * 4 + bytes(1024),
    }


def body_bombs() -> dict[str, tuple[bytes, bytes]]:
    """Bodies of at most five megabytes that only aim to take memory: media type and bytes."""
    as_json = b"application/json"
    good = (FILE, GOOD_ARRAYS[0])
    return {
        "a form with a bomb": (TYPE, upload(image_bombs()["IDAT"])),
        "many parts": (TYPE, form(*[(DISPOSITION % b"a", b"")] * 40_000)),
        "many files": (TYPE, form(*[(FILE, b"")] * 40_000)),
        "many headers": (TYPE, form((FILE + b"\r\nX: y" * 300_000, b""))),
        "a long header": (TYPE, form((FILE + b"\r\nX: " + b"y" * 2_000_000, b""))),
        "a long name": (TYPE, form((DISPOSITION % (b"a" * 2_000_000), b""))),
        "a long field": (TYPE, form(good, (DISPOSITION % b"timestep", b"9" * 2_000_000))),
        "nested forms": (TYPE, form(*[(FILE + b"\r\nContent-Type: multipart/mixed; boundary=BOUNDARY", b"")] * 20_000)),
        "almost boundaries": (TYPE, form((FILE, b"\r\n--BOUNDAR" * 200_000))),
        "base64 with a bomb": (
            as_json,
            json.dumps({"image": base64.b64encode(image_bombs()["IDAT"]).decode()}).encode(),
        ),
        "lists": (as_json, b'{"image": [' + b"[]," * 1_400_000 + b"[]]}"),
        "objects": (as_json, b'{"image": [' + b"{}," * 1_400_000 + b"{}]}"),
        "depth": (as_json, b'{"image": ' + b"[" * 3_000_000),
        "names": (as_json, b"{%b}" % b",".join(b'"%x": 1' % i for i in range(250_000))),
        "digits": (as_json, b'{"image": "", "timestep": ' + b"9" * 3_000_000 + b"}"),
    }


def read(media_type: bytes, body: bytes) -> None:
    read_upload(media_type.decode(), body, NOISE, max_json=2**24)


def growth(work: Callable[[], object]) -> int:
    """The growth of this process's peak memory during a call, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = in_use("VmRSS")
    with contextlib.suppress(ServiceError):
        work()
    return in_use("VmHWM") - before


def in_use(name: str) -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def measure() -> None:
    """Print the growth for each bomb, and for one that is fully unpacked. Runs in its own process."""
    images, bodies = image_bombs(), body_bombs()  # made first, so that none of their freed memory is reused
    grown = {name: growth(partial(decode, data, [SHAPE], 1.0)) for name, data in images.items()}
    grown |= {name: growth(partial(read, *body)) for name, body in bodies.items()}
    grown["goes off"] = growth(lambda: zlib.decompressobj().decompress(deflated(2**31), 2 * LEAST))
    print(json.dumps(grown))


@pytest.fixture(scope="module")
def grown() -> dict[str, int]:
    measuring = [sys.executable, "-c", "from tests.test_fuzz import measure; measure()"]
    ended = subprocess.run(measuring, cwd=ROOT, capture_output=True, text=True, check=True)
    measured: dict[str, int] = json.loads(ended.stdout)
    return measured


@pytest.mark.slow
def test_what_is_small_takes_little_memory(grown: dict[str, int]) -> None:
    assert grown.pop("goes off") > LEAST  # the measurement detects it
    assert len(grown) >= 30
    assert {name: taken for name, taken in grown.items() if taken >= LEAST} == {}


# Over HTTP.


def answered(response: httpx.Response) -> bool:
    """Whether the answer is an image. Otherwise it must be a problem document without details of the server."""
    if response.status_code == 200:
        assert read_npy(response.content).shape == SHAPE
        return True
    assert 400 <= response.status_code < 500, response.text
    said = problem(response, response.status_code)
    assert not TELLTALE.search(response.text), response.text
    assert len(response.content) < 10_000
    assert said["detail"].isprintable()
    return False


def send(server: ServerProcess, path: str, media_type: bytes, body: bytes) -> bool:
    headers = {b"Content-Type": media_type, b"Accept": b"application/x-npy"}
    return answered(server.client.post(path, content=body, headers=headers))


PATHS = st.sampled_from(("/denoise", "/noise"))
MOST_NOISY = 1e4  # largest value of a noisy image


def is_taken(path: str, data: bytes) -> bool:
    image = decoded(data)
    return image is not None and (path == "/noise" or bool((np.abs(image) <= MOST_NOISY).all()))


@examples(250)
@given(path=PATHS, data=files)
def test_any_file_in_a_form_is_answered_or_refused(server: ServerProcess, path: str, data: bytes) -> None:
    assert send(server, path, TYPE, upload(data)) is is_taken(path, data)


@pytest.fixture(scope="module")
def latent_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A latent model's server, whose latents have the shape of images."""
    folder = save_latent_pipeline(
        tmp_path_factory.mktemp("latent"),
        small_autoencoder(AutoencoderKL, in_channels=1, out_channels=1, latent_channels=1, block_out_channels=(8,)),
        small_unet(in_channels=1, out_channels=1, sample_size=16),
    )
    with side_by_side(serving(WEIGHTS=folder, MAX_BATCH=2)) as [server]:
        yield server


@pytest.mark.slow
@examples(250)
@given(path=PATHS, data=files)
def test_any_file_is_encoded_or_refused(latent_server: ServerProcess, path: str, data: bytes) -> None:
    assert send(latent_server, path, TYPE, upload(data)) is is_taken(path, data)


@st.composite
def parts(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """A form part that no browser sends."""
    names = st.sampled_from((b"image", b"timestep", b"seed", b"_charset_", b"", b"\xff\xfe", b'im\\"age', b"a" * 5000))
    name = DISPOSITION % draw(names)
    extra = draw(
        st.sampled_from(
            [
                b"",
                b"; filename=a",
                b'; filename=""',
                b'; filename="../../etc/passwd"',
                b"; filename*=utf-8''%2e%2e",
                b'; filename="a',
                b"; filename=" + b"b" * 9000,
                b'; name="timestep"',
                b'; filename="C:\\x\\y"',
                b";;;=",
            ]
        )
    )
    line = draw(
        st.sampled_from(
            [
                b"",
                b"\r\nContent-Type: image/png",
                b"\r\nContent-Type: text/plain; charset=utf-16",
                b"\r\nno colon",
                b"\r\nContent-Transfer-Encoding: base64",
                b"\r\nContent-Length: 99999999999",
                b"\r\nX: " + b"x" * 9000,
                b"\r\nContent-Type: multipart/mixed; boundary=INNER",
                b"\r\nContent-Disposition: attachment",
                b"\r\n: ",
                b"\r\n folded",
                b"\r\nX\0: y",
                b"\r\nContent-Type: " + b";" * 3000,
                b"\r\nContent-Disposition:",
            ]
        )
    )
    inner = b"--INNER\r\n%b\r\n\r\n%b\r\n--INNER--" % (FILE, GOOD_ARRAYS[0])
    content = st.sampled_from(
        (b"9", b"", b"\xff\xfe9\0", b"-1", b"1e999", inner, GOOD_ARRAYS[0], b"--BOUNDARY", b"9" * 9000)
    )
    return name + extra + line, draw(content | st.binary(max_size=30))


BOUNDARIES = st.sampled_from(
    [b"BOUNDARY", b'"BOUNDARY"', b"BOUND", b"", b'""', b"-", b"--", b"\xe9", b"a b", b"B" * 300, b'"BOUNDARY', b"*"]
)
CHARSETS = st.sampled_from(
    [b"utf-8", b"UTF-8", b"us-ascii", b"latin-1", b"utf-16", b"utf-7", b"utf-99", b"undefined", b"idna", b"punycode",
     b"zlib", b"rot13", b"unicode_escape", b"", b'""', b"a b", b"\xe9", b"..", b"../../etc/passwd", b"utf-8-sig"]
)  # fmt: skip


@st.composite
def content_types(draw: st.DrawFn) -> bytes:
    boundary, charset = b"; boundary=" + draw(BOUNDARIES), b"; charset=" + draw(CHARSETS)
    kinds = [
        TYPE,
        TYPE,
        TYPE + charset,
        TYPE + charset,
        charset + boundary,
        boundary,
        boundary + boundary,
        b";;=; ;boundary",
    ]
    return draw(st.sampled_from([b"multipart/form-data", b"Multipart/Form-Data ", b"multipart/form-data;"])) + draw(
        st.sampled_from([kind.removeprefix(b"multipart/form-data") for kind in kinds])
    )


@st.composite
def forms(draw: st.DrawFn) -> bytes:
    good = [(FILE, draw(st.sampled_from(GOOD_ARRAYS))), (DISPOSITION % b"timestep", b"9")]
    if draw(st.integers(0, 3)) == 0:  # a valid form, to test unusual media types
        return form(*good)
    some = [*good[: draw(st.integers(0, 2))], *draw(st.lists(parts(), max_size=3))]
    some += [some[0]] * draw(st.sampled_from((0, 0, 0, 1, 60))) if some else []
    body = form(*draw(st.permutations(some)))
    return draw(st.just(body) | cut_and_pasted(body) | bits_flipped(body) | st.just(body.replace(b"\r\n", b"\n")))


@examples(500)
@given(path=PATHS, media_type=content_types(), body=forms())
def test_any_form_is_answered_or_refused(server: ServerProcess, path: str, media_type: bytes, body: bytes) -> None:
    send(server, path, media_type, body)


GOOD_TEXT = base64.b64encode(GOOD_ARRAYS[0]).decode()
TEXTS = st.one_of(
    cut_and_pasted(GOOD_TEXT.encode()).map(lambda data: data.decode("latin-1")),
    bits_flipped(GOOD_TEXT.encode()).map(lambda data: data.decode("latin-1")),
    files.map(lambda data: base64.b64encode(data).decode()),
    st.sampled_from([GOOD_TEXT, GOOD_TEXT + "\n", "data:image/png;base64," + GOOD_TEXT, GOOD_TEXT.replace("A", "-")]),
    st.sampled_from(
        [GOOD_TEXT.rstrip("="), GOOD_TEXT + "=", "=" + GOOD_TEXT, "====", "\ud800", "\0", "é", GOOD_TEXT * 9]
    ),
    st.text(max_size=20),
)
VALUES = st.one_of(
    TEXTS,
    st.sampled_from(
        [None, True, -1, 2**64, 1.5, 9.0, 1e300, float("nan"), float("inf"), [], {}, [[GOOD_TEXT]], {"": 1}]
    ),
)
FIELDS = st.sampled_from(["timestep", "seed", "value_range", "scaling", "image", "", "\ud800", "__class__", "a" * 3000])


@examples(300)
@given(path=PATHS, image=VALUES, fields=st.dictionaries(FIELDS, VALUES, max_size=2), data=st.data())
def test_any_json_is_answered_or_refused(
    server: ServerProcess, path: str, image: object, fields: Json, data: st.DataObject
) -> None:
    body = json.dumps({"timestep": 9, "image": image, **fields}).encode()
    encoded = st.sampled_from(
        [body, body.decode().encode("utf-16"), b"\xef\xbb\xbf" + body, body + body, b"[" + body + b"]"]
    )
    send(
        server,
        path,
        b"application/json",
        data.draw(st.just(body) | encoded | cut_and_pasted(body) | bits_flipped(body)),
    )


def test_after_all_that_the_server_is_unharmed(server: ServerProcess) -> None:
    assert server.client.get("/health/ready").status_code == 200
    assert send(server, "/denoise", TYPE, upload(GOOD_ARRAYS[0]))
    server.wait_until_idle()
    assert [line for line in server.lines if line["level"] == "error"] == []
