"""Images to draw anew, through OpenAI's edits and AUTOMATIC1111's img2img: the bytes of /sample with the same image.

The official clients, and what each program sends, are tests/test_sdks.py's and tests/test_other_programs.py's.
"""

import base64
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image, ImageOps

from tests import local
from tests.local import serving_fake, serving_here
from tests.pipelines import write_pipeline
from tests.servers import Json, Reachable, ServerProcess, read_parameters
from tests.test_a1111 import pngs
from tests.test_openai import error, events, images
from tests.test_picture_calls import MASK, PHOTO, in_base64
from tests.test_pictures import RGB, file

EDITS, IMG2IMG = "/v1/images/edits", "/sdapi/v1/img2img"
IMAGE = ("photo.jpg", PHOTO, "image/jpeg")
CLEAR = MASK.convert("RGB")  # its right half is drawn anew
CLEAR.putalpha(ImageOps.invert(MASK))
CAT: Json = {"prompt": "a cat", "seed": 7, "strength": 0.6}
BLACK = Image.new("L", MASK.size)


def edited(server: Reachable, *more: tuple[str, Any], **fields: str) -> httpx.Response:
    """The answer to a form. Its texts are what forms have."""
    body = {name: str(value) for name, value in CAT.items()} | fields
    return server.client.post(EDITS, files=more or [("image", IMAGE)], data=body)


def sampled(server: Reachable, mask: Image.Image | None = None, image: bytes = PHOTO, **fields: object) -> bytes:
    """The PNG of /sample."""
    body = {"image": in_base64(image), "class_label": "cat", "seed": 7, "strength": 0.6, **fields}
    if mask is not None:
        body["mask_image"] = in_base64(file(mask))
    answer = server.client.post("/sample", json=body)
    assert answer.status_code == 200, answer.text
    return answer.content


def drawn(answer: httpx.Response) -> list[bytes]:
    assert answer.status_code == 200, answer.text
    return images(answer.json())


# OpenAI's API.


def test_an_edit_has_the_bytes_of_sample(server: ServerProcess) -> None:
    answer = edited(
        server,
        ("image[]", IMAGE),
        n="2",
        steps="5",
        size="1024x1024",
        input_fidelity="high",
        quality="auto",
        background="",
        mask_image="x",
    )
    expected = [sampled(server, seed=seed, num_inference_steps=5) for seed in (7, 8)]
    assert drawn(answer) == expected
    assert [one["seed"] for one in answer.json()["data"]] == [7, 8]
    assert answer.headers["x-ignored-fields"] == "input_fidelity, quality, mask_image"
    assert answer.headers["x-warnings"].startswith("1024x1024 is not served: 16x16 is drawn")
    assert read_parameters(expected[0])["strength"] == 0.6
    told = edited(server, seed="", strength="", paste_original="").json()["data"][0]
    again = sampled(server, seed=told["seed"], strength=None)
    assert again == base64.b64decode(told["b64_json"])
    assert read_parameters(again)["strength"] == 0.8


def test_what_is_transparent_in_a_mask_is_drawn_anew(server: ServerProcess) -> None:
    expected = sampled(server, MASK)
    assert drawn(edited(server, ("image", IMAGE), ("mask", ("m.png", file(CLEAR), "image/png")))) == [expected]
    assert "mask_sha256" in read_parameters(expected)
    exact = edited(server, ("image", IMAGE), ("mask", ("m.png", file(CLEAR), "image/png")), paste_original="true")
    assert drawn(exact) == [sampled(server, MASK, paste_original=True)]


def test_without_a_mask_the_image_s_own_transparent_parts_are_drawn_anew(server: ServerProcess) -> None:
    photo = Image.open(io.BytesIO(PHOTO)).convert("RGBA")
    photo.putalpha(ImageOps.invert(MASK))
    white = Image.new("RGB", photo.size, "white")
    white.paste(photo, mask=photo.getchannel("A"))
    cut_out = ("image", ("cut.png", file(photo), "image/png"))
    assert drawn(edited(server, cut_out)) == [sampled(server, MASK, file(white))]
    other = ("mask", ("m.png", file(CLEAR.transpose(Image.Transpose.FLIP_LEFT_RIGHT)), "image/png"))
    flipped = MASK.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert drawn(edited(server, cut_out, other)) == [sampled(server, flipped, file(white))]
    photo.putalpha(200)  # nothing is transparent enough
    assert drawn(edited(server, ("image", ("a.png", file(photo), "image/png")))) == [sampled(server, image=file(photo))]


def test_json_has_files_in_base64(server: ServerProcess) -> None:
    url = f"data:image/jpeg;base64,{in_base64(PHOTO)}"
    mask = {"image_url": f"data:image/png;base64,{in_base64(file(CLEAR))}"}
    expected = sampled(server, MASK)
    for sent in ({"image": url}, {"images": [{"image_url": url}]}, {"image": [in_base64(PHOTO)]}):
        assert drawn(server.client.post(EDITS, json={**CAT, **sent, "mask": mask})) == [expected]
    assert drawn(server.client.post(EDITS, json={**CAT, "image": url, "mask": None})) == [sampled(server)]


def test_an_edit_is_streamed_or_a_data_url(server: ServerProcess) -> None:
    expected = sampled(server, num_inference_steps=8)
    answer = edited(server, ("image", IMAGE), stream="true", partial_images="3", steps="8")
    told = events(answer)
    assert {one["type"] for one in told} <= {"image_edit.partial_image", "image_edit.completed"}
    [completed] = [one for one in told if one["type"] == "image_edit.completed"]
    assert base64.b64decode(completed["b64_json"]) == expected
    [one] = edited(server, response_format="url", steps="8").json()["data"]
    assert one["url"] == f"data:image/png;base64,{in_base64(expected)}"
    [webp] = drawn(edited(server, output_format="webp", output_compression="0"))
    assert webp[8:12] == b"WEBP"


@pytest.mark.parametrize(
    ("files", "fields", "status", "param", "said"),
    [
        ([], {}, 422, "image", "is required: a PNG, JPEG or WebP file, which is drawn anew"),
        ([("image[]", IMAGE)] * 3, {}, 400, "image", "must be one image, and 3 came"),
        ([("image", IMAGE), ("image[]", IMAGE)], {}, 400, "image", "must be one image, and 2 came"),
        ([("image", IMAGE), ("mask", IMAGE)], {}, 422, "mask", "has no transparent parts"),
        ([("image", IMAGE), ("mask", IMAGE), ("mask", IMAGE)], {}, 422, "mask", "is given twice"),
        ([("image", IMAGE), ("mask", ("m", b"?", "x/y"))], {}, 422, "mask", "must be a PNG, JPEG or WebP file"),
        ([("image", IMAGE), ("photo", IMAGE)], {}, 422, "photo", "is a file, and only image and image[] and mask"),
        ([("image", IMAGE), ("mask_image", IMAGE)], {}, 422, "mask_image", "is a file, and only image and image[]"),
        ([("image", IMAGE)] * 18, {}, 422, None, "Too many files: it may have 17"),
        ([("image", IMAGE)], {"n": "1.5"}, 422, "n", "must be an integer from 1 to"),
        ([("image", IMAGE)], {"stream": "yes"}, 422, "stream", "must be true or false"),
        ([("image", IMAGE)], {"partial_images": "²", "stream": "true"}, 422, "partial_images", "must be an integer"),
        ([("image", IMAGE)], {"strength": "0"}, 422, "strength", "must be more than 0"),
        ([("image", IMAGE)], {"steps": "2", "strength": "0.1"}, 422, "strength", ""),
        ([("image", IMAGE)], {"prompt": "a fox"}, 422, "prompt", "must name one class"),
    ],
)
def test_what_cannot_be_edited_is_refused_by_its_name(
    server: ServerProcess, files: list[Any], fields: Json, status: int, param: str | None, said: str
) -> None:
    body = {"prompt": "a cat", **fields}
    sent: Any = files or [("nothing", (None, ""))]
    found = error(server.client.post(EDITS, files=sent, data=body), status)
    assert found["param"] == param
    assert said in found["message"]


def test_fields_may_be_lists_and_are_given_once(server: ServerProcess) -> None:
    def sent(*texts: tuple[str, str]) -> httpx.Response:
        parts: Any = [("image", IMAGE), ("prompt", (None, "cat")), *((name, (None, text)) for name, text in texts)]
        return server.client.post(EDITS, files=parts)

    listed = sent(
        ("user", "a"),
        ("user", "b"),
        ("timesteps[]", "900"),
        ("timesteps[]", "300"),
        ("sampler", "euler"),
        ("rng_seed", "3"),
    )
    expected = sampled(server, timesteps=[900, 300], sampler="euler", seed=3, strength=None)
    assert drawn(listed) == [expected]
    for name in ("steps", "size"):
        assert error(sent((name, "4"), (name, "5")), 422)["param"] == name
    address = server.client.post(EDITS, json={"prompt": "cat", "image": "https://a.example/cat.png"})
    assert "fetches no addresses" in error(address, 422)["message"]
    assert error(server.client.post(EDITS, content=b"a", headers={"Content-Type": "text/csv"}), 415)


# AUTOMATIC1111's API.


def img2img(server: Reachable, **fields: object) -> Json:
    """The answer, with its `info` read."""
    body = {"init_images": [in_base64(PHOTO)], "prompt": "a cat", "seed": 7, "cfg_scale": 1, **fields}
    answer = server.client.post(IMG2IMG, json=body)
    assert answer.status_code == 200, answer.text
    document: Json = answer.json()
    assert document.keys() == {"images", "parameters", "info"}
    return {**document, "info": json.loads(document["info"])}


def test_img2img_has_the_bytes_of_sample(server: ServerProcess) -> None:
    url = f"data:image/jpeg;base64,{in_base64(PHOTO)}"
    document = img2img(server, init_images=[url], steps=8, batch_size=2, width=512, height=512, resize_mode=1)
    same: Json = {"strength": 0.75, "fit": "crop", "guidance_scale": 1, "num_inference_steps": 8}
    assert pngs(document) == [sampled(server, seed=seed, **same) for seed in (7, 8)]
    info, parameters = document["info"], document["parameters"]
    assert (info["denoising_strength"], info["steps"], info["all_seeds"]) == (0.75, 8, [7, 8])
    assert ", Denoising strength: 0.75, Version: " in info["infotexts"][1]
    assert info["warnings"] == ["512x512 is not served: 16x16 is drawn, the served size nearest in aspect"]
    assert info["ignored"] == []
    assert (parameters["denoising_strength"], parameters["init_images"], parameters["mask"]) == (0.75, None, None)
    assert not {"enable_hr", "hr_scale"} & parameters.keys()
    told = img2img(server, seed=-1, denoising_strength=0.5)
    assert pngs(told) == [sampled(server, seed=told["info"]["seed"], strength=0.5, guidance_scale=1)]


def test_a_mask_is_white_where_it_is_drawn_anew_or_opaque(server: ServerProcess) -> None:
    """What is kept comes back exactly, as in AUTOMATIC1111's, which pastes it over what it drew."""
    opaque = BLACK.convert("RGB")
    opaque.putalpha(MASK)  # as its own page sends what is painted
    inverted = ImageOps.invert(MASK)
    expected = sampled(server, MASK, paste_original=True, guidance_scale=1)
    for mask, inverts in ((MASK, 0), (MASK.convert("RGBA"), False), (opaque, None), (inverted, 1), (inverted, True)):
        document = img2img(server, mask=in_base64(file(mask)), inpainting_mask_invert=inverts, denoising_strength=0.6)
        assert pngs(document) == [expected]
    assert "mask_sha256" in read_parameters(expected)


def test_what_a_mask_cannot_do_here_is_listed(server: ServerProcess) -> None:
    sent: Json = {
        "mask_blur": 4,
        "inpainting_fill": 0,
        "inpaint_full_res": True,
        "inpaint_full_res_padding": 32,
        "initial_noise_multiplier": 1,
        "image_cfg_scale": 1.5,
        "resize_mode": 2,
        "override_settings": {"img2img_fix_steps": True},
    }
    always = ["resize_mode", "image_cfg_scale", "override_settings.img2img_fix_steps"]
    assert img2img(server, **sent, mask="")["info"]["ignored"] == always
    with_mask = img2img(server, **sent, mask=in_base64(file(MASK)), include_init_images=True)["info"]["ignored"]
    in_a_mask = ["mask_blur", "inpainting_fill", "inpaint_full_res"]
    assert sorted(with_mask) == sorted([*always, *in_a_mask, "include_init_images"])
    nothing = {"mask_blur": 0, "inpainting_fill": 1, "inpaint_full_res": False, "resize_mode": 0}
    assert img2img(server, **nothing, mask=in_base64(file(MASK)))["info"]["ignored"] == []


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"init_images": []}, "init_images: must be a list of one image, and has 0"),
        ({"init_images": None}, "init_images: must be a list of one image, and has 0"),
        ({"init_images": in_base64(PHOTO)}, "init_images: must be a list of one image, and is no list"),
        ({"init_images": [in_base64(PHOTO)] * 2}, "init_images: must be a list of one image, and has 2"),
        ({"init_images": [None]}, "init_images: must be a string"),
        ({"init_images": ["AAAA"]}, "init_images: must be a PNG, JPEG or WebP file"),
        ({"init_images": ["http://a.example/b.png"]}, "init_images: must be a PNG, JPEG or WebP file in base64"),
        ({"mask": "?"}, "mask: is not valid base64"),
        ({"mask": in_base64(b"?")}, "mask: must be a PNG, JPEG or WebP file"),
        ({"denoising_strength": 0}, "denoising_strength: must be greater than 0"),
        ({"denoising_strength": 0.1, "steps": 5}, "denoising_strength: "),
        ({"resize_mode": 4}, "resize_mode: must be less than or equal to 3"),
        ({"inpainting_mask_invert": 2}, "inpainting_mask_invert: "),
        ({"prompt": "x" * 2**23}, "body: has"),
    ],
)
def test_what_img2img_cannot_draw_is_named_as_its_programs_name_it(
    server: ServerProcess, fields: Json, said: str
) -> None:
    answer = server.client.post(IMG2IMG, json={"init_images": [in_base64(PHOTO)], "prompt": "cat", **fields})
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith(said)


def test_images_may_be_larger_than_other_json(server: ServerProcess) -> None:
    """Base64 may have blanks."""
    sent = {"init_images": [in_base64(PHOTO) + " " * 2**23], "mask": in_base64(file(MASK)) + " " * 2**22}
    expected = sampled(server, MASK, paste_original=True, guidance_scale=1)
    assert pngs(img2img(server, **sent, denoising_strength=0.6)) == [expected]


# Networks that inpaint.


def test_a_network_that_inpaints_needs_image_and_mask() -> None:
    served = replace(local.SERVED, model=replace(local.MODEL, inpaints=True))
    with serving_fake(served=served) as server:
        refusal = error(server.client.post("/v1/images/generations", json={"prompt": "one"}), 501)
        assert "POST /v1/images/edits draws" in refusal["message"]
        refusal = error(edited(server, prompt="one"), 422)
        assert (refusal["param"], refusal["message"][:18]) == ("mask", "mask: is required:")
        answer = server.client.post("/sdapi/v1/txt2img", json={"prompt": "one"})
        assert (answer.status_code, "POST /sdapi/v1/img2img draws" in answer.json()["detail"]) == (501, True)
        answer = server.client.post(IMG2IMG, json={"init_images": [in_base64(PHOTO)], "prompt": "one"})
        assert answer.json()["detail"].startswith("mask: is required")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd1", "sd_inpaint"])
def test_a_stable_diffusion_edits(tmp_path: Path, kind: str) -> None:
    write_pipeline(tmp_path / "sd", kind)
    photo = ("image", ("photo.png", file(RGB.resize((60, 70))), "image/png"))
    mask = ("mask", ("mask.png", file(CLEAR), "image/png"))
    with serving_here(weights=str(tmp_path / "sd"), max_batch=4) as server:
        fields: Json = {"prompt": "the fox", "seed": 3, "num_inference_steps": 4, "strength": 0.7}
        texts = {name: str(value) for name, value in fields.items()}
        image = in_base64(photo[1][1])
        answer = server.client.post(EDITS, files=[photo, mask], data={**texts, "n": "2"})
        body = {**fields, "image": image, "mask_image": in_base64(file(MASK))}
        expected = [server.client.post("/sample", json={**body, "seed": seed}).content for seed in (3, 4)]
        assert drawn(answer) == expected
        assert answer.json()["size"] == "64x64"
        assert answer.json()["usage"]["input_tokens"] > 1
        sent = {"init_images": [image], "mask": body["mask_image"], "denoising_strength": 0.7, "steps": 4, "seed": 3}
        one = server.client.post(IMG2IMG, json={**sent, "prompt": "the fox", "width": 64, "height": 64}).json()
        same = server.client.post("/sample", json={**body, "paste_original": True, "emphasis": "original"})
        assert base64.b64decode(one["images"][0]) == same.content
