"""The Accept header decides the format. ETags are equal exactly where the bytes are."""

import base64
import io
import json
import zipfile
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.responses import Response

from model.description import ModelDescription, Recommended, VAEDescription
from model.rows import Group, Image
from model.schedule import Schedule
from service.engine.requests import Finished
from service.errors import Invalid, NotAcceptable
from service.http.formats import contact_sheet
from service.http.png import encode_png, to_uint8
from service.http.responses import EVENTS, JPEG, JSON, NPY, PNG, WEBP, ZIP, encoding, etag, matches, negotiate, respond
from service.plan.fields import SampleRequest
from service.plan.plan import Plan, plan_sample
from service.plan.served import Served

OFFERS = (PNG, JSON, ZIP)

MODEL = ModelDescription(
    name="digits",
    digest="d" * 64,
    architecture="diffusion_unet",
    image_shape=(1, 4, 4),
    sample_shape=(1, 4, 4),
    factor=1,
    out_channels=1,
    first_timestep=0,
    num_classes=3,
    no_label=3,
    class_names=("zero", "one", "two"),
    num_parameters=1,
    schedule=Schedule(),
    recommended=Recommended(num_inference_steps=10, guidance_scale=2.0),
    declared_name="digits",
)


def first_draw(seed: int, shape: tuple[int, int, int]) -> Image:
    return np.zeros(shape, dtype=np.float32)


SERVED = Served(
    MODEL,
    "cpu",
    {"weights": "d" * 64, "torch": "2"},
    reproducible=True,
    first_draw=first_draw,
    groups=(Group(4, 4),),
)


LATENT = replace(SERVED, model=replace(MODEL, sample_shape=(2, 2, 2), vae=VAEDescription("kl", 2, 0.5, 1)))


def planned(served: Served = SERVED, /, **fields: Any) -> Plan:
    return plan_sample(SampleRequest(**{"seed": 7, **fields}), served, timeout=300)


def drawn(count: int) -> Finished:
    rng = np.random.default_rng(0)
    images = [rng.uniform(-1, 1, (1, 4, 4)).astype(np.float32) for _ in range(count)]
    return Finished(images, queue_s=0.25, denoise_s=1.5)


def body_of(plan: Plan, finished: Finished, media_type: str, served: Served = SERVED) -> bytes:
    """The body that the engine's last stage makes."""
    how = encoding(plan, media_type, served)
    return how.whole(finished.images, [how.image(index, image) for index, image in enumerate(finished.images)])


def answered(plan: Plan, finished: Finished, media_type: str, served: Served = SERVED) -> Response:
    finished = finished._replace(body=body_of(plan, finished, media_type, served), encode_s=1.0)
    return respond(plan, finished, media_type, served, {"Vary": "Accept"})


# Accept


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        # missing, and any
        ("", PNG),
        ("*/*", PNG),
        (" */* ; q=0.1 ", PNG),
        # a single type
        ("image/png", PNG),
        ("image/*", PNG),
        ("application/json", JSON),
        ("Application/JSON", JSON),
        ("application/zip", ZIP),
        ("application/*", JSON),
        # RFC 9110, 12.5.1: weights
        ("image/png;q=0.5, application/json", JSON),
        ("image/png;q=0.5, application/json;q=0.8, application/zip;q=0.7", JSON),
        ("application/zip;q=0.9, */*;q=0.1", ZIP),
        ("audio/*; q=0.2, audio/basic, image/png;q=0.1", PNG),
        ("text/plain; q=0.5, text/html, application/json; q=0.001", JSON),
        # RFC 9110, 12.5.1: a type has the weight of the most specific range that covers it
        ("image/*, image/png;q=0.2, application/json;q=0.4", JSON),
        ("*/*;q=1, image/*;q=0.5, application/json;q=0.6, application/zip;q=0.3", JSON),
        ("*/*, image/png;q=0", JSON),
        ("*/*, image/*;q=0, application/json;q=0", ZIP),
        ("application/*, application/json;q=0", ZIP),
        # at equal weight, a named type comes before a covered one, then the order of the offers decides
        ("application/zip, application/json, image/png", PNG),
        ("application/json, */*", JSON),
        ("application/json, image/*", JSON),
        ("application/json, text/plain, */*", JSON),  # axios
        ("image/avif,image/webp,image/apng,image/svg+xml,image/*,*/*;q=0.8", PNG),  # <img> in Chrome
        ("text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8", PNG),  # address bar
        # parameters, and malformed values
        ("application/json; charset=utf-8", JSON),
        ("application/json;q=0.1, application/json;charset=utf-8, image/png;q=0.5", JSON),
        ("image/png;Q=0.1, application/json;q=0.2", JSON),
        ("application/json;q=9, image/png", PNG),
        ("image/png;q=much, application/json;q=0.1", JSON),
        ("image/png;q=, application/json;q=0.1", JSON),
        ("image/png;q=-1, application/json;q=0.1", JSON),
        ("image/png;q=nan, application/json;q=0.1", JSON),
        (",,;, application/json", JSON),
        ("json, application/zip", ZIP),
    ],
)
def test_the_preferred_type_is_chosen(accept: str, chosen: str) -> None:
    assert negotiate(accept, OFFERS) == chosen


@pytest.mark.parametrize(
    "accept",
    [
        "text/html",
        "image/jpeg",
        "text/*",
        "image/png;q=0",
        "*/*;q=0",
        "image/*;q=0, application/*;q=0.0",
        "image/png/x",
        "text/event-stream, text/plain;q=0.5",
    ],
)
def test_what_is_not_offered_is_refused_by_name(accept: str) -> None:
    with pytest.raises(NotAcceptable) as refusal:
        negotiate(accept, OFFERS)
    assert str(refusal.value) == (
        f"this is answered as image/png, application/json, application/zip, and the request accepts {accept}"
    )


ranges = st.sampled_from((*OFFERS, "image/*", "application/*", "*/*", "text/html"))
weights = st.sampled_from(("0", "0.3", "0.7", "1"))


@given(st.lists(st.tuples(ranges, weights), min_size=1, max_size=5, unique_by=lambda pair: pair[0]), st.randoms())
def test_the_choice_is_of_the_greatest_weight_and_the_order_of_ranges_means_nothing(
    pairs: list[tuple[str, str]], random: Random
) -> None:
    def weight(offer: str) -> float:
        by_range = dict(pairs)
        covering = (offer, offer.split("/")[0] + "/*", "*/*")
        return next((float(by_range[media_range]) for media_range in covering if media_range in by_range), 0.0)

    shuffled = random.sample(pairs, len(pairs))
    accept, other = (", ".join(f"{media_range};q={q}" for media_range, q in some) for some in (pairs, shuffled))
    best = max(map(weight, OFFERS))
    if best == 0:
        with pytest.raises(NotAcceptable):
            negotiate(accept, OFFERS)
    else:
        chosen = negotiate(accept, OFFERS)
        assert weight(chosen) == best
        assert negotiate(other, OFFERS) == chosen


@given(st.text(st.characters(max_codepoint=255), max_size=60))
def test_any_header_is_answered_or_refused(accept: str) -> None:
    try:
        assert negotiate(accept, OFFERS) in OFFERS
    except NotAcceptable:
        return


# ETag


@pytest.mark.parametrize(
    "same",
    [
        {"class_label": "one"},
        {"class_label": "1"},
        {"class_label": [1]},
        {"num_images": 1, "sampler": "ddim", "num_inference_steps": 10, "eta": 0.0, "guidance_scale": 2},
        {"eta": -0.0, "guidance_scale": 2.0},
        {"timeout_s": 5},
        {"preview_every": 3},
    ],
    ids=str,
)
def test_requests_that_ask_for_the_same_bytes_have_the_same_etag(same: dict[str, object]) -> None:
    assert etag(planned(**{"class_label": 1, **same}), PNG) == etag(planned(class_label=1), PNG)


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 8},
        {"num_images": 2},
        {"sampler": "ddpm"},
        {"num_inference_steps": 11},
        {"eta": 0.5},
        {"class_label": None},
        {"class_label": 2},
        {"guidance_scale": 3},
    ],
    ids=str,
)
def test_requests_that_ask_for_other_bytes_have_other_etags(other: dict[str, object]) -> None:
    assert etag(planned(**{"class_label": 1, **other}), PNG) != etag(planned(class_label=1), PNG)


def test_an_etag_tells_media_types_and_runtimes_apart() -> None:
    plan = planned()
    other_runtime = replace(SERVED, fingerprint_parts={**SERVED.fingerprint_parts, "torch": "3"})
    other_name = replace(SERVED, model=replace(MODEL, declared_name="letters"))
    tags = [etag(plan, PNG), etag(plan, ZIP), etag(planned(other_runtime), PNG), etag(planned(other_name), PNG)]
    assert len(set(tags)) == 4
    other_folder = replace(SERVED, model=replace(MODEL, name="mine"))
    assert etag(planned(other_folder), PNG) == tags[0]


def test_an_etag_is_strong_and_quoted() -> None:
    tag = etag(planned(), PNG)
    assert tag.startswith('"')
    assert tag.endswith('"')
    assert tag[1:-1].isalnum()


@pytest.mark.parametrize(
    ("if_none_match", "matched"),
    [
        ('"abc"', True),
        ('W/"abc"', True),  # RFC 9110, 13.1.2: weak comparison
        ('"x", "abc"', True),
        ('"x",W/"abc" , "y"', True),
        ("*", True),
        (" * ", True),
        ("", False),
        ('"x"', False),
        ("abc", False),
        ('"ABC"', False),
        ('"abcd"', False),
        ('w/"abc"', False),
        ('"*"', False),
    ],
)
def test_if_none_match_names_an_etag(if_none_match: str, matched: bool) -> None:
    assert matches(if_none_match, '"abc"') is matched


# Bodies


def test_one_image_is_a_png_with_its_recipe() -> None:
    plan, finished = planned(), drawn(1)
    assert body_of(plan, finished, PNG) == encode_png(finished.images[0], plan.recipes[0])


def test_several_images_are_a_contact_sheet() -> None:
    plan, finished = planned(num_images=3), drawn(3)
    assert body_of(plan, finished, PNG) == encode_png(contact_sheet(finished.images), plan.canonical)


def test_each_image_has_the_bytes_that_it_has_alone() -> None:
    finished = drawn(3)
    body = body_of(planned(num_images=3, class_label=[0, None, 2]), finished, ZIP)
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        assert archive.namelist() == ["7.png", "8.png", "9.png"]
        for seed, label, image in zip((7, 8, 9), (0, None, 2), finished.images, strict=True):
            alone = planned(seed=seed, class_label=label)
            expected = body_of(alone, Finished([image], 0, 0), PNG)
            assert archive.read(f"{seed}.png") == expected


def test_a_zip_has_the_same_bytes_at_any_time(monkeypatch: pytest.MonkeyPatch) -> None:
    bodies = []
    for now in (0.0, 2e9):
        monkeypatch.setattr("time.time", lambda now=now: now)
        bodies.append(body_of(planned(num_images=2), drawn(2), ZIP))
    assert bodies[0] == bodies[1]


def test_files_of_a_zip_can_be_read_by_who_unpacks_it() -> None:
    body = body_of(planned(), drawn(1), ZIP)
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        assert archive.testzip() is None
        assert [info.external_attr >> 16 & 0o400 for info in archive.infolist()] == [0o400]


def test_json_has_the_images_the_parameters_the_model_and_the_times() -> None:
    plan, finished = planned(num_images=2, class_label="one"), drawn(2)
    document = json.loads(bytes(answered(plan, finished, JSON).body))
    assert document.keys() == {"images", "parameters", "model", "warnings", "timings"}
    assert [image["seed"] for image in document["images"]] == [7, 8]
    pngs = [base64.b64decode(image["b64_json"]) for image in document["images"]]
    assert pngs == [encode_png(x, recipe) for x, recipe in zip(finished.images, plan.recipes, strict=True)]
    assert document["parameters"] == {
        "num_images": 2,
        "seed": 7,
        "sampler": "ddim",
        "num_inference_steps": 10,
        "eta": 0.0,
        "class_label": 1,
        "guidance_scale": 2.0,
        "guidance_rescale": 0.0,
        "guidance_interval": [0.0, 1.0],
        "height": 4,
        "width": 4,
        "timeout_s": 300,
        "preview_every": 0,
    }
    assert document["model"] == {"name": "digits", "digest": "d" * 64, "fingerprint": SERVED.fingerprint}
    assert document["timings"] == {"queue_s": 0.25, "denoise_s": 1.5, "encode_s": 1.0}


@pytest.mark.parametrize(("media_type", "most"), [(WEBP, 16383), (JPEG, 65535)])
def test_a_sheet_larger_than_its_format_allows_is_refused_before_anything_is_drawn(media_type: str, most: int) -> None:
    model = replace(MODEL, image_shape=(1, 4, most // 2), sample_shape=(1, 4, most // 2))
    wide = replace(SERVED, model=model, groups=(Group(4, most // 2),))
    encoding(planned(wide, num_images=4), media_type, wide)
    with pytest.raises(Invalid) as refusal:
        encoding(planned(wide, num_images=5), media_type, wide)
    [error] = refusal.value.errors
    assert error["loc"] == ["num_images"]
    assert f"5 images make {most // 2 * 3}x8" in error["msg"]
    encoding(planned(wide, num_images=5), PNG, wide)


@pytest.mark.parametrize("media_type", [PNG, WEBP, JPEG, JSON, ZIP, NPY, EVENTS])
def test_the_values_that_an_encoding_tells_grow_with_its_images(media_type: str) -> None:
    """The engine's promises count them."""
    one, nine = (encoding(planned(num_images=n), media_type, SERVED).values for n in (1, 9))
    assert sum(one) > 0
    assert one[0] * 9 + one[1] <= nine[0] * 9 + nine[1]
    assert (nine[0] > 0) == (media_type in (JSON, ZIP, EVENTS))  # these encode each image by itself
    assert (nine[1] > 0) == (media_type != EVENTS)


def test_an_npy_holds_the_image_unrounded() -> None:
    finished = drawn(1)
    body = body_of(planned(), finished, NPY)
    np.testing.assert_array_equal(np.load(io.BytesIO(body)), finished.images[0])
    assert (to_uint8(finished.images[0]) / 255 * 2 - 1 != finished.images[0].transpose(1, 2, 0)).any()


def test_a_response_tells_its_seed_and_its_times() -> None:
    plan, finished = planned(), drawn(1)
    response = answered(plan, finished, PNG)
    assert response.body == body_of(plan, finished, PNG)
    assert response.headers["Content-Type"] == PNG
    assert response.headers["X-Seed"] == "7"
    assert response.headers["Server-Timing"] == "queue;dur=250.00, denoise;dur=1500.00, encode;dur=1000.00"
    assert response.headers["Vary"] == "Accept"


def test_of_latent_diffusion_the_time_of_decoding_is_told() -> None:
    plan, finished = planned(LATENT), drawn(1)._replace(decode_s=0.5)
    response = answered(plan, finished, JSON, LATENT)
    timings = json.loads(bytes(response.body))["timings"]
    assert timings == {"queue_s": 0.25, "denoise_s": 1.5, "decode_s": 0.5, "encode_s": 1.0}
    parts = "queue;dur=250.00, denoise;dur=1500.00, decode;dur=500.00, encode;dur=1000.00"
    assert response.headers["Server-Timing"] == parts
