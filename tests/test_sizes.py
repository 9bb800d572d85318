"""One server of several sizes. tests/test_plan.py has the rules by which a request gets its size."""

import base64
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import numpy as np
import pytest

from stepwise import Client
from tests.local import LocalServer, serving_here
from tests.programs import done, stepwise
from tests.servers import Json, invalid, problem, read_npy, read_parameters, read_png, write_npy
from tests.test_denoise import JSON, NPY, noisy, png, post

SIZES = [(16, 16), (16, 32), (12, 8)]  # height and width; the first is that of the weights
LIST = "16x16, 32x16 or 8x12 (width x height)"
EVERY_SIZE = pytest.mark.parametrize("size", SIZES, ids=str)


@pytest.fixture(scope="module")
def server(weights: Path) -> Iterator[LocalServer]:
    with serving_here(weights=str(weights / "grey"), sizes="16x16,32x16,8x12", max_batch=4) as server:
        yield server


def drawn(server: LocalServer, **fields: object) -> bytes:
    answer = server.client.post("/sample", json={"seed": 7, **fields})
    assert answer.status_code == 200, answer.text
    return answer.content


def test_info_lists_the_sizes_with_their_costs(server: LocalServer) -> None:
    info = server.client.get("/info").json()
    assert [(size["height"], size["width"]) for size in info["sizes"]] == SIZES
    assert info["image_shape"] == [1, 16, 16]
    assert info["sizes"][0]["seconds_per_step"] == info["seconds_per_step"]
    for size in info["sizes"]:
        assert all(seconds > 0 for seconds in size["seconds_per_step"].values())
        assert size["seconds_per_step"].keys() == info["seconds_per_step"].keys()


def test_the_sizes_are_described(server: LocalServer) -> None:
    document = server.client.get("/openapi.json").json()["paths"]["/sample"]
    fields = document["post"]["requestBody"]["content"][JSON]["schema"]["properties"]
    parameters = {one["name"]: one["schema"] for one in document["get"]["parameters"]}
    for name, sides in (("height", [12, 16]), ("width", [8, 16, 32])):
        assert fields[name]["anyOf"] == [{"type": "integer", "enum": sides}, {"type": "null"}]
        assert parameters[name]["anyOf"] == [{"type": "integer", "enum": sides}]


@EVERY_SIZE
def test_a_request_gets_the_size_that_it_names(server: LocalServer, size: tuple[int, int]) -> None:
    height, width = size
    image = drawn(server, height=height, width=width)
    assert read_png(image).shape == size
    for query in (f"height={height}&width={width}", *([f"width={width}"] if width != 16 else [])):
        assert server.client.get(f"/sample?seed=7&{query}").content == image
    recipe = read_parameters(image)
    own = {} if size == (16, 16) else {"height": height, "width": width}
    assert {name: recipe[name] for name in recipe.keys() & {"height", "width"}} == own
    assert drawn(server, **{name: recipe[name] for name in recipe.keys() - {"model", "fingerprint"}}) == image
    answer = server.client.post("/sample", json={"seed": 7, "height": height, "width": width}, headers={"Accept": JSON})
    assert [answer.json()["parameters"][name] for name in ("height", "width")] == [height, width]


def test_requests_that_name_no_size_get_the_first(server: LocalServer) -> None:
    assert drawn(server) == drawn(server, height=16, width=16)


def test_sizes_have_their_own_etags(server: LocalServer) -> None:
    tags = [server.client.head(f"/sample?seed=7&{query}").headers["etag"] for query in ("", "width=32", "width=8")]
    assert len(set(tags)) == 3
    assert server.client.get("/sample?seed=7&width=8", headers={"If-None-Match": tags[2]}).status_code == 304
    assert server.client.head("/sample?seed=7&width=16&height=16").headers["etag"] == tags[0]


def test_a_sheet_has_images_of_one_size(server: LocalServer) -> None:
    sheet = drawn(server, num_images=3, height=12, width=8, class_label=[0, None, 1])
    assert read_png(sheet).shape == (24, 16)
    image = drawn(server, seed=9, height=12, width=8, class_label=1)
    np.testing.assert_array_equal(read_png(sheet)[12:, :8], read_png(image))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"height": 32, "width": 16}, f"height: must be, with width, {LIST}, and is 16x32"),
        ({"height": 16}, f"height: must, without width, belong to exactly one of {LIST}, and is 16"),
        ({"width": 9}, f"width: must, without height, belong to exactly one of {LIST}, and is 9"),
    ],
)
def test_another_size_is_refused_with_the_list(server: LocalServer, fields: Json, named: str) -> None:
    assert problem(server.client.post("/sample", json=fields), 422)["detail"] == named
    assert problem(server.client.get("/sample", params=fields), 422)["detail"] == named


@EVERY_SIZE
def test_an_upload_picks_its_size(server: LocalServer, size: tuple[int, int]) -> None:
    image = noisy((1, *size))
    for file in (write_npy(image), png(np.full(size, 77, np.uint8))):
        clean = post(server, file, timestep=500, num_inference_steps=2, class_label=1)
        assert read_png(clean.content).shape == size
        exact = server.client.post("/noise", files={"image": file}, data={"timestep": "9"}, headers={"Accept": NPY})
        assert read_npy(exact.content).shape == (1, *size)
    predicted = post(server, write_npy(image), NPY, timestep=500, output="model_output")
    assert read_npy(predicted.content).shape == (1, *size)


def test_an_upload_of_another_size_is_refused_with_the_list(server: LocalServer) -> None:
    for file, form in ((write_npy(noisy((1, 16, 8))), "[1, 16, 16]"), (png(np.zeros((16, 8), np.uint8)), "16x16")):
        for path in ("/denoise", "/noise"):
            answer = server.client.post(path, files={"image": file}, data={"timestep": "9"})
            said = invalid(answer, "image")
            assert form in said
            assert "8" in said


def test_mixed_sizes_give_the_bytes_that_each_gives_alone(server: LocalServer) -> None:
    samplers = ("ddim", "ddpm", "dpmpp_2m")
    requests: list[Json] = [
        {
            "seed": seed,
            "height": SIZES[seed % 3][0],
            "width": SIZES[seed % 3][1],
            "sampler": samplers[seed % len(samplers)],
            "num_inference_steps": 3 + seed % 5,
            "class_label": seed % 4 if seed % 4 < 3 else None,
            "guidance_interval": [0.25, 0.75] if seed % 2 else [0, 1],
        }
        for seed in range(24)
    ]
    alone = [drawn(server, **request) for request in requests]
    order = Random(0).sample(range(24), 24)
    with ThreadPoolExecutor(12) as threads:
        crowd = dict(zip(order, threads.map(lambda i: drawn(server, **requests[i]), order), strict=True))
    assert [crowd[i] == png for i, png in enumerate(alone)] == [True] * 24


def test_events_are_of_the_size(server: LocalServer) -> None:
    with Client(server.url) as client:
        *_, done_ = client.stream(seed=7, width=32, preview_every=2)
        [image] = client.sample(seed=7, height=16, width=32).images
    assert read_png(image.png).shape == (16, 32)
    assert [done_.parameters[name] for name in ("height", "width")] == [16, 32]  # type: ignore[union-attr]


def test_the_command_line_draws_and_verifies_sizes(server: LocalServer, tmp_path: Path) -> None:
    assert "16x16 or 32x16 or 8x12, grey" in done(stepwise(server, tmp_path, "info"))
    options = ["-s", "7", "--width", "32", "-c", "1", "--guidance-interval", "0,0.5"]
    done(stepwise(server, tmp_path, "sample", *options, "-o", "a.png"))
    done(stepwise(server, tmp_path, "sample", *options, "-n", "3", "--sheet", "-o", "b.png"))
    assert read_png((tmp_path / "a.png").read_bytes()).shape == (16, 32)
    assert done(stepwise(server, tmp_path, "verify", "a.png", "b.png")).count("the same bytes") == 2


def test_json_uploads_pick_their_size(server: LocalServer) -> None:
    body = {"image": base64.b64encode(write_npy(noisy((1, 12, 8)))).decode(), "timestep": 100}
    assert read_png(server.client.post("/denoise", json=body).content).shape == (12, 8)
