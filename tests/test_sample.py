"""POST, GET and HEAD /sample on a running server, as API.md specifies them."""

import base64
import io
import json
import re
import zipfile
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image as PillowImage

from model.samplers import SAMPLERS
from service.http.marks import XMP
from service.http.png import to_uint8
from tests.latents import decoded, serving_latents
from tests.servers import (
    Json,
    ServerProcess,
    invalid,
    problem,
    read_npy,
    read_parameters,
    read_png,
    write_npy,
)

JSON, ZIP, NPY = "application/json", "application/zip", "application/x-npy"
LOSSY = {"image/webp": "WEBP", "image/jpeg": "JPEG"}
PURE = ("image/png", *LOSSY, ZIP, NPY)
MAX_SEED = 2**53 - 1


def draw(server: ServerProcess, body: object = None, accept: str = "image/png") -> httpx.Response:
    """POST /sample. The answer must have the requested type."""
    response = server.client.post("/sample", json=body or {}, headers={"Accept": accept})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == accept
    assert response.headers["cache-control"] == "no-store"
    return response


def refuse(server: ServerProcess, body: object, field: str) -> str:
    """The message of a POST /sample that must be refused because of this field."""
    return invalid(server.client.post("/sample", json=body), field)


def get(server: ServerProcess, query: str = "", **headers: str) -> httpx.Response:
    return server.client.get(f"/sample?{query}", headers=headers)


# Images.


def test_every_field_is_optional(server: ServerProcess) -> None:
    image = draw(server, {})
    parameters = read_parameters(image.content)
    assert read_png(image.content).shape == (16, 16)
    assert image.headers["x-seed"] == str(parameters["seed"])
    assert (parameters["sampler"], parameters["num_inference_steps"]) == ("dpmpp_2m", 4)
    assert (parameters["class_label"], parameters["guidance_scale"], parameters["eta"]) == (None, 1.0, 0.0)


def test_a_body_is_not_needed(server: ServerProcess) -> None:
    assert server.client.post("/sample").status_code == 200


def test_rgb_images_have_the_models_shape(rgb_server: ServerProcess) -> None:
    image = draw(rgb_server)
    assert read_png(image.content).shape == (8, 16, 3)
    assert read_parameters(image.content)["sampler"] == "ddim"  # the default for weights that recommend no sampler


def test_a_seed_is_drawn_where_none_is_given(server: ServerProcess) -> None:
    first, second = draw(server), draw(server, {"seed": None})
    assert first.headers["x-seed"] != second.headers["x-seed"]
    assert first.content != second.content
    again = draw(server, {"seed": int(first.headers["x-seed"])})
    assert again.content == first.content


def test_post_get_and_query_text_are_one_request(server: ServerProcess) -> None:
    body = {"seed": 7, "class_label": 1, "guidance_scale": 3.5, "sampler": "ddim", "eta": 0.5, "num_inference_steps": 3}
    query = "seed=7&class_label=1&guidance_scale=3.5&sampler=ddim&eta=5e-1&num_inference_steps=3&timeout_s=100"
    assert get(server, query).content == draw(server, body).content


def test_image_i_is_the_image_of_seed_plus_i(server: ServerProcess) -> None:
    common = {"class_label": "cat", "sampler": "ddpm", "num_inference_steps": 3}
    answer = draw(server, {"seed": 7, "num_images": 5, **common}, JSON).json()
    assert [image["seed"] for image in answer["images"]] == [7, 8, 9, 10, 11]
    pngs = [base64.b64decode(image["b64_json"], validate=True) for image in answer["images"]]
    assert pngs == [draw(server, {"seed": seed, **common}).content for seed in range(7, 12)]
    assert len(set(pngs)) == 5


def test_an_archive_has_a_file_for_each_seed(server: ServerProcess) -> None:
    answer = draw(server, {"seed": 98, "num_images": 3}, ZIP)
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["98.png", "99.png", "100.png"]
        assert [archive.read(f"{seed}.png") for seed in (98, 99, 100)] == [
            draw(server, {"seed": seed}).content for seed in (98, 99, 100)
        ]
    assert draw(server, {"seed": 98, "num_images": 3}, ZIP).content == answer.content
    assert answer.headers["x-seed"] == "98"


@pytest.mark.parametrize(("n", "columns", "rows"), [(2, 2, 1), (3, 2, 2), (5, 3, 2), (9, 3, 3), (10, 4, 3)])
def test_a_contact_sheet_is_row_major(rgb_server: ServerProcess, n: int, columns: int, rows: int) -> None:
    sheet = read_png(draw(rgb_server, {"seed": 3, "num_images": n, "num_inference_steps": 2}).content)
    assert sheet.shape == (rows * 8, columns * 16, 3)
    for place in range(rows * columns):
        row, column = divmod(place, columns)
        tile = sheet[row * 8 : (row + 1) * 8, column * 16 : (column + 1) * 16]
        if place < n:
            alone = draw(rgb_server, {"seed": 3 + place, "num_inference_steps": 2})
            np.testing.assert_array_equal(tile, read_png(alone.content))
        else:
            assert not tile.any()


def test_an_image_starts_from_its_seeds_first_noise_and_walks_the_samplers_grid(rgb_server: ServerProcess) -> None:
    """DDIM by hand, with /denoise for each prediction."""
    steps, stride = 5, 4
    alpha_bar = np.cumprod(1 - np.linspace(0.01, 0.3, 20))
    x = torch.randn((1, 3, 8, 16), generator=torch.Generator().manual_seed(11)).numpy()[0].astype(np.float64)
    for timestep in range((steps - 1) * stride, -1, -stride):
        response = rgb_server.client.post(
            "/denoise",
            files={"image": write_npy(x.astype(np.float32))},
            data={"timestep": timestep, "output": "model_output"},
        )
        epsilon = read_npy(response.content).astype(np.float64)
        now = alpha_bar[timestep]
        after = alpha_bar[timestep - stride] if timestep else 1.0
        x0 = ((x - np.sqrt(1 - now) * epsilon) / np.sqrt(now)).clip(-1, 1)
        x = np.sqrt(after) * x0 + np.sqrt(1 - after) * epsilon
    expected = ((x / 2 + 0.5).clip(0, 1) * 255).transpose(1, 2, 0)
    image = read_png(draw(rgb_server, {"seed": 11}).content)
    np.testing.assert_allclose(image, expected, atol=0.51)  # rounded to the nearest level


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_each_sampler_draws_something_else(server: ServerProcess, sampler: str) -> None:
    assert sampler in server.client.get("/info").json()["samplers"]
    others = SAMPLERS.keys() - {sampler}
    image = draw(server, {"seed": 1, "sampler": sampler}).content
    assert read_parameters(image)["sampler"] == sampler
    for other in others:
        assert (read_png(image) != read_png(draw(server, {"seed": 1, "sampler": other}).content)).any()


def test_eta_is_ddims_noise(server: ServerProcess) -> None:
    without, half, whole = (draw(server, {"seed": 1, "sampler": "ddim", "eta": eta}).content for eta in (0, 0.5, 1))
    assert without == draw(server, {"seed": 1, "sampler": "ddim"}).content
    assert len({read_png(png).tobytes() for png in (without, half, whole)}) == 3


# Labels and guidance.


@pytest.mark.parametrize(
    ("label", "index"),
    [(0, 0), ("cat", 0), ("0", 0), ("dog", 1), ("1", 1), (2, 2), ("2", 2), ("7", 2), (None, None), (["7"], 2)],
)
def test_a_label_is_an_index_or_a_name_first(server: ServerProcess, label: object, index: int | None) -> None:
    image = draw(server, {"seed": 5, "class_label": label}).content
    assert read_parameters(image)["class_label"] == index
    assert image == draw(server, {"seed": 5, "class_label": index}).content


def test_each_image_can_have_its_own_label(server: ServerProcess) -> None:
    labels = ["dog", None, 2, "7", "0"]
    answer = draw(server, {"seed": 5, "num_images": 5, "class_label": labels}, JSON).json()
    for i, (image, label) in enumerate(zip(answer["images"], labels, strict=True)):
        alone = draw(server, {"seed": 5 + i, "class_label": label})
        assert base64.b64decode(image["b64_json"]) == alone.content
    by_query = "&".join(f"class_label={label}" for label in ("dog", "2"))
    assert get(server, f"seed=5&num_images=2&{by_query}").content == (
        draw(server, {"seed": 5, "num_images": 2, "class_label": [1, 2]}).content
    )


def test_guidance_is_recommended_with_a_label_and_off_without(server: ServerProcess) -> None:
    def guidance(body: Json) -> float:
        scale: float = read_parameters(draw(server, {"seed": 1, **body}).content)["guidance_scale"]
        return scale

    assert guidance({"class_label": 1}) == 2.0
    assert guidance({"class_label": 1, "guidance_scale": None}) == 2.0
    assert guidance({"class_label": 1, "guidance_scale": 20}) == 20.0
    assert guidance({"class_label": 1, "guidance_scale": 1}) == 1.0
    assert guidance({}) == 1.0
    assert guidance({"guidance_scale": 1}) == 1.0


def test_guidance_moves_the_image(server: ServerProcess) -> None:
    images = [draw(server, {"seed": 1, "class_label": 1, "guidance_scale": s}).content for s in (1, 2, 20)]
    assert len({read_png(png).tobytes() for png in images}) == 3
    assert images[1] == draw(server, {"seed": 1, "class_label": 1}).content


def test_guidance_of_a_mixed_list_is_for_those_with_a_label(server: ServerProcess) -> None:
    body = {"seed": 1, "num_images": 2, "class_label": [None, 0], "guidance_scale": 4}
    images = [base64.b64decode(image["b64_json"]) for image in draw(server, body, JSON).json()["images"]]
    assert [read_parameters(png)["guidance_scale"] for png in images] == [1.0, 4.0]


INTERVAL: Json = {"seed": 1, "class_label": 1, "guidance_scale": 4}


def test_guidance_in_a_part_of_the_steps_is_between_none_and_all(server: ServerProcess) -> None:
    def pixels(**fields: Any) -> bytes:
        return read_png(draw(server, {**INTERVAL, **fields}).content).tobytes()

    intervals = [[0, 1], [0.25, 1], [0, 0.5], [0.5, 0.5]]
    images = [pixels(guidance_interval=interval) for interval in intervals]
    assert len(set(images)) == 4
    assert images[0] == pixels()
    assert images[3] == pixels(guidance_scale=1)  # no step is guided


def test_a_guidance_interval_is_in_recipes_and_queries(server: ServerProcess) -> None:
    image = draw(server, {**INTERVAL, "guidance_interval": [0.25, 0.75]}).content
    recipe = read_parameters(image)
    assert recipe["guidance_interval"] == [0.25, 0.75]
    assert draw(server, {name: recipe[name] for name in recipe.keys() - {"model", "fingerprint"}}).content == image
    query = "seed=1&class_label=1&guidance_scale=4&guidance_interval="
    tags = set()
    for text in ("0.25,0.75", "0.25&guidance_interval=.75", "0.250,%200.75"):
        answer = get(server, query + text)
        assert answer.content == image
        tags |= {answer.headers["etag"], server.client.head(f"/sample?{query}{text}").headers["etag"]}
    assert len(tags) == 1
    assert tags != {get(server, query + "0,1").headers["etag"]}
    assert (
        get(server, query + "0,1").headers["etag"]
        == get(server, "seed=1&class_label=1&guidance_scale=4").headers["etag"]
    )


# Recipes.


def test_each_png_says_how_to_make_it_again(server: ServerProcess) -> None:
    info = server.client.get("/info").json()
    body = {"seed": 1, "num_images": 3, "class_label": ["dog", None, "7"], "sampler": "ddim", "eta": 0.25}
    for i, image in enumerate(draw(server, body, JSON).json()["images"]):
        png = base64.b64decode(image["b64_json"])
        parameters = read_parameters(png)
        assert parameters == {
            "seed": 1 + i,
            "sampler": "ddim",
            "num_inference_steps": 4,
            "eta": 0.25,
            "class_label": [1, None, 2][i],
            "guidance_scale": [2.0, 1.0, 2.0][i],
            "model": f"diffusion_unet-{info['model']['digest'][:8]}",  # the folder's name affects no bytes
            "fingerprint": info["fingerprint"],
        }
        del parameters["model"], parameters["fingerprint"]
        assert draw(server, parameters).content == png


def test_a_contact_sheet_says_how_to_make_it_again(server: ServerProcess) -> None:
    body = {"seed": 1, "num_images": 3, "class_label": ["dog", None, "7"], "guidance_scale": 3, "timeout_s": 200}
    sheet = draw(server, body).content
    parameters = read_parameters(sheet)
    info = server.client.get("/info").json()
    assert parameters.pop("model") == info["fingerprint_parts"]["model"]
    assert parameters.pop("fingerprint") == info["fingerprint"]
    assert parameters["num_images"] == 3
    assert draw(server, parameters).content == sheet


def test_the_json_answer_is_whole(server: ServerProcess) -> None:
    body = {"seed": 7, "num_images": 2, "class_label": "7", "preview_every": 4}
    answer = draw(server, body, JSON)
    document = answer.json()
    assert document.keys() == {"images", "parameters", "model", "warnings", "timings"}
    assert document["warnings"] == []
    assert [image.keys() for image in document["images"]] == [{"seed", "b64_json"}] * 2
    assert document["parameters"] == {
        "num_images": 2,
        "seed": 7,
        "sampler": "dpmpp_2m",
        "num_inference_steps": 4,
        "eta": 0.0,
        "class_label": 2,
        "guidance_scale": 2.0,
        "guidance_rescale": 0.0,
        "guidance_interval": [0.0, 1.0],
        "height": 16,
        "width": 16,
        "timeout_s": 300.0,
        "preview_every": 4,
    }
    info = server.client.get("/info").json()
    assert document["model"] == {
        "name": "grey",
        "digest": info["model"]["digest"],
        "fingerprint": info["fingerprint"],
    }
    assert document["timings"].keys() == {"queue_s", "denoise_s", "encode_s"}
    assert all(seconds >= 0 for seconds in document["timings"].values())
    again = draw(server, document["parameters"], JSON).json()
    assert again["images"] == document["images"]


@pytest.mark.parametrize("accept", ["image/png", JSON, ZIP])
def test_headers_tell_the_seed_and_the_times(server: ServerProcess, accept: str) -> None:
    headers = draw(server, {"seed": 7}, accept).headers
    assert headers["x-seed"] == "7"
    assert re.fullmatch(r"queue;dur=[\d.]+, denoise;dur=[\d.]+, encode;dur=[\d.]+", headers["server-timing"])
    assert re.fullmatch(r"[0-9a-f]{32}", headers["x-request-id"])


def test_of_latent_diffusion_images_are_decoded() -> None:
    with serving_latents() as latents:
        body = {"seed": 5, "num_images": 2, "num_inference_steps": 3}
        as_json, as_zip = (latents.client.post("/sample", json=body, headers={"Accept": a}) for a in (JSON, ZIP))
    document = as_json.json()
    assert document["timings"].keys() == {"queue_s", "denoise_s", "decode_s", "encode_s"}
    timing = r"queue;dur=[\d.]+, denoise;dur=3000\.00, decode;dur=[\d.]+, encode;dur=[\d.]+"
    assert re.fullmatch(timing, as_json.headers["server-timing"])
    with zipfile.ZipFile(io.BytesIO(as_zip.content)) as archive:
        for image in document["images"]:
            png = base64.b64decode(image["b64_json"])
            made = np.array([[[image["seed"], 3]]], np.float32)  # FakeRunner's latents
            np.testing.assert_array_equal(read_png(png), to_uint8(decoded(made)))
            assert archive.read(f"{image['seed']}.png") == png


# Refusals. The message has the field, the value and the range.


@pytest.mark.parametrize(
    ("body", "field", "named"),
    [
        ({"num_images": 0}, "num_images", "1 to 64, and is 0"),
        ({"num_images": 65}, "num_images", "1 to 64, and is 65"),
        ({"num_images": -1}, "num_images", "1 to 64, and is -1"),
        ({"seed": -1}, "seed", f"0 to {MAX_SEED}, and is -1"),
        ({"seed": MAX_SEED + 1}, "seed", f"0 to {MAX_SEED}, and is {MAX_SEED + 1}"),
        ({"seed": MAX_SEED, "num_images": 2}, "seed", f"0 to {MAX_SEED - 1} for 2 images, and is {MAX_SEED}"),
        ({"sampler": "euler", "num_inference_steps": 1}, "num_inference_steps", "euler takes 2 to 1000 here"),
        ({"sampler": "magic"}, "sampler", f"one of {', '.join(SAMPLERS)}, and is 'magic'"),
        ({"sampler": ""}, "sampler", f"one of {', '.join(SAMPLERS)}, and is ''"),
        ({"num_inference_steps": 0}, "num_inference_steps", "1 to 1000, and is 0"),
        ({"num_inference_steps": 1001}, "num_inference_steps", "1 to 1000, and is 1001"),
        ({"num_inference_steps": 1000}, "num_inference_steps", "dpmpp_2m takes 1 to 999"),  # 1001 timesteps of 1000
        ({"sampler": "ddim", "eta": -0.1}, "eta", "0 to 1, and is -0.1"),
        ({"sampler": "ddim", "eta": 1.01}, "eta", "0 to 1, and is 1.01"),
        ({"sampler": "ddpm", "eta": 0.5}, "eta", "0 with ddpm, and is 0.5"),
        ({"eta": 0.5}, "eta", "0 with dpmpp_2m, and is 0.5"),
        ({"class_label": 3}, "class_label", "0 to 2, or one of cat, dog, 7, and is 3"),
        ({"class_label": 7}, "class_label", "0 to 2, or one of cat, dog, 7, and is 7"),
        ({"class_label": -1}, "class_label", "0 to 2, or one of cat, dog, 7, and is -1"),
        ({"class_label": "cow"}, "class_label", "0 to 2, or one of cat, dog, 7, and is 'cow'"),
        ({"class_label": ""}, "class_label", "0 to 2, or one of cat, dog, 7, and is ''"),
        ({"class_label": ["cat", "cow"], "num_images": 2}, "class_label", "and is 'cow'"),
        ({"class_label": [0, 1]}, "class_label", "1 in a list, and is 2"),
        ({"class_label": [0, 1], "num_images": 3}, "class_label", "3 in a list, and is 2"),
        ({"class_label": []}, "class_label", "1 in a list, and is 0"),
        ({"guidance_scale": -0.01, "class_label": 0}, "guidance_scale", "0 to 30, and is -0.01"),
        ({"guidance_scale": 30.5, "class_label": 0}, "guidance_scale", "0 to 30, and is 30.5"),
        ({"guidance_scale": 1.5}, "guidance_scale", "1 without a class_label, and is 1.5"),
        ({"guidance_scale": 1.5, "class_label": [None]}, "guidance_scale", "1 without a class_label, and is 1.5"),
        ({"guidance_interval": [0.5]}, "guidance_interval", "a list of 2 numbers from 0 to 1, and is [0.5]"),
        (
            {"guidance_interval": [0, 0.5, 1]},
            "guidance_interval",
            "a list of 2 numbers from 0 to 1, and is [0, 0.5, 1]",
        ),
        ({"guidance_interval": 0.5}, "guidance_interval", "a list of 2 numbers from 0 to 1, and is 0.5"),
        ({"guidance_interval": [0.8, 0.2]}, "guidance_interval", "must not fall, and is 0.8 to 0.2"),
        ({"height": 32, "width": 32}, "height", "must be, with width, 16x16 (width x height), and is 32x32"),
        ({"height": 32}, "height", "of 16x16 (width x height), and is 32"),
        ({"width": 10**9}, "width", "of 16x16 (width x height), and is 1000000000"),
        ({"timeout_s": 0}, "timeout_s", "more than 0 and at most 300, and is 0"),
        ({"timeout_s": -1}, "timeout_s", "more than 0 and at most 300, and is -1"),
        ({"timeout_s": 300.5}, "timeout_s", "more than 0 and at most 300, and is 300.5"),
        ({"preview_every": -1}, "preview_every", "0 to 1000, and is -1"),
        ({"preview_every": 5}, "preview_every", "0 to 4, the steps that events count, and is 5"),
    ],
    ids=str,
)
def test_out_of_range(server: ServerProcess, body: Json, field: str, named: str) -> None:
    assert named in refuse(server, body, field)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("num_images", [True, 1.5, "3", None, [1], {}]),
        ("seed", [True, 1.5, "7", [7], {}]),
        ("sampler", [True, 1, ["ddim"]]),
        ("num_inference_steps", [True, 1.5, "3", [3]]),
        ("eta", [True, "0.5", None, [0.5]]),
        ("class_label", [True, False, 1.5, {}, [True], [1.5], [[0]]]),
        ("guidance_scale", [True, "2", [2]]),
        ("timeout_s", [True, "2", [2]]),
        ("preview_every", [True, 1.5, "2", None]),
        ("timesteps", [True, 900, "900", {}, []]),
        ("guidance_interval", [True, 0.5, "0,1", {}, []]),
        ("height", [True, 16.5, "16", [16], {}]),
        ("width", [True, 16.5, "16", [16], {}]),
    ],
)
def test_types_are_strict(server: ServerProcess, field: str, values: list[object]) -> None:
    for value in values:
        assert refuse(server, {field: value}, field).endswith(f", and is {json.dumps(value)}")


def test_a_whole_number_is_an_integer_however_it_is_written(server: ServerProcess) -> None:
    """JSON Schema agrees, and so do clients that follow /openapi.json."""
    fields = {"num_images": 2, "seed": 7, "num_inference_steps": 3, "class_label": [1, 2], "preview_every": 1}
    written: Json = {name: float(value) for name, value in fields.items() if isinstance(value, int)}
    written["class_label"] = [1.0, 2.0]
    plain, other = (server.client.post("/sample", json=body, headers={"Accept": JSON}) for body in (fields, written))
    assert plain.status_code == other.status_code == 200
    assert other.json()["images"] == plain.json()["images"]
    assert other.json()["parameters"] == plain.json()["parameters"]
    assert "3.0" not in json.dumps(other.json()["parameters"])
    refuse(server, {"seed": float(2**53)}, "seed")
    refuse(server, {"class_label": 3.0}, "class_label")


@pytest.mark.parametrize("field", ["steps", "num_inference_step", "promt", "model", "images", "timestep", ""])
def test_an_unknown_field_is_named(server: ServerProcess, field: str) -> None:
    assert refuse(server, {field: 1}, field) == "there is no such field"


def test_every_wrong_field_is_named_at_once(server: ServerProcess) -> None:
    response = server.client.post("/sample", json={"seed": -1, "eta": 2, "steps": 3})
    assert {error["loc"][0] for error in problem(response, 422)["errors"]} == {"seed", "eta", "steps"}


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b"null",
        b"3",
        b'"{}"',
        b"\xff\xfe",
        b'{"sampler": "\xff"}',
        b"[" * 100_000,
        b'{"seed": %s}' % (b"9" * 5000),
    ],
    ids=lambda body: repr(body[:20]),
)
def test_what_is_no_json_object_is_refused(server: ServerProcess, body: bytes) -> None:
    invalid(server.client.post("/sample", content=body, headers={"Content-Type": JSON}), "body")


def test_many_fields_or_long_values_are_refused_in_few_words(server: ServerProcess) -> None:
    """A body of 16 MiB once kept the server busy for 20 seconds, and its answer had 112 MB."""
    many = {f"field{i}": 1 for i in range(16_000)}
    assert "16000 fields" in refuse(server, many, "body")
    assert len(refuse(server, {"class_label": [0] * 16_000}, "class_label")) < 300
    for wrong in ({"timesteps": ["x"] * 16_000}, {"timesteps": [-1] * 16_000}, {"timesteps": [5] * 16_000}):
        assert len(problem(server.client.post("/sample", json=wrong), 422)["errors"]) == 1
    assert len(problem(get(server, "timesteps=" + "x," * 20_000), 422)["errors"]) == 1
    for body in ({"x" * 1_000_000: 1}, {"sampler": "x" * 1_000_000}, {"class_label": "x" * 1_000_000}):
        response = server.client.post("/sample", json=body)
        problem(response, 422)
        assert len(response.content) < 5000


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"9" * 400])
def test_numbers_are_finite(server: ServerProcess, number: bytes) -> None:
    for field in ("seed", "guidance_scale", "timeout_s", "num_images"):
        body = b'{"%s": %s}' % (field.encode(), number)
        invalid(server.client.post("/sample", content=body, headers={"Content-Type": JSON}), field)


def test_text_that_is_no_unicode_is_refused(server: ServerProcess) -> None:
    for body in (rb'{"\ud800": 1}', rb'{"sampler": "\ud800"}', rb'{"class_label": "\ud800"}'):
        problem(server.client.post("/sample", content=body, headers={"Content-Type": JSON}), 422)


@pytest.mark.parametrize("media_type", ["text/plain", "application/x-www-form-urlencoded", "application/x-npy"])
def test_only_json_and_forms_are_read(server: ServerProcess, media_type: str) -> None:
    response = server.client.post("/sample", content=b"{}", headers={"Content-Type": media_type})
    assert media_type.split(";")[0] in problem(response, 415)["detail"]


@pytest.mark.parametrize(
    ("query", "field", "named"),
    [
        ("seed=7&seed=8", "seed", "is given twice"),
        ("seed=", "seed", 'and is ""'),
        ("seed=7.5", "seed", "and is 7.5"),
        ("seed=true", "seed", 'and is "true"'),
        ("seed=0x10", "seed", 'and is "0x10"'),
        ("seed=%D9%A7", "seed", f"must be an integer from 0 to {2**53 - 1}"),  # an Arabic digit
        ("eta=nan", "eta", 'and is "nan"'),
        ("num_images=0", "num_images", "1 to 64, and is 0"),
        ("class_label=3", "class_label", "0 to 2, or one of cat, dog, 7"),
        ("class_label=", "class_label", "0 to 2, or one of cat, dog, 7"),
        ("guidance_interval=0.8,0.2", "guidance_interval", "must not fall"),
        ("guidance_interval=0.5", "guidance_interval", "a list of 2 numbers from 0 to 1, and is [0.5]"),
        ("guidance_interval=0,1&guidance_interval=0,1", "guidance_interval", "a list of 2 numbers from 0 to 1"),
        ("height=17", "height", "16x16"),
        ("height=16.5", "height", "must be an integer, and is 16.5"),
        ("steps=3", "steps", "there is no such field"),
        ("model=0123456789abcdef", "model", "and is 0123456789abcdef"),
    ],
)
def test_queries_are_refused_alike(server: ServerProcess, query: str, field: str, named: str) -> None:
    assert named in invalid(get(server, query), field)


# Timesteps instead of a number of steps.

LISTED = [900, 640, 300, 41]


@pytest.mark.parametrize("sampler", [name for name, one in SAMPLERS.items() if one.through is not None])
def test_listed_timesteps_are_walked(server: ServerProcess, sampler: str) -> None:
    """In any spelling. The recipe alone makes the same bytes again."""
    image = draw(server, {"seed": 7, "sampler": sampler, "timesteps": [900, 640.0, 300, 41]})
    recipe = read_parameters(image.content)
    assert (recipe["timesteps"], recipe["num_inference_steps"]) == (LISTED, None)
    settings = {name: value for name, value in recipe.items() if name not in ("model", "fingerprint")}
    assert draw(server, settings).content == image.content
    for query in ("timesteps=900,640,300,41", "timesteps=900&timesteps=640&timesteps=300&timesteps=41"):
        answer = get(server, f"seed=7&sampler={sampler}&{query}")
        assert answer.content == image.content
        assert (
            get(server, f"seed=7&sampler={sampler}&{query}", **{"If-None-Match": answer.headers["etag"]}).status_code
            == 304
        )
    others = [draw(server, {"seed": 7, "sampler": sampler, **other}) for other in ({}, {"timesteps": LISTED[:3]})]
    assert len({read_png(one.content).tobytes() for one in (image, *others)}) == 3


@pytest.mark.parametrize("sampler", ["pndm", "euler_a", "unipc"])
def test_samplers_without_lists_refuse_them(server: ServerProcess, sampler: str) -> None:
    answer = server.client.post("/sample", json={"sampler": sampler, "timesteps": LISTED})
    told = invalid(answer, "timesteps")
    assert f"must be null with {sampler}; a list is for ddim, ddpm, dpmpp_2m, " in told


def test_progress_counts_lines(server: ServerProcess) -> None:
    """PNDM takes its first step twice, and Heun's method each step but the last."""
    for sampler, lines in (("pndm", 5), ("euler", 4), ("heun", 7)):
        fields = {"sampler": sampler, "num_inference_steps": 4, "preview_every": 5}
        answer = server.client.post("/sample", json=fields, headers={"Accept": "text/event-stream"})
        assert (answer.status_code == 200) == (lines >= 5)
        if lines >= 5:
            assert f'"step": {lines}, "steps": {lines}' in answer.text
            assert '"index": 0, "step": 5' in answer.text


def test_the_timesteps_of_a_number_of_steps_draw_its_pixels(server: ServerProcess) -> None:
    """The recipe differs, so the files differ."""
    numbered, listed = (
        draw(server, {"seed": 7, "sampler": "ddpm", **grid})
        for grid in ({"num_inference_steps": 4}, {"timesteps": [750, 500, 250, 0]})
    )
    assert np.array_equal(read_png(numbered.content), read_png(listed.content))
    assert "timesteps" not in read_parameters(numbered.content)


def test_progress_counts_the_timesteps(server: ServerProcess) -> None:
    body = {"seed": 7, "timesteps": LISTED, "preview_every": 3}
    told = server.client.post("/sample", json=body, headers={"Accept": "text/event-stream"}).text
    assert '"step": 4, "steps": 4' in told
    assert '"index": 0, "step": 3' in told
    assert '"timesteps": [900, 640, 300, 41]' in told


@pytest.mark.parametrize(
    ("fields", "field", "named"),
    [
        ({"timesteps": [900, 900]}, "timesteps", "must fall from each to the next, and 900 comes after 900"),
        ({"timesteps": [900, 300, 301]}, "timesteps", "must fall from each to the next, and 301 comes after 300"),
        ({"timesteps": [900], "num_inference_steps": 1}, "timesteps", "beside num_inference_steps, which is 1"),
        (
            {"timesteps": [900, 300], "preview_every": 3},
            "preview_every",
            "0 to 2, the steps that events count, and is 3",
        ),
        ({"timesteps": []}, "timesteps", "must be a list of integers from 0 to 999, and is []"),
        ({"timesteps": 900}, "timesteps", "must be a list of integers from 0 to 999, and is 900"),
    ],
)
def test_timesteps_that_cannot_be_walked_are_refused(
    server: ServerProcess, fields: Json, field: str, named: str
) -> None:
    assert named in refuse(server, fields, field)


@pytest.mark.parametrize("value", [1000, -1, 1.5, "900", None])
def test_a_timestep_that_is_none_is_named(server: ServerProcess, value: object) -> None:
    [error] = problem(server.client.post("/sample", json={"timesteps": [999, value]}), 422)["errors"]
    assert error["loc"] == ["timesteps", 1]
    assert error["msg"].endswith(f"0 to 999, and is {json.dumps(value)}")


def test_a_model_without_classes_has_no_labels(rgb_server: ServerProcess) -> None:
    for label in (0, "0", "cat", [1], [None, 2]):
        body = {"class_label": label, "num_images": len(label) if isinstance(label, list) else 1}
        assert "no classes" in refuse(rgb_server, body, "class_label")
    refuse(rgb_server, {"guidance_scale": 2}, "guidance_scale")
    assert draw(rgb_server, {"class_label": None, "guidance_scale": 1}).status_code == 200


def test_a_grid_that_repeats_a_timestep_names_the_range(rgb_server: ServerProcess) -> None:
    message = refuse(rgb_server, {"sampler": "dpmpp_2m", "num_inference_steps": 20}, "num_inference_steps")
    assert "20" in message
    assert "1 to 19" in message
    draw(rgb_server, {"sampler": "dpmpp_2m", "num_inference_steps": 19})
    draw(rgb_server, {"sampler": "ddpm", "num_inference_steps": 20})


def test_the_ends_of_each_range_are_taken(server: ServerProcess) -> None:
    draw(server, {"seed": 0, "num_images": 1, "num_inference_steps": 1, "timeout_s": 300})
    draw(server, {"seed": MAX_SEED, "num_images": 1, "preview_every": 4})
    draw(server, {"seed": MAX_SEED - 63, "num_images": 64, "num_inference_steps": 1}, ZIP)
    draw(server, {"sampler": "ddim", "eta": 1, "class_label": 2, "guidance_scale": 20})


# Other formats.


def test_an_npy_has_the_image_of_the_png_unrounded(rgb_server: ServerProcess) -> None:
    array = read_npy(draw(rgb_server, {"seed": 7}, NPY).content)
    assert array.shape == (3, 8, 16)
    assert np.array_equal(to_uint8(array), read_png(draw(rgb_server, {"seed": 7}).content))
    assert not np.array_equal(to_uint8(array) / np.float32(127.5) - 1, array.transpose(1, 2, 0))


def test_an_npy_of_several_images_has_each_of_them(server: ServerProcess) -> None:
    body = {"seed": 7, "num_images": 3, "class_label": [0, None, 2]}
    arrays = np.load(io.BytesIO(draw(server, body, NPY).content), allow_pickle=False)
    assert (arrays.shape, arrays.dtype) == ((3, 1, 16, 16), np.float32)
    for seed, label, array in zip((7, 8, 9), (0, None, 2), arrays, strict=True):
        alone = read_npy(draw(server, {"seed": seed, "class_label": label}, NPY).content)
        assert np.array_equal(array, alone)


@pytest.mark.parametrize("accept", LOSSY)
@pytest.mark.parametrize("num_images", [1, 3])
def test_webp_and_jpeg_are_the_pixels_of_the_png_as_pillow_writes_them(
    server: ServerProcess, rgb_server: ServerProcess, accept: str, num_images: int
) -> None:
    for one in (server, rgb_server):
        body = {"seed": 7, "num_images": num_images}
        pixels = PillowImage.fromarray(read_png(draw(one, body).content))
        pixels.save(expected := io.BytesIO(), LOSSY[accept], quality=95, xmp=XMP)
        assert draw(one, body, accept).content == expected.getvalue()


def test_an_npy_of_a_latent_model_has_latents() -> None:
    with serving_latents() as latents:
        body = {"seed": 7, "num_images": 2}
        answers = {
            accept: latents.client.post("/sample", json=body, headers={"Accept": accept}) for accept in (NPY, ZIP)
        }
        arrays = np.load(io.BytesIO(answers[NPY].content), allow_pickle=False)
        assert arrays.shape == (2, 1, 1, 2)
        assert "decode;dur=0.00" in answers[NPY].headers["server-timing"]
        with zipfile.ZipFile(io.BytesIO(answers[ZIP].content)) as archive:
            for seed, array in zip((7, 8), arrays, strict=True):
                assert np.array_equal(to_uint8(decoded(array)), read_png(archive.read(f"{seed}.png")))


# Content negotiation.

_CHROME_IMAGE = "image/avif,image/webp,image/apng,image/svg+xml,image/*,*/*;q=0.8"
_CHROME_PAGE = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,image/apng,*/*;q=0.8"
_FIREFOX_PAGE = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        ("", "image/png"),
        ("*/*", "image/png"),
        ("image/*", "image/png"),
        ("image/png", "image/png"),
        ("IMAGE/PNG", "image/png"),
        (_CHROME_IMAGE, "image/png"),  # not WebP, which is lossy and has no recipe
        (_CHROME_PAGE, "image/png"),
        (_FIREFOX_PAGE, "image/png"),
        ("application/json", JSON),
        ("application/json; charset=utf-8", JSON),
        ("application/json, text/plain, */*", JSON),  # axios
        ("application/json;q=0.5, image/png;q=0.4", JSON),
        ("application/json;q=0.4, image/png;q=0.5", "image/png"),
        ("application/json;q=0, */*;q=0.1", "image/png"),
        ("image/*;q=0, */*", JSON),
        ("*/*;q=0.1, application/zip", ZIP),
        ("application/zip, image/png;q=0.9", ZIP),
        ("text/html, application/zip;q=0.1", ZIP),
        ("image/webp", "image/webp"),
        ("image/jpeg", "image/jpeg"),
        ("image/jpeg, image/webp;q=0.5", "image/jpeg"),
        ("image/webp, image/png;q=0.5, */*;q=0.1", "image/webp"),
        ("image/webp, image/*;q=0.1", "image/png"),
        ("image/webp, image/*;q=0", "image/webp"),
        ("application/x-npy", NPY),
        ("application/x-npy, */*;q=0.5", NPY),
    ],
)
def test_accept_chooses_the_answer(server: ServerProcess, accept: str, media_type: str) -> None:
    for response in (
        get(server, "seed=1", accept=accept),
        server.client.post("/sample", json={"seed": 1}, headers={"Accept": accept}),
    ):
        assert response.status_code == 200
        assert response.headers["content-type"] == media_type
        assert response.headers["vary"] == "Accept"


def test_no_accept_header_is_png(server: ServerProcess) -> None:
    request = server.client.build_request("GET", "/sample?seed=1")
    del request.headers["accept"]
    assert server.client.send(request).headers["content-type"] == "image/png"


def test_accept_headers_are_one_list(server: ServerProcess) -> None:
    response = server.client.get("/sample?seed=1", headers=[("accept", "text/html"), ("accept", "application/zip")])
    assert response.headers["content-type"] == ZIP


@pytest.mark.parametrize(
    "accept", ["text/html", "image/avif", "image/png;q=0", "*/*;q=0", "audio/*", "application/problem+json"]
)
def test_anything_else_is_406(server: ServerProcess, accept: str) -> None:
    detail = problem(get(server, "seed=1", accept=accept), 406)["detail"]
    assert "image/png" in detail
    assert accept in detail
    problem(server.client.post("/sample", json={}, headers={"Accept": accept}), 406)


# Caching: a GET with a seed always has the same answer.


def test_with_a_seed_an_image_may_be_kept(server: ServerProcess) -> None:
    for accept in PURE:
        headers = get(server, "seed=7", accept=accept).headers
        assert headers["content-type"] == accept
        assert re.fullmatch(r'"[^"]{16,}"', headers["etag"])
        assert headers["cache-control"] == "max-age=3600"
        assert headers["vary"] == "Accept"


def test_naming_the_fingerprint_keeps_it_for_a_year(server: ServerProcess) -> None:
    fingerprint = server.client.get("/info").json()["fingerprint"]
    named, plain = get(server, f"seed=7&model={fingerprint}"), get(server, "seed=7")
    assert named.headers["cache-control"] == "max-age=31536000, immutable"
    assert named.headers["etag"] == plain.headers["etag"]
    assert named.content == plain.content


@pytest.mark.parametrize("query", ["", "class_label=1", "num_images=2"])
def test_without_a_seed_nothing_is_kept(server: ServerProcess, query: str) -> None:
    fingerprint = server.client.get("/info").json()["fingerprint"]
    for headers in (get(server, query).headers, get(server, f"{query}&model={fingerprint}").headers):
        assert headers["cache-control"] == "no-store"
        assert "etag" not in headers


def test_json_has_times_and_is_not_kept(server: ServerProcess) -> None:
    headers = get(server, "seed=7", accept=JSON).headers
    assert headers["cache-control"] == "no-store"
    assert "etag" not in headers
    assert headers["vary"] == "Accept"


def test_one_etag_for_requests_of_the_same_bytes(server: ServerProcess) -> None:
    def tag(query: str, accept: str = "image/png") -> str:
        value: str = get(server, query, accept=accept).headers["etag"]
        return value

    same = [
        "seed=7&class_label=2",
        "class_label=7&seed=7",
        "class_label=2&seed=%2B7&num_images=1",
        "seed=7&class_label=2&guidance_scale=2.00&sampler=dpmpp_2m&num_inference_steps=4&eta=-0",
        "seed=7&class_label=2&timeout_s=250&preview_every=2",
    ]
    assert len({tag(query) for query in same}) == 1
    other = ["seed=8&class_label=2", "seed=7", "seed=7&class_label=cat", "seed=7&class_label=2&guidance_scale=3"]
    other += ["seed=7&class_label=2&num_inference_steps=3", "seed=7&class_label=2&sampler=ddpm"]
    other += ["seed=7&class_label=2&num_images=2", "seed=7&class_label=2&sampler=ddim"]
    other += ["seed=7&class_label=2&sampler=ddim&eta=0.5"]
    assert len({tag(query) for query in [same[0], *other]}) == 1 + len(other)
    assert len({tag(same[0], accept) for accept in PURE}) == len(PURE)
    assert tag("seed=7&num_images=2&class_label=2") == tag("seed=7&num_images=2&class_label=2&class_label=7")


def test_an_etag_means_the_same_bytes(server: ServerProcess) -> None:
    by_name, by_index = get(server, "seed=7&class_label=7"), get(server, "seed=7&class_label=2&eta=0&timeout_s=99")
    assert by_name.headers["etag"] == by_index.headers["etag"]
    assert by_name.content == by_index.content


def test_if_none_match_is_answered_without_the_model(server: ServerProcess) -> None:
    kept = get(server, "seed=7").headers
    drawn = server.metric("stepwise_images_total")
    for value in (kept["etag"], f"W/{kept['etag']}", f'"x", {kept["etag"]}', "*"):
        response = get(server, "seed=7", **{"if-none-match": value})
        assert response.status_code == 304
        assert response.content == b""
        for name in ("etag", "cache-control", "vary"):
            assert response.headers[name] == kept[name]
    two_lines = [("if-none-match", '"x"'), ("if-none-match", kept["etag"])]
    assert server.client.get("/sample?seed=7", headers=two_lines).status_code == 304
    assert server.metric("stepwise_images_total") == drawn


def test_another_etag_is_no_match(server: ServerProcess) -> None:
    tag = get(server, "seed=7").headers["etag"]
    assert get(server, "seed=8", **{"if-none-match": tag}).status_code == 200
    assert get(server, "seed=7", accept=ZIP, **{"if-none-match": tag}).status_code == 200
    assert get(server, "seed=7", **{"if-none-match": '"x"'}).status_code == 200
    assert get(server, "", **{"if-none-match": tag}).status_code == 200


# HEAD.


def test_head_tells_what_get_would_without_the_model(server: ServerProcess) -> None:
    fingerprint = server.client.get("/info").json()["fingerprint"]
    for query in ("seed=7", "seed=7&num_images=2", f"seed=7&model={fingerprint}"):
        for accept in PURE:
            whole = get(server, query, accept=accept).headers
            drawn = server.metric("stepwise_images_total")
            head = server.client.head(f"/sample?{query}", headers={"accept": accept})
            assert head.status_code == 200
            assert head.content == b""
            for name in ("etag", "cache-control", "vary", "content-type", "x-seed"):
                assert head.headers[name] == whole[name]
            assert head.headers.get("content-length") in (None, whole["content-length"])
            assert server.metric("stepwise_images_total") == drawn


def test_head_without_a_seed(server: ServerProcess) -> None:
    head = server.client.head("/sample")
    assert head.status_code == 200
    assert head.headers["cache-control"] == "no-store"
    assert "etag" not in head.headers


def test_head_is_refused_as_get_is(server: ServerProcess) -> None:
    for query, headers in (("seed=-1", {}), ("seed=1", {"accept": "text/html"}), ("foo=1", {})):
        head: Any = server.client.head(f"/sample?{query}", headers=headers)
        assert head.status_code == get(server, query, **headers).status_code
        assert head.headers["content-type"] == "application/problem+json"
        assert head.content == b""
    tag = get(server, "seed=7").headers["etag"]
    assert server.client.head("/sample?seed=7", headers={"if-none-match": tag}).status_code == 304
