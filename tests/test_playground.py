"""The playground in a real browser, on running servers."""

import io
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, Route, expect

from model.description import Distilled, ModelDescription
from model.samplers import SAMPLERS
from service.plan import pictures
from service.plan.entries import table
from service.plan.fields import SampleRequest
from service.plan.micro_conditions import NOTHING
from service.plan.recommended import Wanted, applied
from tests.browser import GONE, REFUSED, assert_accessible, chromium, visiting
from tests.latents import LatentServer
from tests.local import MODEL, SERVED, FakeServer, LocalServer, locally, no_complaints, serving_fake, serving_here
from tests.pipelines import write_pipeline
from tests.servers import (
    PATIENCE,
    Json,
    Reachable,
    ServerProcess,
    needs,
    problem,
    read_npy,
    read_parameters,
    read_png,
    write_npy,
    write_weights,
)
from tests.test_denoise import post
from tests.texts import like_lcm, like_xl, serving_text, tokenize_twice, with_text

pytestmark = [needs("chromium"), pytest.mark.slow]

DESK = {"width": 1280, "height": 800}
PHONE = {"width": 360, "height": 640}

expect.set_options(timeout=1000 * PATIENCE)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeServer]:
    with serving_fake(max_queue=4, timeout=10_000) as server:
        yield server


@pytest.fixture
def local(fake: FakeServer) -> Iterator[FakeServer]:
    """A server in this process, whose passes a test can hold. At the end it must be idle."""
    yield fake
    fake.runner.let_go()
    assert fake.engine.wait_idle(PATIENCE)


@contextmanager
def playing(browser: Browser, server: Reachable, *expected: str, path: str = "/", **options: Any) -> Iterator[Page]:
    """The playground, ready. The console may only have messages that begin like `expected`."""
    options = {"viewport": DESK, **options}
    with visiting(browser, server.url + path, expected, **options) as page:
        expect(page.locator(".view:not([hidden])")).to_be_visible()
        yield page


def choose(page: Page, group: str, name: str) -> None:
    view(page).get_by_role("group", name=group).get_by_label(name, exact=True).click()


def view(page: Page) -> Locator:
    return page.locator(".view:not([hidden])")


def go(page: Page, name: str) -> None:
    """Open another view."""
    page.get_by_role("link", name=name).click()
    expect(page.locator(f"#view-{name.lower()}")).to_be_visible()


def draw(page: Page, **fields: object) -> None:
    """Set fields by their labels, and press Draw."""
    for label, value in fields.items():
        fill(page, label, value)
    press(page, "Draw")


def fill(page: Page, label: str, value: object) -> None:
    number = view(page).get_by_label(f"{label}, as a number")
    (number if number.count() else view(page).get_by_label(label, exact=True)).fill(str(value))


def press(page: Page, name: str) -> None:
    view(page).get_by_role("button", name=name, exact=True).click()


def finished(page: Page) -> Locator:
    """The status text, once drawing has finished."""
    expect(view(page).locator(".progress")).to_have_attribute("data-state", "done")
    return view(page).locator(".doing")


def bar(page: Page) -> float:
    """The progress bar's value, of 1."""
    return float(view(page).get_by_role("progressbar").get_attribute("value") or 0)


def trouble(page: Page) -> Locator:
    return view(page).locator(".stage > .trouble")


def cards(page: Page) -> Locator:
    return page.locator("#gallery .card")


def opened(page: Page, card: Locator) -> Locator:
    card.click()
    viewer = page.get_by_role("dialog")
    expect(viewer).to_be_visible()
    return viewer


def saved(page: Page, viewer: Locator) -> bytes:
    """The file that the viewer's link downloads."""
    with page.expect_download() as download:
        viewer.get_by_role("link", name="Download").click()
    return Path(download.value.path()).read_bytes()


def link(server: Reachable, viewer: Locator) -> bytes:
    """The image that the viewer's link draws."""
    address = viewer.get_by_label("Draws the same bytes").input_value()
    assert address.startswith(f"{server.url}/sample?")
    assert f"model={server.client.get('/info').json()['fingerprint']}" in address
    return server.client.get(address).content


def pixels(image: Locator) -> NDArray[np.uint8]:
    """The red channel of an image in the browser, [H, W]."""
    values, height, width = image.evaluate(
        """image => image.decode().then(() => {
            const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight);
            const context = canvas.getContext("2d");
            context.drawImage(image, 0, 0);
            const {data} = context.getImageData(0, 0, canvas.width, canvas.height);
            return [Array.from(data).filter((_, i) => i % 4 === 0), canvas.height, canvas.width];
        })"""
    )
    return np.array(values, np.uint8).reshape(height, width)


# Drawing.


def test_an_image_has_the_bytes_of_the_api(browser: Browser, server: ServerProcess) -> None:
    with playing(browser, server) as page:
        choose(page, "Class", "dog")
        draw(page, Seed=7)
        expect(finished(page)).to_have_text(re.compile(r"^1 image in \d"))
        expect(view(page).get_by_role("button", name="dog, seed 7: details")).to_be_enabled()
        viewer = opened(page, cards(page).first)
        assert viewer.locator("dd").all_inner_texts()[:4] == ["7", "DPM-Solver++ 2M", "4", "2"]
        file = saved(page, viewer)
        assert file == server.client.get("/sample?seed=7&class_label=dog").content
        assert file == link(server, viewer)


def test_settings_are_those_of_the_request(browser: Browser, server: ServerProcess) -> None:
    with playing(browser, server) as page:
        choose(page, "Class", "7")
        view(page).get_by_label("Sampler").select_option(label="DDIM")
        draw(page, Seed=5, Images=3, Steps=6, Guidance=1.5, Eta=0.5)
        finished(page)
        expect(cards(page)).to_have_count(3)
        viewer = opened(page, cards(page).first)  # the newest card shows the last image
        asked = {
            "seed": 7,
            "sampler": "ddim",
            "num_inference_steps": 6,
            "eta": 0.5,
            "class_label": 2,
            "guidance_scale": 1.5,
        }
        file = saved(page, viewer)
        assert file == server.client.post("/sample", json=asked).content == link(server, viewer)


def test_every_field_has_a_control(browser: Browser, server: ServerProcess) -> None:
    """Also for fields that the page does not know: the controls are made from /openapi.json."""
    with playing(browser, server, REFUSED) as page:
        absent = {
            "height",
            "width",
            "prompt",
            "negative_prompt",
            "emphasis",
            "clip_skip",
            *NOTHING,
        }  # one size, no text
        for shown, has_not in (("Image", absent), ("Draw", absent | {*pictures.NOTHING})):
            go(page, shown)
            controls = view(page).locator("form [data-field]")
            names = controls.evaluate_all("all => all.map(one => one.dataset.field)")
            assert sorted(names) == sorted(table(SampleRequest).keys() - has_not)
        view(page).get_by_text("More", exact=True).click()
        draw(page, **{"Seed": 7, "Time limit": 1000})
        limit = view(page).locator("[data-field=timeout_s]")
        expect(limit.locator(".complaint")).to_have_text("Time limit must be more than 0 and at most 300, and is 1000.")
        draw(page, **{"Time limit": 250})
        finished(page)
        expect(cards(page)).to_have_count(3)  # one image for each class


def test_timesteps_are_typed_in(browser: Browser, server: ServerProcess) -> None:
    """The control, the facts and the link follow the server's description."""
    with playing(browser, server) as page:
        choose(page, "Class", "Any")
        view(page).get_by_text("More", exact=True).click()
        draw(page, Seed=7, Timesteps="900, 300")
        finished(page)
        viewer = opened(page, cards(page).first)
        expect(viewer.locator("dl")).to_contain_text("Timesteps900,300")
        file = saved(page, viewer)
        assert file == server.client.post("/sample", json={"seed": 7, "timesteps": [900, 300]}).content
        assert file == link(server, viewer)
        viewer.get_by_role("button", name="Again").click()
        finished(page)
        expect(view(page).get_by_label("Timesteps", exact=True)).to_have_value("900,300")


def test_recommended_timesteps_give_way_to_a_number_of_steps(browser: Browser) -> None:
    """And to a recipe with a number, even the recommended one: "Again" draws the same image."""

    def listing(model: ModelDescription) -> ModelDescription:
        return applied(with_text(model), Wanted("lcm", timesteps=(900, 500, 100)))

    with serving_text(like=listing) as lcm, playing(browser, lcm) as page:
        view(page).get_by_text("More", exact=True).click()
        timesteps = view(page).get_by_label("Timesteps", exact=True)
        expect(timesteps).to_have_value("900,500,100")
        asked: tuple[tuple[Json, Json], ...] = (
            ({}, {}),
            ({"Steps": 2}, {"num_inference_steps": 2}),
            ({"Steps": 3}, {"num_inference_steps": 3}),
        )
        for number, (fields, meant) in enumerate(asked):
            draw(page, Prompt="a", Seed=7, **fields)
            expect(cards(page)).to_have_count(number + 1)
            finished(page)
            viewer = opened(page, cards(page).first)
            assert saved(page, viewer) == lcm.client.post("/sample", json={"seed": 7, "prompt": "a", **meant}).content
            expect(timesteps).to_have_value("" if fields else "900,500,100")
            viewer.get_by_role("button", name="Again").click()
            finished(page)
            expect(cards(page)).to_have_count(number + 1)  # the same image


def test_eta_is_there_where_the_sampler_takes_it(browser: Browser, server: ServerProcess) -> None:
    with playing(browser, server) as page:
        for sampler, takes in (("ddim", True), ("ddpm", False), ("dpmpp_2m", False)):
            view(page).get_by_label("Sampler").select_option(sampler)
            expect(view(page).get_by_label("Eta", exact=True)).to_be_visible(visible=takes)
        view(page).get_by_label("Sampler").select_option("ddim")
        fill(page, "Eta", 1)
        view(page).get_by_label("Sampler").select_option("ddpm")
        draw(page)
        finished(page)  # a hidden field is not sent


def test_one_of_each_class_is_drawn(browser: Browser, server: ServerProcess) -> None:
    with playing(browser, server) as page:
        choose(page, "Class", "One of each")
        expect(view(page).get_by_label("Images", exact=True)).to_be_disabled()
        draw(page, Seed=3)
        expect(finished(page)).to_have_text(re.compile("^3 images"))
        for seed, name in enumerate(("cat", "dog", "7"), start=3):
            expect(view(page).get_by_role("button", name=f"{name}, seed {seed}: details")).to_be_enabled()
        for card, shown in zip(cards(page).all(), ("7 seed 5", "dog seed 4", "cat seed 3"), strict=True):
            expect(card).to_have_accessible_name(re.compile(f"^{shown} DPM-Solver"))
        expected = server.client.get("/sample?seed=4&class_label=dog").content
        assert saved(page, opened(page, cards(page).nth(1))) == expected


def test_one_of_several_sizes_is_drawn_and_denoised(browser: Browser, weights: Path) -> None:
    """The default is not the size of the weights, so recipes leave out the other one."""
    with (
        serving_here(weights=str(weights / "grey"), sizes="32x16,16x16", max_batch=4) as server,
        playing(browser, server) as page,
    ):
        choose(page, "Class", "dog")
        tile = view(page).locator(".tile .picture")
        for name, (width, height) in {"32×16": (32, 16), "16×16": (16, 16)}.items():
            choose(page, "Size", name)
            draw(page, Seed=7)
            expect(finished(page)).to_have_text(re.compile("^1 image"))
            box = tile.bounding_box()
            assert box is not None
            assert box["width"] / box["height"] == pytest.approx(width / height, rel=0.05)
            viewer = opened(page, cards(page).first)
            file = saved(page, viewer)
            assert file == server.client.get(f"/sample?seed=7&class_label=dog&width={width}&height={height}").content
            assert link(server, viewer) == file
            viewer.get_by_role("button", name="Again").click()
            finished(page)
            assert view(page).get_by_role("group", name="Size").get_by_label(name, exact=True).is_checked()
            expect(cards(page)).to_have_count(1 if name == "32×16" else 2)
            opened(page, cards(page).first).get_by_role("button", name="Denoise").click()
            expect(page.locator("#view-denoise")).to_be_visible()
            finished(page)
            assert pixels(view(page).locator(".mended img")).shape == (height, width)
            go(page, "Draw")


def test_guidance_is_for_a_part_of_the_steps(browser: Browser, server: ServerProcess) -> None:
    with playing(browser, server, REFUSED) as page:
        choose(page, "Class", "dog")
        view(page).get_by_text("More", exact=True).click()
        draw(page, Seed=7, **{"Guidance interval": "0.25, 0.75"})
        finished(page)
        viewer = opened(page, cards(page).first)
        file = saved(page, viewer)
        assert file == server.client.get("/sample?seed=7&class_label=dog&guidance_interval=0.25,0.75").content
        assert link(server, viewer) == file
        expect(viewer.locator("dl")).to_contain_text("Guidance interval0.25,0.75")
        page.keyboard.press("Escape")
        draw(page, **{"Guidance interval": "0.75 0.25"})
        expect(view(page).get_by_text("Guidance interval must not fall, and is 0.75 to 0.25.").first).to_be_visible()


def test_defaults_and_ranges_are_those_of_info(
    browser: Browser, server: ServerProcess, rgb_server: ServerProcess
) -> None:
    with playing(browser, server) as page:
        assert view(page).get_by_label("Sampler").input_value() == "dpmpp_2m"
        ranges = {"Steps": ("4", "1", "1000"), "Guidance": ("2", "1", "30"), "Images": ("1", "1", "64")}
        for label, (value, *ends) in ranges.items():
            number = view(page).get_by_label(f"{label}, as a number")
            assert number.input_value() == value
            assert [number.get_attribute(name) for name in ("min", "max")] == ends
        expect(page.locator("footer")).to_contain_text("grey on cpu, float32 · Stepwise")
    with playing(browser, rgb_server) as page:  # a model without classes
        assert view(page).get_by_label("Steps, as a number").get_attribute("max") == "20"
        expect(view(page).get_by_role("group", name="Class")).to_have_count(0)
        expect(view(page).get_by_label("Guidance", exact=True)).to_have_count(0)
        draw(page, Seed=7)
        finished(page)
        assert saved(page, opened(page, cards(page).first)) == rgb_server.client.get("/sample?seed=7").content


def test_distilled_weights_have_but_a_few_numbers_of_steps(browser: Browser) -> None:
    distilled = replace(SERVED, model=replace(MODEL, distilled=Distilled("ddim", (4, 2, 1))))
    server = FakeServer(served=distilled)
    with no_complaints(), locally(server):
        assert server.engine.wait_loaded(PATIENCE)
        with playing(browser, server) as page:
            choose(page, "Steps", "2")
            draw(page, Seed=7)
            finished(page)
            assert read_parameters(saved(page, opened(page, cards(page).first)))["num_inference_steps"] == 2
            page.keyboard.press("Escape")
            page.get_by_role("link", name="Compare").click()
            press(page, "Compare")
            expect(finished(page)).to_have_text(re.compile("^3 images of seed"))


def test_many_classes_are_a_list_and_some_models_know_labels_only(browser: Browser) -> None:
    """In a model trained only with labels, the seed chooses the class of an image without a label."""
    names = (*(f"class no. {i}" for i in range(99)), "0")  # the last name looks like another class's index
    model = replace(MODEL, num_classes=100, no_label=None, class_names=names)
    server = FakeServer(served=replace(SERVED, model=model))
    with no_complaints(), locally(server):
        assert server.engine.wait_loaded(PATIENCE)
        with playing(browser, server, REFUSED) as page:
            classes = view(page).get_by_label("Class", exact=True)
            assert classes.locator("option").count() == 101  # with so many classes, "One of each" is not offered
            draw(page, Seed=7)
            finished(page)
            viewer = opened(page, cards(page).first)
            assert read_parameters(file := saved(page, viewer))["class_label"] is not None
            assert file == link(server, viewer)
            page.keyboard.press("Escape")
            for label in (0, 99):
                classes.select_option(value=str(label))
                draw(page, Seed=8 + label)
                expect(cards(page).first).to_contain_text(f"seed {8 + label}")
                viewer = opened(page, cards(page).first)
                assert read_parameters(file := saved(page, viewer))["class_label"] == label
                assert file == link(server, viewer)
                page.keyboard.press("Escape")
            draw(page, Guidance=2)
            expect(trouble(page)).to_have_text(
                "Guidance must be at most 1: this model was trained with labels only; it is 2."
            )


def test_progress_previews_and_times_are_seen_while_it_is_drawn(browser: Browser, local: FakeServer) -> None:
    with playing(browser, local) as page:
        local.runner.hold()
        choose(page, "Class", "Any")
        draw(page, Seed=64)
        assert local.runner.next_pass() == [(64, 0)]
        when = view(page).locator(".when")
        expect(view(page).locator(".doing")).to_have_text("Starting")
        expect(when).to_have_text("about 4.0 s, at most 8.0 s")
        tile = view(page).locator(".tile")
        expect(tile).to_have_count(1)
        expect(tile.locator("img")).to_be_hidden()
        for step in range(1, 4):
            local.runner.next_pass()
            expect(view(page).locator(".doing")).to_have_text(f"Step {step} of 4")
            expect(when).to_have_text(re.compile(rf"about {4 - step}\.0 s left, at most \d\.\d s"))
            expect(tile.locator("img")).to_be_visible()  # the preview
            expect(tile).to_be_disabled()
            assert bar(page) == pytest.approx(step / 4, abs=0.01)  # a little is for the PNG
        local.runner.let_go()
        expect(finished(page)).to_have_text("1 image in 4.0 s")
        expect(tile).to_be_enabled()
        assert saved(page, opened(page, cards(page).first)) == local.client.get("/sample?seed=64").content


def test_images_are_counted_where_there_are_several(browser: Browser, local: FakeServer) -> None:
    with playing(browser, local) as page:
        local.runner.hold()
        choose(page, "Class", "Any")
        draw(page, Seed=64, Images=2)
        for _ in range(2):
            assert local.runner.next_pass() == [(64, 0), (65, 0)]
        expect(view(page).locator(".doing")).to_have_text("0 of 2 images")
        assert bar(page) == pytest.approx(1 / 4, abs=0.01)
        local.runner.let_go()
        expect(finished(page)).to_have_text("2 images in 4.0 s")
        assert bar(page) == 1


def test_the_place_in_line_is_told_and_cancelling_frees_it(browser: Browser, local: FakeServer) -> None:
    def cancelled() -> float:
        return local.metric("stepwise_cancelled_total", reason="disconnect")

    with playing(browser, local) as page, ThreadPoolExecutor(1) as pool:
        before = cancelled()
        local.runner.hold()
        first = pool.submit(local.client.post, "/sample", json={"seed": 1, "num_inference_steps": 3})
        assert local.runner.next_pass() == [(1, 0)]
        choose(page, "Class", "Any")
        draw(page, Seed=2, Steps=20, Images=4)
        expect(view(page).locator(".doing")).to_have_text("Waiting: 1 request goes first")
        expect(page.locator("#status")).to_have_text(re.compile("^Waiting: 1 request goes first, about "))
        press(page, "Cancel")
        expect(view(page).locator(".doing")).to_have_text("Cancelled")
        expect(trouble(page)).to_be_empty()
        local.wait_for_metric("stepwise_cancelled_total", lambda count: count >= before + 1, reason="disconnect")
        local.runner.let_go()
        assert first.result().status_code == 200
        assert local.engine.wait_idle(PATIENCE)
        assert not {2, 3, 4, 5} & set(local.runner.admitted)
        draw(page, Seed=6, Steps=1, Images=1)
        expect(finished(page)).to_have_text(re.compile("^1 image in"))
        assert cancelled() == before + 1


# The gallery.


def test_again_vary_and_clear(browser: Browser, server: ServerProcess) -> None:
    with playing(browser, server) as page:
        choose(page, "Class", "cat")
        draw(page, Seed=7, Steps=3, Guidance=3)
        finished(page)
        viewer = opened(page, cards(page).first)
        before = saved(page, viewer)
        viewer.get_by_role("button", name="Vary").click()
        expect(cards(page)).to_have_count(2)
        finished(page)
        varied = read_parameters(file := saved(page, viewer := opened(page, cards(page).first)))
        assert varied.pop("seed") != 7
        assert varied == {name: value for name, value in read_parameters(before).items() if name != "seed"}
        assert file == link(server, viewer)

        viewer.get_by_role("button", name="Older").click()
        assert saved(page, viewer) == before
        viewer.get_by_role("button", name="Again").click()
        expect(view(page).get_by_label("Seed", exact=True)).to_have_value("7")
        finished(page)
        expect(view(page).get_by_role("button", name="cat, seed 7: details")).to_be_enabled()
        expect(cards(page)).to_have_count(2)  # the same image appears only once
        page.locator("#gallery").get_by_role("button", name="Clear").click()
        expect(page.locator("#gallery")).to_be_hidden()


def test_the_link_opens_the_image(browser: Browser, server: ServerProcess) -> None:
    with playing(browser, server) as page:
        draw(page, Seed=7)
        finished(page)
        viewer = opened(page, cards(page).first)
        with page.expect_popup() as popup:
            viewer.get_by_role("link", name="Open").click()
        popup.value.wait_for_load_state()
        assert popup.value.url == viewer.get_by_label("Draws the same bytes").input_value()
        viewer.get_by_role("button", name="Copy").click()
        expect(viewer.get_by_role("status")).to_have_text(re.compile("^(Copied|Selected)"))


# Comparing.


def test_one_seed_under_several_samplers_and_steps(browser: Browser, server: ServerProcess) -> None:
    with playing(browser, server, path="/#compare") as page:
        choose(page, "Class", "dog")
        for button in page.get_by_role("group", name="Samplers", exact=True).locator("label").all():
            if button.inner_text() not in ("DDIM", "DDPM"):
                button.click()  # switches it off; all are on at first
        fill(page, "Seed", 7)
        fill(page, "Steps", "2, 5 2")
        fill(page, "Guidance", 1)
        press(page, "Compare")
        expect(finished(page)).to_have_text("4 images of seed 7")
        table = view(page).get_by_role("table")
        assert table.locator("thead th").all_inner_texts() == ["2 steps", "5 steps"]
        assert table.locator("tbody th").all_inner_texts() == ["DDIM", "DDPM"]
        for row, sampler in enumerate(("ddim", "ddpm")):
            for column, steps in enumerate((2, 5)):
                asked = f"/sample?seed=7&class_label=dog&sampler={sampler}&num_inference_steps={steps}&guidance_scale=1"
                image = table.locator("tbody tr").nth(row).locator("td").nth(column).get_by_role("img")
                assert (pixels(image) == read_png(server.client.get(asked).content)).all()
        table.get_by_role("button", name="DDPM, 5 steps: details").click()
        assert link(server, page.get_by_role("dialog")) == server.client.get(asked).content


def test_what_cannot_be_compared_says_why(browser: Browser, server: ServerProcess) -> None:
    with playing(browser, server, REFUSED, path="/#compare") as page:
        fill(page, "Steps", "2, 2000")
        press(page, "Compare")
        n = len(SAMPLERS)
        expect(finished(page)).to_have_text(re.compile(rf"^{n} images of seed \d+; {n} could not be drawn$"))
        expect(view(page).locator(".words.complaint").first).to_have_text("Steps must be 1 to 1000, and is 2000.")
        for wrong, why in (("", "Steps must be one number or more"), (",".join(map(str, range(1, 30))), "48 at most")):
            fill(page, "Steps", wrong)
            press(page, "Compare")
            expect(trouble(page)).to_contain_text(why)


# Noising and denoising.


def a_photo(width: int, height: int) -> Json:
    """A colour file for a file chooser."""
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    data = io.BytesIO()
    Image.fromarray(np.stack([across, down, 255 - across], axis=-1).astype(np.uint8)).save(data, "PNG")
    return {"name": "photo.png", "mimeType": "image/png", "buffer": data.getvalue()}


def test_a_photo_is_noised_and_denoised_as_by_the_api(browser: Browser, server: ServerProcess) -> None:
    with playing(browser, server, path="/#denoise") as page:
        fill(page, "Timestep", 300)
        fill(page, "Steps", 5)
        fill(page, "Seed of the noise", 9)
        choose(page, "Class", "dog")
        view(page).locator("input[type=file]").set_input_files(files=a_photo(50, 40))  # type: ignore[arg-type]
        expect(finished(page)).to_have_text(re.compile("^5 steps in"))
        said = view(page).locator("figure.clean figcaption")
        expect(said).to_contain_text("photo.png, cropped, scaled from 50×40 to 16×16 and made grey")
        clean, noisy, mended = (pixels(image) for image in view(page).get_by_role("img").all())
        assert clean.std() > 10
        png = io.BytesIO()
        Image.fromarray(clean).save(png, "PNG")
        form = {"timestep": "300", "seed": "9"}
        answers = [
            server.client.post("/noise", files={"image": png.getvalue()}, data=form, headers={"Accept": accept})
            for accept in ("application/x-npy", "image/png")
        ]
        seen = np.asarray(Image.open(io.BytesIO(answers[1].content)), np.float64) / 257
        assert np.abs(noisy - seen).max() <= 1
        expected = post(server, answers[0].content, **form, class_label=1, guidance_scale=2, num_inference_steps=5)
        assert (mended == read_png(expected.content)).all()


def test_sliding_the_timestep_noises_again(browser: Browser, server: ServerProcess) -> None:
    with playing(browser, server, path="/#denoise") as page:
        view(page).locator("input[type=file]").set_input_files(files=a_photo(16, 16))  # type: ignore[arg-type]
        finished(page)
        slider = view(page).get_by_label("Timestep", exact=True)
        slider.focus()
        for _ in range(3):
            slider.press("PageDown")
        at = slider.input_value()
        expect(view(page).locator("figure.noisy figcaption")).to_contain_text(f"timestep {at} of 1000")
        finished(page)
        slider.press("Home")  # timestep 0 takes one step, whatever the field says
        expect(view(page).locator("figure.mended figcaption")).to_contain_text("1 step")
        clean, noisy, _ = (pixels(image) for image in view(page).get_by_role("img").all())
        assert np.abs(clean.astype(int) - noisy).max() < 40


def test_an_image_of_the_gallery_is_denoised(browser: Browser, rgb_server: ServerProcess) -> None:
    with playing(browser, rgb_server) as page:
        draw(page, Seed=7)
        finished(page)
        opened(page, cards(page).first).get_by_role("button", name="Denoise").click()
        expect(view(page).get_by_text("Image, seed 7")).to_be_visible()
        finished(page)
        expect(view(page).get_by_role("img")).to_have_count(3)
        drawn = read_png(rgb_server.client.get("/sample?seed=7").content)
        assert (pixels(view(page).get_by_role("img").first) == drawn[..., 0]).all()


def test_what_is_no_image_is_said_to_be_none(browser: Browser, server: ServerProcess) -> None:
    with playing(browser, server, path="/#denoise") as page:
        text = {"name": "a.txt", "mimeType": "text/plain", "buffer": b"text"}
        view(page).locator("input[type=file]").set_input_files(files=text)  # type: ignore[arg-type]
        expect(trouble(page)).to_have_text("a.txt is not an image that this browser can read.")
        press(page, "Draw one")
        finished(page)
        expect(trouble(page)).to_be_empty()


# Images that are no pictures.


@pytest.fixture(scope="module", params=[2, 4])
def bands(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    sizes = {"in_channels": request.param, "model_channels": 8, "channel_multipliers": [1, 2], "image_size": [8, 16]}
    weights = write_weights(tmp_path_factory.mktemp("bands") / "bands", **sizes, schedule={})
    with serving_here(weights=str(weights)) as server:
        yield server


def grey_of(channel: NDArray[np.float32]) -> NDArray[np.float64]:
    return 127.5 * (1 + channel.clip(-1, 1).astype(np.float64))


def test_the_page_shows_the_first_of_many_channels_and_says_so(browser: Browser, bands: LocalServer) -> None:
    array = read_npy(bands.client.get("/sample?seed=7&num_images=2&num_inference_steps=3").content)
    channels = array.shape[1]
    told = {2: "This page shows the first, in grey.", 4: "This page shows the first three, as red, green and blue."}
    with playing(browser, bands) as page:
        expect(page.get_by_text(f"Images have {channels} channels. {told[channels]}")).to_be_visible()
        draw(page, Seed=7, Images=2, Steps=3)
        expect(finished(page)).to_have_text(re.compile(r"^2 images in \d"))
        shown = [pixels(image) for image in view(page).locator(".tile img").all()]
        for image, picture in zip(array, shown, strict=True):
            assert np.abs(picture - grey_of(image[0])).max() <= 1
        viewer = opened(page, cards(page).first)
        assert viewer.locator("dd").all_inner_texts()[:3] == ["8", "DDIM", "3"]
        np.testing.assert_array_equal(read_npy(link(bands, viewer)), array[1])


def test_an_array_of_many_channels_is_noised_and_denoised(browser: Browser, bands: LocalServer) -> None:
    clean = read_npy(bands.client.get("/sample?seed=7").content)
    form = {"timestep": "300", "seed": "9"}
    noised = bands.client.post("/noise", files={"image": ("x", write_npy(clean))}, data=form).content
    mended = bands.client.post("/denoise", files={"image": ("x", noised)}, data={**form, "num_inference_steps": "5"})
    expected = [grey_of(image[0]) for image in (clean, read_npy(noised), read_npy(mended.content))]
    with playing(browser, bands) as page:
        draw(page, Seed=7)
        finished(page)
        opened(page, cards(page).first).get_by_role("button", name="Denoise").click()
        for label, value in (("Timestep", 300), ("Steps", 5), ("Seed of the noise", 9)):
            fill(page, label, value)
        expect(finished(page)).to_have_text(re.compile("^5 steps in"))
        for image, values in zip(view(page).get_by_role("img").all(), expected, strict=True):
            assert np.abs(pixels(image) - values).max() <= 1
        file = {"name": "mine.npy", "mimeType": "", "buffer": write_npy(clean)}
        view(page).locator("input[type=file]").set_input_files(files=file)  # type: ignore[arg-type]
        expect(view(page).locator("figure.clean figcaption")).to_contain_text("mine.npy, as it is")
        expect(finished(page)).to_have_text(re.compile("^5 steps in"))
        file = {"name": "a.txt", "mimeType": "text/plain", "buffer": b"a text of some length"}
        view(page).locator("input[type=file]").set_input_files(files=file)  # type: ignore[arg-type]
        expect(trouble(page)).to_have_text("The file is no .npy of float32 [C, H, W].")


def test_latent_diffusion(browser: Browser, latents: LatentServer) -> None:
    with playing(browser, latents, path="/#denoise") as page:
        fill(page, "Seed of the noise", 3)  # the fake's noise equals its seed
        go(page, "Draw")
        latents.runner.hold()
        choose(page, "Class", "Any")
        draw(page, Seed=3)
        latents.runner.next_pass()
        for _ in range(3):
            latents.runner.next_pass()
        expect(view(page).locator(".doing")).to_have_text(re.compile("^Step . of 4, rough preview$"))
        latents.runner.let_go()
        finished(page)
        viewer = opened(page, cards(page).first)
        assert saved(page, viewer) == latents.client.get("/sample?seed=3").content
        viewer.get_by_role("button", name="Denoise").click()
        expect(view(page).locator(".hint").first).to_contain_text("adds noise to latents")
        finished(page)
        assert {call.name for call in latents.vae.calls} == {"encode", "decode"}
        assert latents.row.start is not None
        assert latents.row.start.shape == (1, 1, 2)  # the exact latents came back, not a decoded picture


# Prompts.


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("weights") / "foxes")


@pytest.fixture(scope="module")
def text_server(pipeline: Path) -> Iterator[LocalServer]:
    with serving_here(weights=str(pipeline), sizes="64x64,64x32", max_batch=4) as server:
        yield server


FOX, BLURRY, LONG = "a fox in the snow, naïve <b>", "blurry & dark", "fox " * 80


def drawn_by(server: Reachable, **fields: object) -> bytes:
    return server.client.post("/sample", json={"num_inference_steps": 3, **fields}).content


def test_a_prompt_is_drawn_again_varied_and_linked(browser: Browser, text_server: LocalServer) -> None:
    with playing(browser, text_server) as page:
        draw(page, **{"Prompt": FOX, "Negative prompt": BLURRY, "Seed": 7, "Steps": 3, "Guidance": 5})
        expect(finished(page)).to_have_text(re.compile("^1 image in"))
        expect(cards(page).first).to_have_accessible_name(re.compile(f"^{re.escape(FOX)} seed 7"))
        viewer = opened(page, cards(page).first)
        file = saved(page, viewer)
        wanted = {"prompt": FOX, "negative_prompt": BLURRY, "guidance_scale": 5}
        assert file == drawn_by(text_server, seed=7, **wanted) == link(text_server, viewer)
        expect(viewer.get_by_role("heading")).to_have_text(FOX)
        expect(viewer.locator("dl")).to_contain_text(f"Negative{BLURRY}Seed7")
        viewer.get_by_role("button", name="Vary").click()
        expect(cards(page)).to_have_count(2)
        finished(page)
        assert view(page).get_by_label("Prompt", exact=True).input_value() == FOX
        assert view(page).get_by_label("Negative prompt").input_value() == BLURRY
        seed = int(view(page).get_by_label("Seed", exact=True).input_value())
        file = saved(page, opened(page, cards(page).first))
        assert file == drawn_by(text_server, seed=seed, **wanted)


def test_without_a_prompt_in_the_recipe_the_page_still_draws_again(browser: Browser, pipeline: Path) -> None:
    """STEPWISE_RECIPE_PROMPTS=0."""
    with serving_here(weights=str(pipeline), recipe_prompts=False) as server, playing(browser, server) as page:
        draw(page, Prompt=FOX, Seed=7, Steps=3)
        finished(page)
        viewer = opened(page, cards(page).first)
        file = saved(page, viewer)
        assert "prompt" not in read_parameters(file)
        assert file == link(server, viewer)
        viewer.get_by_role("button", name="Again").click()
        finished(page)
        assert view(page).get_by_label("Prompt", exact=True).input_value() == FOX
        expect(cards(page)).to_have_count(1)


def test_what_was_cut_is_said(browser: Browser, text_server: LocalServer) -> None:
    said = "The prompt has 80 tokens, and 75 fit: the last 5 were cut."
    with playing(browser, text_server) as page:
        warning = view(page).locator(".warning")
        expect(warning).to_be_hidden()
        draw(page, Prompt=LONG, Seed=7, Steps=2)
        finished(page)
        expect(warning).to_have_text(said)
        assert low_contrast(page) == []
        draw(page, Prompt=FOX)
        finished(page)
        expect(warning).to_be_hidden()
        go(page, "Compare")
        fill(page, "Prompt", LONG)
        fill(page, "Steps", "2, 3")
        press(page, "Compare")
        finished(page)
        expect(view(page).locator(".warning")).to_have_text(said)


def test_a_prompt_under_several_samplers(browser: Browser, text_server: LocalServer) -> None:
    with playing(browser, text_server) as page:
        go(page, "Compare")
        fill(page, "Prompt", FOX)
        fill(page, "Negative prompt", BLURRY)
        choose(page, "Samplers", "DDIM")  # at first, the recommended one alone is on
        fill(page, "Steps", "2, 3")
        fill(page, "Seed", 7)
        press(page, "Compare")
        expect(finished(page)).to_have_text("4 images of seed 7")
        label = view(page).get_by_role("button", name=re.compile(f"^{re.escape(FOX)}, seed 7, DDIM, 3 steps: details"))
        file = saved(page, opened(page, label))
        wanted = {"prompt": FOX, "negative_prompt": BLURRY, "sampler": "ddim", "seed": 7}
        assert file == drawn_by(text_server, **wanted)


def test_enter_draws_and_shift_enter_begins_a_line(browser: Browser, text_server: LocalServer) -> None:
    with playing(browser, text_server) as page:
        fill(page, "Steps", 2)
        prompt = view(page).get_by_label("Prompt", exact=True)
        prompt.fill("a fox")
        prompt.press("Shift+Enter")
        prompt.type("in the snow")
        prompt.press("Enter")
        finished(page)
        assert prompt.input_value() == "a fox\nin the snow"
        assert read_parameters(saved(page, opened(page, cards(page).first)))["prompt"] == "a fox\nin the snow"


def test_a_model_is_told_sizes(browser: Browser) -> None:
    with serving_text(tokenize_twice, like=like_xl) as xl, playing(browser, xl) as page:
        view(page).get_by_text("More", exact=True).click()
        draw(page, **{"Prompt": FOX[:5], "Seed": 7, "Original size": "10, 11", "Negative target size": "20 21"})
        finished(page)
        viewer = opened(page, cards(page).first)
        file = saved(page, viewer)
        told: Json = {"original_size": [10, 11], "negative_target_size": [20, 21]}
        assert file == xl.client.post("/sample", json={"seed": 7, "prompt": FOX[:5], **told}).content
        assert file == link(xl, viewer)
        viewer.get_by_role("button", name="Vary").click()
        expect(cards(page)).to_have_count(2)
        finished(page)
        recipe = read_parameters(saved(page, opened(page, cards(page).first)))
        assert {name: recipe[name] for name in told} == told


def test_a_model_with_guidance_embedded_has_no_negative_prompt(browser: Browser) -> None:
    with serving_text(like=like_lcm) as lcm, playing(browser, lcm) as page:
        draw(page, Prompt=FOX[:5], Seed=7, Guidance=3)
        finished(page)
        file = saved(page, opened(page, cards(page).first))
        assert file == lcm.client.post("/sample", json={"seed": 7, "prompt": FOX[:5], "guidance_scale": 3}).content
        for name in ("draw", "compare", "denoise"):
            expect(page.locator(f"#view-{name} [data-field=prompt]")).to_have_count(1)
        expect(page.locator("[data-field=negative_prompt]")).to_have_count(0)


def test_a_prompt_guides_what_is_denoised(browser: Browser, text_server: LocalServer) -> None:
    with playing(browser, text_server) as page:
        choose(page, "Size", "64×32")
        draw(page, Prompt=FOX, Seed=7, Steps=2)
        finished(page)
        opened(page, cards(page).first).get_by_role("button", name="Denoise").click()
        expect(page.locator("#view-denoise")).to_be_visible()
        fill(page, "Steps", 2)
        finished(page)
        assert view(page).get_by_label("Prompt", exact=True).input_value() == FOX
        assert pixels(view(page).locator(".mended img")).shape == (32, 64)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_prompts_on_a_phone(browser: Browser, text_server: LocalServer, scheme: Any) -> None:
    """A long word does not widen the page, and every control has a name."""
    with playing(browser, text_server, viewport=PHONE, color_scheme=scheme, has_touch=True) as page:

        def check() -> None:
            width, most = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
            assert width <= most
            assert low_contrast(page) == []
            assert_accessible(page)

        check()
        view(page).get_by_text("How it is drawn").tap()
        draw(page, **{"Prompt": "w" * 300 + LONG, "Negative prompt": BLURRY, "Seed": 7, "Steps": 2})
        finished(page)
        check()
        viewer = opened(page, cards(page).first)
        expect(viewer.locator(".picture img")).to_be_in_viewport(ratio=0.9)  # above a long text
        expect(viewer.locator("dl")).to_contain_text(LONG.strip())  # the heading is shorter
        check()
        viewer.get_by_role("button", name="Denoise").click()
        fill(page, "Steps", 2)
        finished(page)
        check()
        page.get_by_role("link", name="Compare").click()
        check()


# Errors.


def test_a_field_that_is_wrong_says_so(browser: Browser, server: ServerProcess) -> None:
    with playing(browser, server, REFUSED) as page:
        choose(page, "Class", "Any")
        draw(page, Steps=2000, Images=99)
        expect(trouble(page)).to_have_text("Images must be 1 to 64, and is 99. Steps must be 1 to 1000, and is 2000.")
        field = view(page).get_by_label("Images, as a number")
        expect(field).to_have_attribute("aria-invalid", "true")
        expect(field).to_have_accessible_description("Images must be 1 to 64, and is 99.")
        draw(page, Images=1)
        expect(trouble(page)).to_have_text("Steps must be 1 to 1000, and is 2000.")
        expect(field).to_have_attribute("aria-invalid", "false")
        draw(page, Steps=2, Seed="seven")
        expect(trouble(page)).to_contain_text("Seed must be an integer from 0 to")
        draw(page, Seed=7)
        finished(page)
        expect(trouble(page)).to_be_empty()


def test_a_request_that_fails_while_it_runs(browser: Browser, local: FakeServer) -> None:
    local.runner.poisoned = {13}
    with playing(browser, local) as page:
        choose(page, "Class", "Any")
        draw(page, Seed=13)
        expect(trouble(page)).not_to_be_empty()
        detail = problem(local.client.post("/sample", json={"seed": 13}), 500)["detail"]
        assert trouble(page).inner_text().lower().rstrip(".") == detail.lower().rstrip(".")
        draw(page, Seed=12)
        finished(page)
    local.runner.poisoned = set()


def test_a_full_server_says_when_to_ask_again(browser: Browser, local: FakeServer) -> None:
    with playing(browser, local, REFUSED) as page, ThreadPoolExecutor(5) as pool:
        local.runner.hold()
        answers = [pool.submit(local.client.post, "/sample", json={"seed": seed}) for seed in range(4)]
        local.wait_for_metric("stepwise_accepted_total", lambda _: local.engine.scheduler is not None)
        local.runner.next_pass()
        local.wait_for_metric("stepwise_rows_waiting", lambda rows: rows + len(local.runner.rows) == 4)
        draw(page)
        expect(trouble(page)).to_have_text(re.compile(r"\. Try again in \d+ s\.$"))
        local.runner.let_go()
        assert {answer.result().status_code for answer in answers} == {200}


def test_a_server_that_is_gone(browser: Browser) -> None:
    with serving_fake() as server, playing(browser, server, GONE) as page:
        server.stop()
        draw(page)
        expect(trouble(page)).to_have_text("The server cannot be reached. Is it running, and are you online?")
        page.get_by_role("link", name="Compare").click()
        press(page, "Compare")
        expect(view(page).locator(".words").first).to_contain_text("The server cannot be reached.")


def test_a_page_that_finds_no_server_tries_again(browser: Browser, server: ServerProcess) -> None:
    with visiting(browser, server.url + "/playground/icon.svg", (GONE,), viewport=DESK) as page:
        page.route("**/info", lambda route: route.abort())
        page.goto(server.url)
        expect(page.get_by_role("alert").first).to_contain_text("The server cannot be reached.")
        page.unroute("**/info")
        page.get_by_role("button", name="Try again").click()
        expect(view(page)).to_be_visible()


@pytest.mark.parametrize("breaks", [1, 2])
def test_a_stream_that_breaks_is_asked_for_again_once(browser: Browser, server: ServerProcess, breaks: int) -> None:
    with playing(browser, server) as page:
        seeds = []

        def cut(route: Route) -> None:
            """Answer with the beginning of a stream."""
            seeds.append(json.loads(route.request.post_data or "")["seed"])
            if len(seeds) > breaks:
                route.continue_()
                return
            event = {"position": 0, "eta_s": 1, "promise_s": 2}
            body = f"event: queued\ndata: {json.dumps(event)}\n\nevent: progress\nda"
            route.fulfill(status=200, content_type="text/event-stream", body=body)

        page.route("**/sample", cut)
        choose(page, "Class", "Any")
        draw(page)
        if breaks == 1:
            finished(page)
            image = saved(page, opened(page, cards(page).first))
            assert image == server.client.get(f"/sample?seed={seeds[0]}").content
        else:
            expect(trouble(page)).to_have_text("The connection broke twice before the images were here.")
        assert len(seeds) == 2
        assert len(set(seeds)) == 1


# Keys, and a proxy.


@contextmanager
def under(page: Page, server: Reachable) -> Iterator[str]:
    """A proxy that serves the server under a path, and strips that path. Yields the path."""

    def strip(route: Route) -> None:
        url = urlsplit(route.request.url)
        route.fulfill(response=route.fetch(url=f"{server.url}{url.path.removeprefix('/under')}?{url.query}"))

    page.route("**/under/**", strip)
    yield f"{server.url}/under/"
    page.unroute("**/under/**")


def test_a_key_is_asked_for_and_sent(browser: Browser, strict_server: ServerProcess) -> None:
    with (
        visiting(browser, f"{strict_server.url}/playground/icon.svg", (REFUSED,), viewport=DESK) as page,
        under(page, strict_server) as url,
    ):
        page.goto(url)
        asking = page.get_by_role("dialog", name="API key")
        expect(asking).to_be_visible()
        asking.get_by_label("Key").fill("gamma")
        asking.get_by_label("Key").press("Enter")
        expect(asking.get_by_role("alert")).to_have_text("The API key is not known.")
        asking.get_by_label("Key").fill("alpha")
        asking.get_by_role("button", name="Continue").click()
        expect(view(page)).to_be_visible()
        choose(page, "Class", "cat")
        draw(page, Seed=7)
        finished(page)
        expect(page.get_by_role("link", name="API")).to_be_hidden()  # the link could not send the key
        viewer = opened(page, cards(page).first)
        expected = strict_server.client.get("/sample?seed=7&class_label=cat").content
        assert saved(page, viewer) == expected
        assert viewer.get_by_label("Draws the same bytes").input_value().startswith(f"{url}sample?seed=7&")
        with page.expect_popup() as popup:
            viewer.get_by_role("link", name="Open").click()
        popup.value.wait_for_url("blob:**")
        assert (pixels(popup.value.locator("img")) == read_png(expected)).all()
        popup.value.close()
        viewer.get_by_role("button", name="Denoise").click()
        finished(page)

        page.reload()  # the page keeps the key
        expect(view(page)).to_be_visible()
        page.get_by_role("button", name="Forget key").click()
        expect(asking).to_be_visible()
        asking.get_by_role("button", name="Not now").click()
        expect(page.get_by_role("alert").first).to_have_text("This server needs an API key.")


def test_a_key_may_have_any_letters(browser: Browser, strict_server: ServerProcess) -> None:
    with visiting(browser, strict_server.url, (REFUSED,), viewport=DESK) as page:
        key = page.get_by_role("textbox", name="Key")
        key.fill("beta-ü")
        key.press("Enter")
        expect(view(page)).to_be_visible()


# Keyboard, accessibility and screens.


def test_the_keyboard_is_enough(browser: Browser, server: ServerProcess) -> None:
    with playing(browser, server) as page:
        keys = page.keyboard

        def reach(name: str) -> None:
            """Press Tab until the control with this name has the focus. Every control on the way must show focus."""
            for _ in range(60):
                keys.press("Tab")
                focused = page.locator(":focus")
                seen = focused.evaluate(
                    """one => [one, one.nextElementSibling, one.closest("label")].filter(Boolean)
                        .some(shown => getComputedStyle(shown).outlineStyle !== "none")"""
                )
                assert seen, focused.evaluate("one => one.outerHTML")
                if focused.evaluate("one => one.labels?.[0]?.textContent ?? one.ariaLabel ?? one.textContent") == name:
                    return
            raise AssertionError(f"{name} is not reached")

        reach("One of each")  # the chosen control of a group
        keys.press("ArrowRight")
        keys.press("ArrowRight")  # dog
        reach("Seed")
        keys.type("7")
        keys.press("Enter")
        finished(page)
        reach("dog, seed 7: details")
        keys.press("Enter")
        viewer = page.get_by_role("dialog")
        expect(viewer.get_by_role("link", name="Download")).to_be_focused()
        keys.press("Escape")
        expect(viewer).to_be_hidden()
        expect(page.get_by_role("button", name="dog, seed 7: details").first).to_be_focused()
        page.locator("nav a").last.focus()
        keys.press("Enter")
        expect(page.locator("#view-denoise")).to_be_visible()


def test_every_control_has_a_name_of_its_own_that_holds_what_is_seen(browser: Browser, server: ServerProcess) -> None:
    """In each state of the page: fresh, drawn, opened, compared, denoised, and after an error."""
    with playing(browser, server, REFUSED) as page:
        assert_accessible(page)
        choose(page, "Class", "One of each")
        draw(page, Seed=7)
        finished(page)
        assert_accessible(page)
        viewer = opened(page, cards(page).first)
        assert_accessible(page)
        expect(viewer.get_by_role("textbox")).to_have_accessible_name("Draws the same bytes")
        viewer.get_by_role("button", name="Denoise").click()
        finished(page)
        assert_accessible(page)
        go(page, "Compare")
        assert_accessible(page)
        fill(page, "Steps", "1, 2")
        press(page, "Compare")
        finished(page)
        assert_accessible(page)
        fill(page, "Steps", "2000")
        press(page, "Compare")
        finished(page)
        assert_accessible(page)
        go(page, "Draw")
        draw(page, Steps=2000)
        expect(trouble(page)).to_contain_text("Steps must be")
        assert_accessible(page)


def test_controls_have_names_while_it_is_drawn(browser: Browser, local: FakeServer) -> None:
    with playing(browser, local, path="/#denoise") as page:
        assert_accessible(page)
        go(page, "Draw")
        local.runner.hold()
        choose(page, "Class", "Any")
        draw(page, Images=3, Seed=1)
        local.runner.next_pass()
        expect(view(page).get_by_role("button", name="Cancel")).to_be_visible()
        assert_accessible(page)


def test_controls_have_names_where_a_key_is_asked_for(browser: Browser, strict_server: ServerProcess) -> None:
    with visiting(browser, strict_server.url, (REFUSED,), viewport=DESK) as page:
        key = page.get_by_role("textbox", name="Key")
        key.fill("gamma")
        key.press("Enter")
        expect(page.get_by_role("dialog").get_by_role("alert")).to_have_text("The API key is not known.")
        assert_accessible(page)
        page.get_by_role("button", name="Not now").click()
        expect(page.get_by_role("button", name="Try again")).to_be_visible()
        assert_accessible(page)


def test_escape_cancels(browser: Browser, local: FakeServer) -> None:
    with playing(browser, local) as page:
        local.runner.hold()
        draw(page)
        local.runner.next_pass()
        expect(view(page).locator(".doing")).to_have_text("Starting")
        page.keyboard.press("Escape")
        expect(view(page).locator(".doing")).to_have_text("Cancelled")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_everything(browser: Browser, server: ServerProcess, scheme: Any) -> None:
    with playing(browser, server, viewport=PHONE, color_scheme=scheme, has_touch=True) as page:

        def check() -> None:
            width, most = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
            assert width <= most
            assert low_contrast(page) == []

        check()
        view(page).get_by_text("How it is drawn").tap()
        view(page).get_by_label("Sampler").select_option("ddim")
        check()
        press(page, "Draw")
        finished(page)
        expect(view(page).locator(".tiles")).to_be_in_viewport()
        check()
        viewer = opened(page, cards(page).first)
        check()
        viewer.get_by_role("button", name="Denoise").click()
        finished(page)
        check()
        page.get_by_role("link", name="Compare").click()
        press(page, "Compare")
        finished(page)
        check()


def low_contrast(page: Page) -> list[str]:
    """Visible text with a contrast below 4.5 to its background. WCAG 2.2, 1.4.3."""
    texts: list[str] = page.evaluate(
        """() => {
            const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
            const luminance = (rgb) => {
                const [r, g, b] = rgb.map((c) => ((c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
            };
            const ground = (one) => {
                for (; one; one = one.parentElement) {
                    const [r, g, b, a = 1] = channels(getComputedStyle(one).backgroundColor);
                    if (a === 1) return [r, g, b];
                }
                throw new Error("no ground");
            };
            const low = [];
            const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
            while (walker.nextNode()) {
                const [text, one] = [walker.currentNode.textContent.trim(), walker.currentNode.parentElement];
                if (!text || !one.checkVisibility() || one.closest(".unseen, .off, :disabled, noscript")) continue;
                const shades = [channels(getComputedStyle(one).color).slice(0, 3), ground(one)].map(luminance);
                const ratio = (Math.max(...shades) + 0.05) / (Math.min(...shades) + 0.05);
                if (ratio < 4.5) low.push(`${text}: ${ratio}`);
            }
            return low;
        }"""
    )
    return texts


def test_the_dark_is_dark(browser: Browser, server: ServerProcess) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        with playing(browser, server, color_scheme=scheme) as page:
            grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
            assert low_contrast(page) == []
    light, dark = (sum(map(int, re.findall(r"\d+", ground))) for ground in grounds)
    assert light > 600
    assert dark < 150


def test_nothing_moves_for_those_who_do_not_want_it(browser: Browser, local: FakeServer) -> None:
    for motion, moving in (("no-preference", True), ("reduce", False)):
        with playing(browser, local, reduced_motion=motion) as page:
            local.runner.hold()
            draw(page)
            local.runner.next_pass()
            name = view(page).get_by_role("progressbar").evaluate("bar => getComputedStyle(bar).animationName")
            assert (name != "none") is moving
            press(page, "Cancel")
            local.runner.let_go()
            assert local.engine.wait_idle(PATIENCE)


def test_small_images_have_square_pixels(browser: Browser, local: FakeServer) -> None:
    with playing(browser, local) as page:
        choose(page, "Class", "Any")
        draw(page, Seed=5)
        finished(page)
        image = view(page).locator(".tile img")
        assert image.evaluate("image => getComputedStyle(image).imageRendering") == "pixelated"
        box = image.bounding_box()
        assert box
        assert box["width"] == pytest.approx(2 * box["height"], abs=1)  # 1×2 pixels
