"""Every image that a model drew says so in XMP. An image of /noise is the client's own, and has no mark."""

import base64
import io
import json
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image as PillowImage

from model.rows import Image
from service.http.formats import encode_lossy
from service.http.png import encode_png
from stepwise import read_recipe
from tests.servers import ROOT, Json, ServerProcess, needs
from tests.test_denoise import png as upload
from tests.test_events import watched

DESCRIPTION = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description"
SOURCE = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"
BY_A_MODEL = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"


def chunks(png: bytes) -> Iterator[tuple[bytes, bytes]]:
    begin = 8
    while begin < len(png):
        end = begin + 12 + int.from_bytes(png[begin : begin + 4], "big")
        yield png[begin + 4 : begin + 8], png[begin + 8 : end - 4]
        begin = end


def source_in(xmp: bytes) -> str | None:
    """The Digital Source Type of a packet of XMP."""
    [description] = ElementTree.fromstring(xmp.decode().removeprefix("\ufeff")).iter(DESCRIPTION)
    return description.get(SOURCE)


def source_of(png: bytes) -> str | None:
    """The Digital Source Type of a PNG, from an uncompressed chunk iTXt; None without XMP."""
    packets = [content for name, content in chunks(png) if name == b"iTXt"]
    if not packets:
        return None
    [packet] = packets
    uncompressed_without_language = b"XML:com.adobe.xmp\0\0\0\0\0"
    assert packet.startswith(uncompressed_without_language)
    return source_in(packet.removeprefix(uncompressed_without_language))


def an_image(channels: int) -> Image:
    return np.random.default_rng(0).uniform(-1, 1, (channels, 5, 4)).astype(np.float32)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_has_one_mark_beside_its_recipe_ahead_of_the_pixels(channels: int) -> None:
    png = encode_png(an_image(channels), {"seed": 7})
    assert [name for name, _ in chunks(png)] == [b"IHDR", b"tEXt", b"iTXt", b"IDAT", b"IEND"]
    assert source_of(png) == BY_A_MODEL
    assert read_recipe(png) == {"seed": 7}
    assert encode_png(an_image(channels), {"seed": 7}) == png


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["WEBP", "JPEG"])
def test_webp_and_jpeg_have_the_mark_too(kind: str, channels: int) -> None:
    encoded = encode_lossy(an_image(channels), kind)
    with PillowImage.open(io.BytesIO(encoded)) as image:
        assert (image.format, source_in(image.info["xmp"])) == (kind, BY_A_MODEL)
    assert encode_lossy(an_image(channels), kind) == encoded


def test_every_png_that_a_model_drew_has_the_mark(server: ServerProcess) -> None:
    def drawn(accept: str, **fields: object) -> bytes:
        answer = server.client.post("/sample", json={"seed": 7, **fields}, headers={"Accept": accept})
        assert answer.status_code == 200
        return answer.content

    as_json: Json = json.loads(drawn("application/json", num_images=2))
    archive = zipfile.ZipFile(io.BytesIO(drawn("application/zip", num_images=2)))
    events = watched(server, {"seed": 7, "preview_every": 1})
    pngs = {
        "one": drawn("image/png"),
        "a sheet": drawn("image/png", num_images=2),
        **{f"JSON {image['seed']}": base64.b64decode(image["b64_json"]) for image in as_json["images"]},
        **{f"ZIP {name}": archive.read(name) for name in archive.namelist()},
        **{
            f"{event.name} {i}": base64.b64decode(event.data["b64_json"])
            for i, event in enumerate(events)
            if "b64_json" in event.data
        },
    }
    assert {name.split()[0] for name in pngs} == {"one", "a", "JSON", "ZIP", "preview", "image"}
    assert {name: source_of(png) for name, png in pngs.items()} == dict.fromkeys(pngs, BY_A_MODEL)


def test_denoised_is_marked_and_noised_is_not(server: ServerProcess) -> None:
    sent = {"image": upload(np.zeros((16, 16), np.uint8))}
    denoised = server.client.post("/denoise", files=sent, data={"timestep": 500})
    noised = server.client.post("/noise", files=sent, data={"timestep": 500})
    assert source_of(denoised.content) == BY_A_MODEL
    assert noised.headers["content-type"] == "image/png"
    assert source_of(noised.content) is None


@pytest.mark.slow
@needs("exiftool")
@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
def test_exiftool_reads_the_mark(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"drawn.{suffix}"
    kind = {"webp": "WEBP", "jpg": "JPEG"}.get(suffix)
    file.write_bytes(encode_lossy(an_image(3), kind) if kind else encode_png(an_image(3), {"seed": 7}))
    command = ["exiftool", "-json", "-warning", "-XMP-iptcExt:DigitalSourceType#", str(file)]
    [told] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    assert told == {"SourceFile": str(file), "DigitalSourceType": BY_A_MODEL}


SCRIPT = """
import { readFileSync, writeFileSync } from "node:fs";
import { withRecipe } from "./png.mjs";
writeFileSync("marked.png", withRecipe(new Uint8Array(readFileSync("bare.png")), { seed: 7 }));
"""


@pytest.mark.slow
@needs("node")
def test_the_page_marks_the_pngs_that_it_makes_of_arrays(tmp_path: Path) -> None:
    pixels = np.zeros((5, 4), np.uint8)
    (tmp_path / "png.mjs").write_text((ROOT / "service/http/playground/png.js").read_text())
    (tmp_path / "bare.png").write_bytes(upload(pixels))
    subprocess.run(["node", "--input-type=module", "--eval", SCRIPT], cwd=tmp_path, check=True)
    marked, expected = (tmp_path / "marked.png").read_bytes(), encode_png(an_image(1), {"seed": 7})
    assert read_recipe(marked) == {"seed": 7}
    assert [content for name, content in chunks(marked) if name == b"iTXt"] == [
        content for name, content in chunks(expected) if name == b"iTXt"
    ]
    with PillowImage.open(io.BytesIO(marked)) as image:
        np.testing.assert_array_equal(np.asarray(image), pixels)
