"""Requests with an image: their plans, their refusals, their recipes, and their way through the engine."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from model.rows import Condition, Group, Image, Moments, Row
from model.samplers import sample_table
from service.build import probe_row
from service.engine.bounds import MARGIN, SHARED
from service.engine.engine import Engine
from service.engine.fairness import Places
from service.engine.requests import Upload
from service.errors import Invalid
from service.http.png import to_uint8
from service.plan.entries import table
from service.plan.fields import DenoiseRequest, Sample, SampleRequest
from service.plan.pictures import Original, Picture
from service.plan.plan import Plan, plan_denoise, plan_sample
from service.plan.served import Served
from tests.engines import (
    FakeEncoding,
    Recorder,
    a_decoded,
    a_row,
    a_start,
    an_image,
    images_of,
    pixels,
    warm_latent,
    warm_text,
)
from tests.properties import examples
from tests.servers import PATIENCE
from tests.test_responses import LATENT, SERVED
from tests.texts import XL
from tests.trajectories import description_of, runner_on, small_network, torch_backend

RNG = np.random.default_rng(3)
IMAGE = RNG.uniform(-1, 1, (1, 4, 4)).astype(np.float32)
MASK = np.arange(16).reshape(4, 4) % 3 > 0
INPAINTS = replace(LATENT, model=replace(LATENT.model, inpaints=True))
SIZES = replace(SERVED, groups=(Group(4, 4), Group(4, 8)))


def a_picture(has_mask: bool = False, image: Image = IMAGE, mask: NDArray[np.bool_] = MASK) -> Picture:
    return Picture(image, "1" * 64, mask if has_mask else None, "2" * 64 if has_mask else None)


PLAIN, MASKED = a_picture(), a_picture(has_mask=True)


def planned(picture: Picture | None, served: Served = SERVED, latent: bool = False, **fields: Any) -> Plan:
    return plan_sample(SampleRequest(**{"seed": 7, **fields}), served, 300, latent, picture)


# Steps.


@pytest.mark.parametrize(
    ("sampler", "steps", "strength", "begin"),
    [
        ("ddim", 50, 0.58, 22),  # 50 · 0.58 is 28.999999999999996, and the pipelines cut it
        ("euler", 10, 0.25, 8),
        ("dpmpp_2m", 4, 1.0, 0),
        ("pndm", 3, 0.34, 2),
        ("lcm", 4, 0.5, 25),  # of the teacher's 50: all four steps are taken
    ],
)
def test_a_strength_takes_the_last_steps(sampler: str, steps: int, strength: float, begin: int) -> None:
    [row] = planned(PLAIN, sampler=sampler, num_inference_steps=steps, strength=strength).rows
    expected = sample_table(SERVED.model.schedule, sampler, steps, begin=begin)
    assert np.array_equal(row.table.timesteps, expected.timesteps)
    assert np.array_equal(row.table.levels, expected.levels)
    assert row.table.timesteps[0] < 999 or strength == 1


def test_listed_timesteps_are_left_out_alike() -> None:
    plan = planned(PLAIN, timesteps=[900, 700, 400, 100], strength=0.5)
    assert plan.rows[0].table.timesteps.tolist() == [400, 100]
    assert plan.parameters["strength"] == 0.5


@pytest.mark.parametrize(("picture", "strength"), [(PLAIN, 0.8), (MASKED, 1.0)])
def test_a_strength_has_the_pipelines_default(picture: Picture, strength: float) -> None:
    assert planned(picture).parameters["strength"] == strength


# What rows begin from.


def test_images_of_pixel_models_are_their_own_latents() -> None:
    for picture, from_noise in ((PLAIN, False), (MASKED, True)):
        plan = planned(picture, num_images=2)
        assert plan.to_encode == ()
        source, other = (row.source for row in plan.rows)
        assert source is not None
        assert source is other
        assert source.image == Moments(IMAGE, None)
        assert (source.mask is None) == (picture is PLAIN)
        assert source.from_noise == from_noise
    [row] = planned(MASKED, strength=0.99).rows
    assert row.source is not None
    assert not row.source.from_noise


@pytest.mark.parametrize(
    ("served", "picture", "strength", "encoded"),
    [
        (LATENT, PLAIN, 1, ["image"]),
        (LATENT, MASKED, 1, ["image"]),
        (INPAINTS, MASKED, 1, ["masked"]),
        (INPAINTS, MASKED, 0.5, ["image", "masked"]),
    ],
)
def test_the_vae_encodes_what_rows_begin_from(
    served: Served, picture: Picture, strength: float, encoded: list[str]
) -> None:
    plan = planned(picture, served, strength=strength, num_images=2)
    images = {"image": IMAGE, "masked": np.where(MASK, 0, IMAGE)}
    assert len(plan.to_encode) == len(encoded)
    assert all(np.array_equal(one, images[name]) for one, name in zip(plan.to_encode, encoded, strict=True))
    assert all(row.source is None for row in plan.rows)
    moments = [Moments(np.full((2, 2, 2), i, np.float32)) for i in range(len(encoded))]
    for row in plan.begun(moments):
        assert row.source is not None
        assert {name: getattr(row.source, name) for name in encoded} == dict(zip(encoded, moments, strict=True))
        if picture is MASKED:
            assert np.array_equal(row.source.mask, MASK[::2, ::2])  # type: ignore[arg-type]


# Refusals.


@pytest.mark.parametrize(
    ("picture", "served", "fields", "said"),
    [
        (None, SERVED, {"strength": 0.5}, "strength: must be null without an image, and is 0.5"),
        (None, SERVED, {"fit": "crop"}, "fit: must be stretch without an image, and is crop"),
        (None, SERVED, {"paste_original": True}, "paste_original: must be false without an image, and is true"),
        (PLAIN, SERVED, {"paste_original": True}, "paste_original: must be false without a mask_image"),
        (PLAIN, SERVED, {"strength": 0.09}, "strength: must be at least 0.1 to take one of 10 steps, and is 0.09"),
        (
            PLAIN,
            SERVED,
            {"strength": 0.01, "sampler": "lcm"},
            "strength: must be at least 0.02 to take one of 50 steps, and is 0.01",
        ),
        (
            PLAIN,
            SERVED,
            {"strength": 0.1, "sampler": "lcm"},
            "num_inference_steps: 10 steps are more than original_inference_steps, which is 50, of which 5 are left",
        ),
        (
            None,
            INPAINTS,
            {},
            "image: is required, with mask_image: this network draws a part of an image anew, and nothing else",
        ),
        (
            PLAIN,
            INPAINTS,
            {},
            "mask_image: is required: this network draws a part of an image anew, and nothing else",
        ),
        (PLAIN, SIZES, {"width": 8}, "width: must be that of 4x4 (width x height), and is 8"),
        (
            a_picture(image=np.zeros((1, 8, 8), np.float32)),
            SIZES,
            {},
            "image: must become 4x4 or 8x4 (width x height), and is 8x8",
        ),
    ],
)
def test_what_is_refused(picture: Picture | None, served: Served, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(Invalid) as refused:
        planned(picture, served, **fields)
    assert str(refused.value) == said


def test_a_network_that_inpaints_denoises_nothing() -> None:
    with pytest.raises(Invalid, match=r"^image: cannot be denoised: this network draws a part of an image anew"):
        plan_denoise(DenoiseRequest(5), np.zeros((2, 2, 2), np.float32), INPAINTS, 300)


def test_the_original_is_not_pasted_over_latents() -> None:
    assert planned(MASKED, LATENT, paste_original=True).rows[0].finish is not None
    with pytest.raises(Invalid, match=r"^paste_original: must be false where latents are answered$"):
        planned(MASKED, LATENT, latent=True, paste_original=True)


# Recipes.


@st.composite
def asked(draw: st.DrawFn) -> tuple[Picture, dict[str, Any]]:
    """Few values, so that two requests often mean the same."""
    picture = draw(st.sampled_from((PLAIN, MASKED, replace(PLAIN, image_sha256="3" * 64))))
    return picture, {
        "strength": draw(st.sampled_from((None, 0.5, 0.8, 1))),
        "fit": draw(st.sampled_from(("stretch", "crop"))),
        "paste_original": picture is MASKED and draw(st.booleans()),
        "num_images": draw(st.integers(1, 2)),
        "sampler": draw(st.sampled_from((None, "euler"))),
        "width": draw(st.sampled_from((None, 4))),
    }


def begins(plan: Plan) -> object:
    """All that an image decides of a plan's rows."""
    sources = [row.source for row in plan.begun()]
    return [(row.seed, row.table.timesteps.tobytes(), row.finish is not None) for row in plan.rows], [
        (source.mask is not None, source.from_noise) for source in sources if source is not None
    ]


@examples(200)
@given(asked(), asked())
def test_a_recipe_with_its_image_draws_it_again(one: tuple[Picture, Any], other: tuple[Picture, Any]) -> None:
    """Requests have one canonical form exactly where they draw the same."""
    plans = [planned(picture, SIZES, **fields) for picture, fields in (one, other)]
    for (picture, _), plan in zip((one, other), plans, strict=True):
        assert plan.recipes[0]["image_sha256"] == picture.image_sha256
        assert ("mask_sha256" in plan.recipes[0]) == (picture.mask is not None)
        for row, recipe in zip(plan.rows, plan.recipes, strict=True):
            fields = {name: value for name, value in json.loads(json.dumps(recipe)).items() if name in table(Sample)}
            alone = planned(picture, SIZES, **fields)
            assert alone.recipes == [recipe]
            assert begins(alone)[0] == [begins(replace(plan, rows=[row]))[0][0]]  # type: ignore[index]
    same = (begins(plans[0]), plans[0].recipes) == (begins(plans[1]), plans[1].recipes)
    assert (plans[0].canonical == plans[1].canonical) == same


def test_without_an_image_recipes_and_parameters_say_nothing_of_one() -> None:
    plan = planned(None, XL)
    names = {"strength", "fit", "paste_original", "image_sha256", "mask_sha256"}
    assert not names & {*plan.parameters, *plan.recipes[0], *plan.canonical}


# Pasting.


@examples(100)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 40), st.integers(1, 400))
def test_a_pasted_image_is_the_original_outside_of_the_mask_byte_for_byte(
    seed: int, height: int, width: int, kept: int
) -> None:
    rng = np.random.default_rng(seed)
    levels = rng.integers(0, 256, (3, height, width), np.uint8)
    original: Image = (levels / np.float32(255) * np.float32(2) - np.float32(1)).astype(np.float32)
    mask = np.ones((height, width), bool)
    mask.flat[rng.integers(0, height * width, kept // 10 + 1)] = False
    drawn = rng.uniform(-1.2, 1.2, original.shape).astype(np.float32)
    pasted = Original(original, mask).pasted(drawn)
    assert pasted.dtype == np.float32
    assert np.array_equal(to_uint8(pasted)[~mask], levels.transpose(1, 2, 0)[~mask])
    rows, columns = np.indices(mask.shape)
    away = np.min([np.maximum(abs(rows - y), abs(columns - x)) for y, x in np.argwhere(~mask)], axis=0)
    assert np.array_equal(pasted[:, away > 8], drawn[:, away > 8])
    share = np.minimum(away / 9, 1)
    np.testing.assert_allclose(pasted, share * drawn + (1 - share) * original, rtol=0, atol=1e-6)


# The engine.


def test_rows_of_one_request_share_what_is_encoded_once() -> None:
    """Two images, three rows. Both uploads are counted and promised."""
    got: list[Sequence[Moments]] = []

    def then(latents: Sequence[Moments]) -> tuple[list[Row], None]:
        got.append(latents)
        second = float(latents[1].mean.flat[1])
        return [a_start(seed, second) for seed in (4, 5, 6)], None

    with warm_latent(4) as s:
        calls = len(s.vae.calls)
        plain = s.accept(*[a_start(seed, 0) for seed in (1, 2, 3)])
        plain.future.result(PATIENCE)
        uploads = Upload([pixels(1, 1), pixels(2, 3)], then)
        job = s.accept(*[a_start(seed, 0) for seed in (4, 5, 6)], upload=uploads)
        assert images_of(job.future) == [an_image(seed, 3) for seed in (4, 5, 6)]
        encoded = [call.seeds for call in s.vae.calls[calls:] if call.name == "encode"]
        assert encoded == [[1], [2]]
        waits = (2 * 1.0 + 0.0) * SHARED * (1 + MARGIN)
        assert job.promise_s >= plain.promise_s + waits
    assert [[one.mean.flat[0] for one in latents] for latents in got] == [[1, 2]]
    assert s.is_empty()


def test_what_is_checked_and_answered_is_the_finished_image() -> None:
    with warm_text(4, check_seconds=0.5) as s:
        row = replace(a_row(3), finish=lambda image: image + np.float32(4))
        encoding = FakeEncoding()
        [image] = s.submit(row, encoding=encoding).result(PATIENCE).images
        assert image.tolist() == [[[7, 5]]]
        assert s.check.calls[-1] == 7


def test_an_image_that_cannot_be_finished_fails_alone() -> None:
    def fail(image: Image) -> Image:
        raise MemoryError

    with warm_latent(4) as s:
        broken, good = s.submit(replace(a_row(1), finish=fail)), s.submit(a_row(2))
        assert "could not be finished" in str(broken.exception(PATIENCE))
        assert images_of(good) == [a_decoded(2, 1)]
    assert s.is_empty()


def test_rows_from_images_with_masks_and_from_noise_have_their_own_bytes_in_a_crowd() -> None:
    """40 of 40: requests of all three kinds, of different strengths and samplers, share passes."""
    network = small_network()
    model = replace(description_of(network, (3, 8, 8)), num_classes=5, no_label=5)
    backend = torch_backend(network, (3, 8, 8), "float32", 8)
    group = model.group
    served = replace(SERVED, model=model, groups=(group,))

    def plan_of(i: int) -> Plan:
        rng = np.random.default_rng(i % 5)
        image = rng.uniform(-1, 1, (3, 8, 8)).astype(np.float32)
        picture = None if i % 3 == 0 else a_picture(i % 3 == 2, image, rng.random((8, 8)) < 0.6)
        fields: dict[str, Any] = {"num_inference_steps": 4 + i % 3}
        if picture is not None:
            fields |= {"strength": (0.4, 0.7, 1.0)[i % 4 % 3], "paste_original": i % 6 == 2}
        if i % 2:
            fields |= {"class_label": i % 5, "guidance_scale": 3.0}
        sampler = ("ddim", "euler_a", "dpmpp_2m", "pndm", "ddpm")[i % 5]
        return planned(picture, served, seed=i, sampler=sampler, **fields)

    runner = runner_on(backend, (3, 8, 8), 8, network)
    engine = Engine({group: runner}, {group: probe_row(model, group, Condition())}, Places(64), Recorder())

    def drawn(plans: list[Plan]) -> list[bytes]:
        jobs = [engine.submit(plan.rows, 300, "alice").future for plan in plans]
        return [job.result(PATIENCE).images[0].tobytes() for job in jobs]

    engine.start()
    try:
        assert engine.wait_loaded(PATIENCE)
        plans = [plan_of(i) for i in range(40)]
        alone = [image for plan in plans for image in drawn([plan])]
        crowd = drawn(plans)
    finally:
        engine.close()
    assert [i for i in range(40) if alone[i] != crowd[i]] == []
    assert len(set(alone)) == 40
