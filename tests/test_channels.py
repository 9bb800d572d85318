"""Images that are neither grey nor RGB are served as .npy alone."""

from collections.abc import Iterator

import httpx
import numpy as np
import pytest

from model.checkpoints.load import load
from model.noise import first_draw
from tests.local import LocalServer, serving_here
from tests.servers import Float32, Reachable, invalid, problem, read_npy, write_npy, write_weights

NPY = "application/x-npy"
SHAPE = (4, 8, 16)
SIZES = {"in_channels": 4, "model_channels": 8, "channel_multipliers": [1, 2], "image_size": [8, 16]}
ROUTES = ("/sample", "/denoise", "/noise")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    weights = write_weights(tmp_path_factory.mktemp("bands") / "bands", **SIZES, schedule={})
    with serving_here(weights=str(weights)) as running:
        yield running


@pytest.fixture(scope="module")
def alpha_bar(tmp_path_factory: pytest.TempPathFactory) -> Float32:
    """ᾱ of each timestep."""
    weights = write_weights(tmp_path_factory.mktemp("bands") / "bands", **SIZES, schedule={})
    return np.array(load(weights).description.schedule.alphas_cumprod, np.float32)


def ask(server: Reachable, path: str, accept: str | None, image: bytes | None = None) -> httpx.Response:
    headers = {} if accept is None else {"Accept": accept}
    if path == "/sample":
        request = server.client.build_request("POST", path, json={"seed": 7}, headers=headers)
    else:
        files = {"image": ("image", write_npy(noisy()) if image is None else image)}
        request = server.client.build_request("POST", path, files=files, data={"timestep": "300"}, headers=headers)
    if accept is None:
        del request.headers["accept"]
    return server.client.send(request)


def noisy() -> Float32:
    return np.random.default_rng(0).normal(0, 0.7, SHAPE).astype(np.float32)


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("accept", [None, "*/*", NPY, "image/png;q=0.9, */*;q=0.1"])
def test_a_client_without_a_preference_gets_npy(server: LocalServer, path: str, accept: str | None) -> None:
    response = ask(server, path, accept)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == NPY
    assert response.headers["vary"] == "Accept"
    array = read_npy(response.content)
    assert array.shape == SHAPE
    assert np.isfinite(array).all()


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("accept", ["image/png", "image/*", "application/json", "application/zip", "text/event-stream"])
def test_every_other_type_is_406_and_the_answer_lists_the_types(server: LocalServer, path: str, accept: str) -> None:
    assert f"answered as {NPY}, and" in problem(ask(server, path, accept), 406)["detail"]


@pytest.mark.parametrize("path", ["/denoise", "/noise"])
def test_an_upload_is_an_npy(server: LocalServer, path: str) -> None:
    told = "must be an .npy file: images of this model have 4 channels, and are no pictures"
    for image in (b"\x89PNG\r\n\x1a\n", b"GIF89a"):
        assert invalid(ask(server, path, NPY, image), "image") == told
    wrong = write_npy(np.zeros((3, 8, 16), np.float32))
    expected = "must be an .npy of float32 [4, 8, 16], and is float32 [3, 8, 16]"
    assert invalid(ask(server, path, NPY, wrong), "image") == expected


def test_several_images_are_the_images_of_their_seeds(server: LocalServer) -> None:
    together = server.client.get("/sample?seed=7&num_images=3").content
    arrays = read_npy(together)
    assert arrays.shape == (3, *SHAPE)
    for i, array in enumerate(arrays):
        np.testing.assert_array_equal(read_npy(server.client.get(f"/sample?seed={7 + i}").content), array)


def test_an_image_may_be_kept(server: LocalServer) -> None:
    kept = server.client.get("/sample?seed=7")
    assert kept.headers["cache-control"] == "max-age=3600"
    again = server.client.get("/sample?seed=7", headers={"If-None-Match": kept.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_noise_is_exact(server: LocalServer, alpha_bar: Float32) -> None:
    clean = noisy()
    form = {"timestep": "300", "seed": "5"}
    came = read_npy(server.client.post("/noise", files={"image": ("x", write_npy(clean))}, data=form).content)
    expected = np.sqrt(alpha_bar[300]) * clean + np.sqrt(1 - alpha_bar[300]) * first_draw(5, SHAPE)
    np.testing.assert_allclose(came, expected, atol=1e-6)


def test_one_step_of_denoising_follows_from_the_models_output(server: LocalServer, alpha_bar: Float32) -> None:
    """The network predicts ε."""
    answers = [
        read_npy(
            server.client.post(
                "/denoise",
                files={"image": ("x", write_npy(noisy()))},
                data={"timestep": "300", "output": output},
            ).content
        )
        for output in ("model_output", "x0")
    ]
    expected = (noisy() - np.sqrt(1 - alpha_bar[300]) * answers[0]) / np.sqrt(alpha_bar[300])
    np.testing.assert_allclose(answers[1], expected.clip(-1, 1), atol=1e-5)


def test_openapi_offers_npy_alone(server: LocalServer) -> None:
    paths = server.client.get("/openapi.json").json()["paths"]
    for path in ROUTES:
        assert paths[path]["post"]["responses"]["200"]["content"].keys() == {NPY}
    form = paths["/denoise"]["post"]["requestBody"]["content"]
    assert form["multipart/form-data"]["schema"]["properties"]["image"]["description"].startswith("an .npy file")
    example = form["application/json"]["example"]
    assert server.client.post("/denoise", json=example).status_code == 200
    fields = paths["/sample"]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert "image" not in fields
    assert fields["strength"]["anyOf"] == [{"type": "null"}]
    assert (fields["fit"]["enum"], fields["paste_original"]["enum"]) == (["stretch"], [False])


def test_an_image_to_draw_from_is_refused(server: LocalServer) -> None:
    answer = server.client.post("/sample", files={"image": b"anything"})
    assert invalid(answer, "image") == "must be left out: images of this model have 4 channels, and are no pictures"
