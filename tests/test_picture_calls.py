"""Images and masks on their way to /sample: over HTTP, from the client, and from the command line."""

import base64
import io
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from stepwise import Client, Done, ImageDone, Invalid
from stepwise.cli import exits
from tests.programs import done, refused, stepwise
from tests.servers import Json, ServerProcess, problem, read_parameters, read_png
from tests.test_cli import files
from tests.test_pictures import RGB, file, hash_of
from tests.test_prompts import events_of

JSON, NPY = "application/json", "application/x-npy"
PHOTO = file(RGB.resize((40, 30)), "JPEG")
MASK = Image.new("L", (40, 30))
MASK.paste(255, (20, 0, 40, 30))
FIELDS: Json = {"seed": 7, "strength": 0.6, "class_label": "cat", "fit": "crop", "paste_original": True}
TEXTS = {"seed": "7", "strength": "0.6", "class_label": "cat", "fit": "crop", "paste_original": "true"}


def in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def asked(server: ServerProcess, accept: str = "image/png", **fields: object) -> bytes:
    body = {**FIELDS, "image": in_base64(PHOTO), "mask_image": in_base64(file(MASK)), **fields}
    answer = server.client.post("/sample", json=body, headers={"Accept": accept})
    assert answer.status_code == 200, answer.text
    assert "etag" not in answer.headers
    assert answer.headers["cache-control"] == "no-store"
    return answer.content


def test_the_same_picture_gives_the_same_bytes_however_it_is_sent(server: ServerProcess) -> None:
    drawn = asked(server)
    upright = Image.open(io.BytesIO(PHOTO))
    for photo in (file(upright), file(upright, "WEBP", lossless=True), file(upright.convert("RGBA"))):
        assert asked(server, image=in_base64(photo), mask_image=in_base64(file(MASK.convert("RGB")))) == drawn
    form = {
        "image": ("photo.jpg", PHOTO, "image/jpeg"),
        "mask_image": ("mask.webp", file(MASK, "WEBP", lossless=True), "image/webp"),
    }
    assert server.client.post("/sample", files=form, data=TEXTS).content == drawn
    assert asked(server, image=in_base64(file(RGB))) != drawn


def test_a_recipe_and_its_images_draw_the_same_bytes(server: ServerProcess) -> None:
    """Each image of a request has the bytes of the single one with its seed."""
    answer = httpx.Response(200, content=asked(server, JSON, num_images=3)).json()
    assert answer["parameters"].items() >= {**FIELDS, "class_label": 0, "height": 16, "width": 16}.items()
    for one in answer["images"]:
        png = base64.b64decode(one["b64_json"])
        recipe = read_parameters(png)
        assert recipe["image_sha256"] == hash_of(PHOTO, "L")
        assert recipe["mask_sha256"] == hash_of(file(MASK), "L")
        assert "image" not in recipe
        again = {name: recipe[name] for name in recipe if name not in ("image_sha256", "mask_sha256", "model")}
        del again["fingerprint"]
        assert asked(server, **again) == png
        kept = read_png(asked(server, seed=99, paste_original=True))[:, :8]
        np.testing.assert_array_equal(read_png(png)[:, :8], kept)


def test_every_answer_can_begin_from_an_image(server: ServerProcess) -> None:
    assert asked(server, "application/zip", num_images=2).startswith(b"PK")
    body = {**FIELDS, "image": in_base64(PHOTO), "mask_image": in_base64(file(MASK)), "preview_every": 1}
    events = events_of(server.client.post("/sample", json=body, headers={"Accept": "text/event-stream"}))
    [image] = [data for name, data in events if name == "image"]
    assert image["b64_json"] == in_base64(asked(server))
    assert any(name == "preview" for name, _ in events)
    assert [data for name, data in events if name == "progress"][-1]["fraction"] == 1


def test_a_form_needs_no_file(server: ServerProcess) -> None:
    drawn = server.client.post("/sample", json={"seed": 5}).content
    assert server.client.post("/sample", files={"seed": (None, "5")}).content == drawn


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"image": None}, "mask_image: needs an image"),
        ({"mask_image": None}, "paste_original: must be false"),
        ({"image": None, "mask_image": None}, "strength: must be null without an image"),
        ({"image": "AAAA"}, "image: must be a PNG, JPEG or WebP file, and is none of these"),
        ({"mask_image": in_base64(PHOTO[:-99])}, "mask_image: is a JPEG whose pixels cannot be read"),
        ({"strength": 0.01}, "strength: "),
        ({"height": 17}, "height: must be that of 16x16"),
    ],
)
def test_what_is_wrong_is_named(server: ServerProcess, fields: Json, said: str) -> None:
    body = {**FIELDS, "image": in_base64(PHOTO), "mask_image": in_base64(file(MASK)), **fields}
    answer = problem(server.client.post("/sample", json=body), 422)
    assert answer["detail"].startswith(said)
    assert answer["errors"][0]["loc"] == [said.partition(":")[0]]


def test_an_address_cannot_have_an_image(server: ServerProcess) -> None:
    for name in ("image", "mask_image"):
        answer = problem(server.client.get(f"/sample?seed=1&{name}=AAAA"), 422)
        assert answer["detail"] == f"{name}: is too long for a query: send it with POST"


# The client.


def test_the_client_takes_bytes_paths_and_open_files(server: ServerProcess, tmp_path: Path) -> None:
    drawn = asked(server)
    (path := tmp_path / "photo.jpg").write_bytes(PHOTO)
    mask = file(MASK)
    with Client(server.url) as client:
        for image in (PHOTO, path, str(path), io.BytesIO(PHOTO)):
            assert client.sample(image=image, mask_image=mask, **FIELDS).images[0].png == drawn
        events = list(client.stream(image=io.BytesIO(PHOTO), mask_image=mask, **FIELDS))
        assert [event.image.png for event in events if isinstance(event, ImageDone)] == [drawn]
        assert isinstance(events[-1], Done)
        assert client.sample_array(image=path, strength=0.5).array.shape == (1, 16, 16)
        assert client.sample_picture(image=path, strength=0.5, kind="jpeg").content.startswith(b"\xff\xd8")
        with pytest.raises(Invalid, match="mask_image: needs an image"):
            client.sample(mask_image=mask)
        with pytest.raises(FileNotFoundError):
            client.sample(image=tmp_path / "nowhere.png")


# The command line.

OPTIONS = ["-s", "7", "--strength", "0.6", "-c", "cat", "--fit", "crop", "--paste-original"]


def test_the_command_line_draws_and_verifies(server: ServerProcess, tmp_path: Path) -> None:
    drawn = asked(server)
    (tmp_path / "photo.jpg").write_bytes(PHOTO)
    (tmp_path / "mask.png").write_bytes(file(MASK))
    sources = ["--image", "photo.jpg", "--mask", "mask.png"]
    assert done(stepwise(server, tmp_path, "sample", *sources, *OPTIONS)) == "7.png\n"
    assert files(tmp_path)["7.png"] == drawn
    piped = stepwise(server, tmp_path, "sample", "--image", "-", *sources[2:], *OPTIONS, "-o", "a.png", stdin=PHOTO)
    assert done(piped) == "a.png\n"
    assert files(tmp_path)["a.png"] == drawn

    assert done(stepwise(server, tmp_path, "verify", "7.png", *sources)) == "7.png: the same bytes\n"
    line = refused(stepwise(server, tmp_path, "verify", "7.png"), exits.UNUSABLE)
    assert line == "7.png: it was drawn from an image: give the image with --image"
    line = refused(stepwise(server, tmp_path, "verify", "7.png", *sources[:2]), exits.UNUSABLE)
    assert line == "7.png: a part of an image was drawn anew: give the mask with --mask"
    others = stepwise(server, tmp_path, "verify", "7.png", "--image", "mask.png", "--mask", "photo.jpg")
    assert others.returncode == exits.DIFFERENT
    said = others.stdout.decode()
    assert "it was drawn from another image than this; it was drawn with another mask than this" in said


def test_files_of_the_command_line_that_cannot_be_read(server: ServerProcess, tmp_path: Path) -> None:
    line = refused(stepwise(server, tmp_path, "sample", "--image", "nowhere.png"), exits.UNUSABLE)
    assert line == "nowhere.png: cannot be read: No such file or directory"
    line = refused(stepwise(server, tmp_path, "sample", "--image", "-", "--mask", "-", stdin=PHOTO), exits.UNUSABLE)
    assert line == "--image - and --mask - are both standard input: name one of the files"
