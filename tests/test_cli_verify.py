"""`stepwise verify`: whether a file matches its recipe, and if not, what differs."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model.samplers import SAMPLERS
from service.http.png import encode_png
from stepwise.cli import exits
from tests.programs import done, refused, stepwise
from tests.servers import Json, Reachable, ServerProcess, read_parameters, read_png
from tests.test_cli import asked, uploaded


def remade(png: bytes, change: int = 0, **recipe: object) -> bytes:
    """A PNG with some fields of its recipe changed, and its first value changed by `change`."""
    pixels = read_png(png).astype(np.float32)
    pixels[0, 0] += change if pixels[0, 0] < 128 else -change
    return encode_png(pixels[None] / np.float32(127.5) - 1, {**read_parameters(png), **recipe})


def verdict(server: Reachable, folder: Path, png: bytes, *options: str) -> Json:
    """The verdict of one file, as JSON and in words."""
    (folder / "a.png").write_bytes(png)
    words = stepwise(server, folder, "verify", "a.png", *options)
    ended = stepwise(server, folder, "verify", "a.png", "--json", *options)
    assert words.stderr == ended.stderr == b""
    [found] = json.loads(ended.stdout)
    assert ended.returncode == words.returncode == (0 if found["same"] else exits.DIFFERENT)
    assert found["same"] is (found["differs"] == [])
    expected = "the same bytes" if found["same"] else f"different: {'; '.join(found['differs'])}"
    assert words.stdout.decode() == f"a.png: {expected}\n"
    assert found["recipe"] == read_parameters(png)
    assert isinstance(found, dict)
    return found


def test_all_that_the_server_draws_is_verified(server: ServerProcess, tmp_path: Path) -> None:
    drawn = {
        "label.png": asked(server, seed=1, class_label="cat"),
        "none.png": asked(server, seed=2, sampler="ddim", eta=1, num_inference_steps=7),
        "sheet.png": asked(server, seed=3, num_images=5, class_label=["cat", None, "7", "dog", None]),
        "unguided sheet.png": asked(server, seed=3, num_images=2),
        "timesteps.png": asked(server, seed=4, timesteps=[900, 300]),
        "sheet of timesteps.png": asked(server, seed=4, num_images=2, timesteps=[900, 300]),
    }
    for name, png in drawn.items():
        (tmp_path / name).write_bytes(png)
    printed = done(stepwise(server, tmp_path, "verify", *drawn))
    assert printed.splitlines() == [f"{name}: the same bytes" for name in drawn]
    assert done(stepwise(server, tmp_path, "verify", "-", stdin=drawn["label.png"])) == "-: the same bytes\n"


def test_many_files(server: ServerProcess, tmp_path: Path) -> None:
    """More files than one request draws. The output keeps their order."""
    names = [f"{seed}.png" for seed in range(20)]
    done(stepwise(server, tmp_path, "sample", "-n", "20", "-s", "0", "-o", "."))
    assert done(stepwise(server, tmp_path, "verify", *names)).splitlines() == [f"{n}: the same bytes" for n in names]


def test_what_was_denoised_needs_the_noisy_image(server: ServerProcess, tmp_path: Path) -> None:
    noisy = uploaded(server, "/noise", asked(server, seed=9), timestep=300, seed=1, value_range=4)
    (tmp_path / "noisy.png").write_bytes(noisy)
    fields: Json = {"timestep": 300, "value_range": 4, "num_inference_steps": 5, "class_label": "cat"}
    clean = uploaded(server, "/denoise", noisy, scaling="additive", sampler="ddpm", seed=3, guidance_scale=2, **fields)
    (tmp_path / "clean.png").write_bytes(clean)
    line = refused(stepwise(server, tmp_path, "verify", "clean.png"), exits.UNUSABLE)
    assert line == "clean.png: it was denoised: give the noisy image with --image"

    assert verdict(server, tmp_path, clean, "--image", "noisy.png")["same"]
    for options in (["--image", "clean.png"], ["--image", "noisy.png", "--value-range", "2"]):
        found = verdict(server, tmp_path, clean, *options)
        assert found["differs"][0].startswith("it was made of another noisy image than this")
        assert found["pixels"]["differing"] > 0


def test_pixels_that_differ_are_counted(server: ServerProcess, tmp_path: Path) -> None:
    found = verdict(server, tmp_path, remade(asked(server, seed=1), change=3))
    assert found["differs"] == ["1 of 256 values of its pixels differ, by at most 3 of 255"]
    assert found["pixels"] == {"differing": 1, "values": 256, "most": 3}


def test_the_same_pixels_in_other_bytes(server: ServerProcess, tmp_path: Path) -> None:
    png = asked(server, seed=1)
    chunk = b"\0\0\0\0IEND\xaeB`\x82"
    found = verdict(server, tmp_path, png.removesuffix(chunk) + b"\0\0\0\1tEXtx" + b"\0\0\0\0" + chunk)
    assert found["differs"] == ["the pixels are the same"]


def test_another_fingerprint_is_told_with_what_comes_of_it(server: ServerProcess, tmp_path: Path) -> None:
    here = server.client.get("/info").json()["fingerprint"]
    found = verdict(server, tmp_path, remade(asked(server, seed=1), fingerprint="0123456789abcdef"))
    assert found["differs"] == [
        f"it is of fingerprint 0123456789abcdef, and here is {here}",
        "the pixels are the same",
    ]


def test_a_recipe_that_another_fingerprint_refuses_is_a_difference(server: ServerProcess, tmp_path: Path) -> None:
    png = remade(asked(server, seed=1), fingerprint="0123456789abcdef", class_label=5)
    assert verdict(server, tmp_path, png)["differs"][1].startswith("which refuses the recipe: class_label: must be")


def test_old_recipes_name_the_model_as_its_folder(server: ServerProcess, tmp_path: Path) -> None:
    here = server.client.get("/info").json()["fingerprint"]
    found = verdict(server, tmp_path, remade(asked(server, seed=1), model="grey", fingerprint="0123456789abcdef"))
    assert found["differs"] == [
        f"it is of fingerprint 0123456789abcdef, and here is {here}",
        "the pixels are the same",
    ]


def test_another_model_draws_nothing(server: ServerProcess, rgb_server: ServerProcess, tmp_path: Path) -> None:
    accepted = rgb_server.metric("stepwise_accepted_total")
    found = verdict(rgb_server, tmp_path, asked(server, seed=1))
    names = [where.client.get("/info").json()["fingerprint_parts"]["model"] for where in (server, rgb_server)]
    assert found["differs"][0] == f"it is of model {names[0]}, and here is {names[1]}"
    assert found["pixels"] is None
    assert rgb_server.metric("stepwise_accepted_total") == accepted


def test_another_size(server: ServerProcess, tmp_path: Path) -> None:
    png = asked(server, seed=1)
    larger = encode_png(np.zeros((1, 16, 32), np.float32), read_parameters(png))
    assert verdict(server, tmp_path, larger)["differs"] == ["it has the shape [16, 32], and drawn again [16, 16]"]


def test_what_cannot_be_compared_is_told_and_the_others_are(server: ServerProcess, tmp_path: Path) -> None:
    """Errors take precedence over differences in the exit code."""
    png = asked(server, seed=1)
    Image.fromarray(read_png(png)).save(tmp_path / "saved again.png")
    contents = {
        "good.png": png,
        "other.png": remade(png, change=1),
        "text.png": b"text",
        "bad.png": remade(png, sampler="magic"),
        "cut.png": remade(png, seed=2)[:-100],
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    names = [*contents, "saved again.png", "missing.png"]
    ended = stepwise(server, tmp_path, "verify", *names)
    assert ended.returncode == exits.UNUSABLE
    assert ended.stdout.decode().splitlines() == [
        "good.png: the same bytes",
        "other.png: different: 1 of 256 values of its pixels differ, by at most 1 of 255",
    ]
    errors = dict(line.removeprefix("stepwise: ").split(": ", 1) for line in ended.stderr.decode().splitlines())
    assert errors == {
        "text.png": "this is no PNG",
        "bad.png": f"sampler: must be one of {', '.join(SAMPLERS)}, and is 'magic'",
        "cut.png": "its pixels cannot be read",
        "saved again.png": "this PNG has no recipe: it has no text chunk `parameters`",
        "missing.png": "cannot be read: No such file or directory",
    }
    listed = json.loads(stepwise(server, tmp_path, "verify", "--json", *names).stdout)
    assert [one["file"] for one in listed] == names
    assert {one["file"]: one["error"].removeprefix(f"{one['file']}: ") for one in listed if "error" in one} == errors


@pytest.mark.parametrize("field", ["seed", "sampler", "guidance_scale"])
def test_a_recipe_that_lacks_a_field(server: ServerProcess, tmp_path: Path, field: str) -> None:
    png = asked(server, seed=1)
    recipe = {name: value for name, value in read_parameters(png).items() if name != field}
    with Image.open(io.BytesIO(png)) as image:
        pixels = np.asarray(image, np.float32)
    (tmp_path / "a.png").write_bytes(encode_png(pixels[None] / np.float32(127.5) - 1, recipe))
    line = refused(stepwise(server, tmp_path, "verify", "a.png"), exits.UNUSABLE)
    assert line == f"a.png: its recipe does not say {field}"
