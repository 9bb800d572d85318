"""The playground's view of images, in a real browser: what is sent is what is seen and painted."""

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, Request, ViewportSize, expect

from model.rows import Group
from service.http.pictures import digest, fitted
from service.plan.fields import Fit
from tests.browser import REFUSED, assert_accessible, chromium
from tests.local import LocalServer, serving_fake, serving_here
from tests.pipelines import write_pipeline
from tests.servers import PATIENCE, Json, Reachable, ServerProcess, needs, read_parameters, read_png, write_weights
from tests.test_playground import (
    PHONE,
    a_photo,
    cards,
    choose,
    draw,
    fill,
    finished,
    low_contrast,
    opened,
    playing,
    press,
    saved,
    trouble,
    view,
)

pytestmark = [needs("chromium"), pytest.mark.slow]

expect.set_options(timeout=1000 * PATIENCE)

PHOTO = a_photo(50, 40)
SIDE = 16  # of the images of `server`
FITS: dict[Fit, str] = {"crop": "Crop", "stretch": "Stretch"}
Mask = NDArray[np.bool_]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def text_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    folder = write_pipeline(tmp_path_factory.mktemp("weights") / "foxes")
    with serving_here(weights=str(folder), sizes="64x64,64x32", max_batch=4) as server:
        yield server


def take(page: Page, file: Json = PHOTO) -> None:
    """Choose a file."""
    view(page).locator("input[type=file]").set_input_files(files=file)  # type: ignore[arg-type]
    expect(sheet(page)).to_be_visible()
    expect(view(page)).to_contain_text(file["name"])


def sheet(page: Page) -> Locator:
    """What one paints on."""
    return view(page).get_by_role("application")


def at(page: Page, x: float, y: float) -> tuple[float, float]:
    """The place on the screen of a pixel's middle."""
    box = sheet(page).bounding_box()
    assert box
    width, height = sheet(page).evaluate("one => [one.width, one.height]")
    return box["x"] + (x + 0.5) * box["width"] / width, box["y"] + (y + 0.5) * box["height"] / height


def drag(page: Page, *pixels: tuple[int, int]) -> None:
    """Move the mouse over pixels with its button down."""
    sheet(page).scroll_into_view_if_needed()
    page.mouse.move(*at(page, *pixels[0]))
    page.mouse.down()
    for pixel in pixels[1:]:
        page.mouse.move(*at(page, *pixel))
    page.mouse.up()


def seen(page: Page) -> Mask:
    """What is painted on the screen."""
    shown: list[list[bool]] = sheet(page).evaluate(
        """one => {
            const { data } = one.getContext("2d").getImageData(0, 0, one.width, one.height);
            const painted = Array.from(data.filter((_, i) => i % 4 === 3), (opacity) => opacity > 0);
            return Array.from({ length: one.height }, (_, y) => painted.slice(y * one.width, (y + 1) * one.width));
        }"""
    )
    return np.array(shown)


def blank() -> Mask:
    return np.zeros((SIDE, SIDE), bool)


def sha256(mask: Mask) -> str:
    return digest(Image.fromarray(mask.astype(np.uint8) * 255))


def png(mask: Mask) -> bytes:
    data = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).save(data, "PNG")
    return data.getvalue()


def drawn(page: Page, **settings: object) -> bytes:
    """Draw, and save the image that is shown."""
    draw(page, **{"Steps": 4, "Seed": 7, **settings})
    finished(page)
    with page.expect_download() as download:
        view(page).get_by_role("link", name="Download").click()
    return Path(download.value.path()).read_bytes()


def by_api(server: Reachable, mask: Mask | None = None, **fields: object) -> bytes:
    files = {"image": PHOTO["buffer"]} | ({} if mask is None else {"mask_image": png(mask)})
    given = {"num_inference_steps": 4, "seed": 7, "fit": "crop", **fields}
    answer = server.client.post("/sample", files=files, data={name: str(value) for name, value in given.items()})
    assert answer.status_code == 200, answer.text
    return answer.content


# Taking an image.


def test_an_image_is_drawn_anew_as_by_the_api(browser: Browser, server: ServerProcess) -> None:
    with playing(browser, server, path="/#image") as page:
        take(page)
        expect(view(page)).to_contain_text("photo.png, cropped, scaled from 50×40 to 16×16 and made grey")
        choose(page, "Class", "dog")
        asked: Json = {"class_label": "dog", "guidance_scale": 2}
        assert drawn(page) == by_api(server, strength=0.8, **asked)
        stronger = {**asked, "guidance_scale": 3}
        assert drawn(page, Strength=0.5, Guidance=3) == by_api(server, strength=0.5, **stronger)
        choose(page, "Fit", "Stretch")
        expect(view(page)).to_contain_text("photo.png, stretched from 50×40 to 16×16")
        assert drawn(page, Guidance=2) == by_api(server, strength=0.5, fit="stretch", **asked)


def test_what_is_seen_before_is_what_the_server_fits(browser: Browser, server: ServerProcess) -> None:
    """Its filter is another one than the browser's, so values differ a little."""
    with playing(browser, server, path="/#image") as page:
        for fit, name in FITS.items():
            take(page, PHOTO)
            choose(page, "Fit", name)
            values = (
                view(page)
                .get_by_role("img", name="The image, as it is fitted")
                .evaluate(
                    """one => {
                    const { data } = one.getContext("2d").getImageData(0, 0, one.width, one.height);
                    return Array.from(data.filter((_, i) => i % 4 === 0));
                }"""
                )
            )
            photo = Image.open(io.BytesIO(PHOTO["buffer"])).convert("L")
            assert np.abs(np.reshape(values, (SIDE, SIDE)) - fitted(photo, Group(SIDE, SIDE), fit)).max() < 16


@pytest.mark.parametrize("how", ["drop", "paste"])
def test_an_image_is_dropped_or_pasted(browser: Browser, server: ServerProcess, how: str) -> None:
    with playing(browser, server, path="/#image") as page:
        view(page).evaluate(
            """(view, [how, bytes]) => {
                const data = new DataTransfer();
                data.items.add(new File([Uint8Array.from(bytes)], "photo.png", { type: "image/png" }));
                const target = how === "drop" ? view.querySelector(".panel") : document;
                target.dispatchEvent(how === "drop"
                    ? new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true })
                    : new ClipboardEvent("paste", { clipboardData: data, bubbles: true }));
            }""",
            [how, list(PHOTO["buffer"])],
        )
        expect(sheet(page)).to_be_visible()
        expect(page.locator("#status")).to_contain_text({"drop": "photo.png", "paste": "What you pasted"}[how])
        choose(page, "Class", "dog")
        assert drawn(page) == by_api(server, strength=0.8, class_label="dog", guidance_scale=2)


def test_a_drawn_image_is_used(browser: Browser, server: ServerProcess) -> None:
    with playing(browser, server) as page:
        choose(page, "Class", "dog")
        draw(page, Seed=3)
        finished(page)
        opened(page, cards(page).first).get_by_role("button", name="Use as image").click()
        expect(page.locator("#view-image")).to_be_visible()
        expect(view(page)).to_contain_text("dog, seed 3, as it is")
        assert view(page).get_by_role("group", name="Class").get_by_label("dog", exact=True).is_checked()
        file = drawn(page)
        source = server.client.get("/sample?seed=3&class_label=dog").content
        assert read_parameters(file)["image_sha256"] == digest(Image.open(io.BytesIO(source)))
        press(page, "Use as image")
        expect(view(page)).to_contain_text("dog, seed 7, as it is")
        again = drawn(page, Seed=8)
        assert read_parameters(again)["image_sha256"] == digest(Image.open(io.BytesIO(file)))


def test_what_the_server_does_not_read_is_sent_as_png(browser: Browser, server: ServerProcess) -> None:
    data = io.BytesIO()
    picture = Image.open(io.BytesIO(PHOTO["buffer"])).convert("P")
    picture.save(data, "GIF")
    with playing(browser, server, path="/#image") as page:
        take(page, {"name": "old.gif", "mimeType": "image/gif", "buffer": data.getvalue()})
        expected = digest(Image.open(data).convert("RGB").convert("L"))
        assert read_parameters(drawn(page))["image_sha256"] == expected


# Painting.


def test_what_is_painted_is_drawn_anew(browser: Browser, server: ServerProcess) -> None:
    with playing(browser, server, path="/#image") as page:
        take(page)
        choose(page, "Class", "dog")
        fill(page, "Brush size", 1)
        drag(page, (2, 3), (12, 3))
        mask = blank()
        mask[3, 2:13] = True
        file = drawn(page)
        assert read_parameters(file)["mask_sha256"] == sha256(mask)
        assert file == by_api(server, mask, strength=1, class_label="dog", guidance_scale=2)

        fill(page, "Brush size", 3)
        drag(page, (5, 10), (5, 10))  # a square of 3 by 3: the corners are within 1.5
        mask[9:12, 4:7] = True
        choose(page, "Tool", "Eraser")
        fill(page, "Brush size", 1)
        drag(page, (8, 3), (12, 3))
        mask[3, 8:13] = False
        assert read_parameters(drawn(page))["mask_sha256"] == sha256(mask)

        press(page, "Invert")
        assert (seen(page) == ~mask).all()
        assert read_parameters(drawn(page))["mask_sha256"] == sha256(~mask)
        press(page, "Undo")
        press(page, "Undo")  # the eraser
        mask[3, 8:13] = True
        assert read_parameters(drawn(page))["mask_sha256"] == sha256(mask)
        press(page, "Clear")
        expect(view(page).get_by_role("button", name="Clear")).to_be_focused()
        assert "mask_sha256" not in read_parameters(drawn(page))  # without paint, all of the image is drawn anew
        press(page, "Undo")
        assert read_parameters(drawn(page))["mask_sha256"] == sha256(mask)
        for _ in range(2):
            press(page, "Undo")
        undo = view(page).get_by_role("button", name="Undo")
        expect(undo).to_be_disabled()
        expect(undo).to_be_focused()  # one can go on from there


def test_paint_goes_beyond_the_edges(browser: Browser, server: ServerProcess) -> None:
    with playing(browser, server, path="/#image") as page:
        take(page)
        fill(page, "Brush size", 5)
        drag(page, (15, 15), (19, 15))
        expected = blank()
        yy, xx = np.mgrid[:SIDE, :SIDE]
        expected[np.hypot(np.maximum(15 - xx, 0), yy - 15) <= 2.5] = True
        assert (seen(page) == expected).all()
        assert read_parameters(drawn(page))["mask_sha256"] == sha256(expected)


def test_the_keyboard_paints(browser: Browser, server: ServerProcess) -> None:
    with playing(browser, server, path="/#image") as page:
        take(page)
        fill(page, "Brush size", 1)
        keys, said = page.keyboard, page.locator("#status")
        for _ in range(40):
            keys.press("Shift+Tab")
            if sheet(page).evaluate("one => one === document.activeElement"):
                break
        expect(sheet(page)).to_be_focused()
        expect(sheet(page)).to_have_accessible_description(re.compile("Space paints"))
        assert sheet(page).evaluate("one => getComputedStyle(one.parentElement).outlineStyle") != "none"
        mask = blank()
        keys.press("ArrowLeft")  # from the middle, 8, 8
        expect(said).to_have_text("8, 9: not painted.")
        keys.down("Space")
        keys.press("ArrowUp")
        keys.press("ArrowUp")
        keys.up("Space")
        mask[6:9, 7] = True
        expect(said).to_have_text("8, 7: painted.")
        for _ in range(3):
            keys.press("ArrowRight")
        keys.press("]")
        keys.press("]")
        expect(said).to_have_text("Brush size 3.")
        keys.press("Space")
        mask[5:8, 9:12] = True
        keys.press("[")
        keys.press("[")
        keys.press("e")
        expect(said).to_have_text("Eraser.")
        keys.press("Space")
        expect(said).to_have_text("Erased.")
        mask[6, 10] = False
        keys.press("Space")
        keys.press("Control+z")
        expect(said).to_have_text("Undone.")
        expect(sheet(page)).to_be_focused()
        assert view(page).get_by_label("Eraser").is_checked()
        assert read_parameters(drawn(page))["mask_sha256"] == sha256(mask)


def test_a_finger_paints_and_the_page_stays(browser: Browser, server: ServerProcess) -> None:
    with playing(browser, server, path="/#image", viewport=PHONE, has_touch=True) as page:
        take(page)
        view(page).get_by_text("How it is drawn").tap()
        fill(page, "Brush size", 1)
        sheet(page).scroll_into_view_if_needed()
        before = page.evaluate("scrollY")
        touch = page.context.new_cdp_session(page)

        def send(kind: str, *pixel: int) -> None:
            points = [dict(zip("xy", at(page, *pixel), strict=True))] if pixel else []
            touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

        send("touchStart", 4, 2)
        for y in range(3, 13):
            send("touchMove", 4, y)
        send("touchEnd")
        assert page.evaluate("scrollY") == before
        mask = blank()
        mask[2:13, 4] = True
        assert read_parameters(drawn(page))["mask_sha256"] == sha256(mask)


def test_strength_follows_the_mask_until_it_is_typed(browser: Browser, server: ServerProcess) -> None:
    with playing(browser, server, path="/#image") as page:
        strength = view(page).get_by_label("Strength, as a number")
        paste = view(page).get_by_label("Paste original")
        take(page)
        expect(strength).to_have_value("0.8")
        expect(paste).to_be_hidden()
        drag(page, (2, 3), (12, 3))
        expect(strength).to_have_value("1")
        expect(paste).to_be_visible()
        press(page, "Undo")
        expect(strength).to_have_value("0.8")
        fill(page, "Strength", 0.3)
        drag(page, (2, 3), (12, 3))
        expect(strength).to_have_value("0.3")


# What was drawn.


def test_before_and_after_by_keyboard_and_pointer(browser: Browser, server: ServerProcess) -> None:
    with playing(browser, server, path="/#image") as page:
        take(page)
        drawn(page)
        slider = view(page).get_by_role("slider", name="Before and after")
        after = view(page).get_by_role("img", name="After: ")
        expect(view(page).get_by_role("img", name="Before: photo.png")).to_be_visible()

        def stands(percent: int) -> None:
            expect(slider).to_have_attribute("aria-valuenow", str(percent))
            expect(slider).to_have_attribute("aria-valuetext", f"{percent} % before, {100 - percent} % after")
            clip = after.evaluate("one => getComputedStyle(one.parentElement).clipPath")
            assert float(re.findall(r"[\d.]+", clip)[-1]) == percent, clip

        stands(50)
        slider.focus()
        moves = {"ArrowRight": 52, "ArrowLeft": 50, "PageUp": 60, "End": 100, "ArrowUp": 100, "Home": 0}
        for key, percent in moves.items():
            slider.press(key)
            stands(percent)
        box = view(page).locator(".divider").bounding_box()
        assert box
        y = box["y"] + box["height"] / 2
        page.mouse.move(box["x"] + 0.25 * box["width"], y)
        page.mouse.down()
        stands(25)
        page.mouse.move(box["x"] + 0.75 * box["width"], y)
        page.mouse.up()
        page.mouse.move(box["x"], y)
        stands(75)


def test_several_images_are_chosen_from_and_drawn_again(browser: Browser, server: ServerProcess) -> None:
    with playing(browser, server, path="/#image") as page:
        take(page)
        choose(page, "Class", "One of each")
        fill(page, "Brush size", 1)
        drag(page, (2, 3), (12, 3))
        drawn(page, Strength=0.6)
        expect(cards(page)).to_have_count(3)
        expect(view(page).get_by_role("figure")).to_contain_text("cat, seed 7")
        view(page).get_by_role("button", name="Image 2 of 3").click()
        expect(view(page).get_by_role("figure")).to_contain_text("dog, seed 8")
        expect(view(page).get_by_role("button", name="Image 2 of 3")).to_have_attribute("aria-pressed", "true")
        press(page, "Details")
        viewer = page.get_by_role("dialog")
        file = saved(page, viewer)
        mask = blank()
        mask[3, 2:13] = True
        wanted: Json = {"class_label": "dog", "guidance_scale": 2, "strength": 0.6, "seed": 8}
        assert file == by_api(server, mask, **wanted)
        expect(viewer.locator("dl")).to_contain_text("Strength0.6")
        expect(viewer.get_by_label("Draws the same bytes")).to_be_hidden()  # an address cannot carry an image
        page.keyboard.press("Escape")

        press(page, "Clear")
        take(page, a_photo(16, 16))
        opened(page, cards(page).nth(1)).get_by_role("button", name="Again").click()
        finished(page)
        expect(view(page)).to_contain_text("photo.png, cropped, scaled from 50×40 to 16×16")
        expect(view(page).get_by_role("button", name="Undo")).to_be_disabled()
        expect(cards(page)).to_have_count(3)  # the same image again
        opened(page, cards(page).nth(1)).get_by_role("button", name="Vary").click()
        expect(cards(page)).to_have_count(4)
        finished(page)
        varied = read_parameters(saved(page, opened(page, cards(page).first)))
        assert {**varied, "seed": 8} == read_parameters(file)


def test_progress_and_cancel(browser: Browser) -> None:
    with serving_fake(max_queue=4, timeout=10_000) as server, playing(browser, server, path="/#image") as page:
        take(page, a_photo(2, 1))
        server.runner.hold()
        choose(page, "Class", "Any")
        fill(page, "Strength", 0.5)
        view(page).get_by_label("Previews").select_option("10")  # more than the steps that are taken
        draw(page, Seed=64, Steps=4)
        assert server.runner.next_pass() == [(64, 0)]
        server.runner.next_pass()
        expect(view(page).locator(".doing")).to_have_text("Step 1 of 2")
        press(page, "Cancel")
        expect(view(page).locator(".doing")).to_have_text("Cancelled")
        server.runner.let_go()
        assert server.engine.wait_idle(PATIENCE)
        draw(page, Seed=65)
        expect(finished(page)).to_have_text(re.compile("^1 image in"))


# What is refused.


def test_what_cannot_be_drawn_says_why(browser: Browser, weights: Path) -> None:
    with (
        serving_here(weights=str(weights / "grey"), max_body=20_000) as server,
        playing(browser, server, REFUSED, path="/#image") as page,
    ):
        asked: list[Request] = []
        page.on("request", lambda request: asked.append(request) if request.url.endswith("/sample") else None)
        expect(view(page)).to_contain_text("up to 0.02 MiB")
        press(page, "Draw")
        expect(trouble(page)).to_have_text("Choose an image first.")
        noise = np.random.default_rng(3).integers(0, 256, (100, 100, 3), np.uint8)
        data = io.BytesIO()
        Image.fromarray(noise).save(data, "PNG")
        zone = view(page).locator("input[type=file]")
        large: Any = {"name": "large.png", "mimeType": "image/png", "buffer": data.getvalue()}
        zone.set_input_files(files=large)
        expect(trouble(page)).to_have_text("large.png has 0.03 MiB, and this server takes 0.02 MiB at most.")
        text: Any = {"name": "a.txt", "mimeType": "text/plain", "buffer": b"text"}
        zone.set_input_files(files=text)
        expect(trouble(page)).to_have_text("a.txt is not an image that this browser can read.")
        assert asked == []
        take(page)
        expect(trouble(page)).to_be_empty()
        draw(page, Strength=0)
        sentence = "Strength must be more than 0 and at most 1, and is 0."
        expect(trouble(page)).to_have_text(sentence)
        expect(view(page).locator("[data-field=strength] .complaint")).to_have_text(sentence)
        drawn(page, Strength=1)
        expect(trouble(page)).to_be_empty()


def test_weights_that_inpaint_have_this_view_alone(browser: Browser, tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "inpaint", kind="sd_inpaint")
    with serving_here(weights=str(folder), max_batch=2) as server, playing(browser, server, REFUSED) as page:
        expect(page.locator("#view-image")).to_be_visible()
        assert page.locator("nav a:visible").all_inner_texts() == ["Image"]
        take(page, a_photo(64, 64))
        expect(view(page)).to_contain_text("This model draws a part of an image anew: paint that part.")
        draw(page, Prompt="a fox", Seed=7, Steps=2)
        expect(trouble(page)).to_have_text(
            "The mask is required: this network draws a part of an image anew, and nothing else."
        )
        drag(page, (4, 4), (10, 10))
        drawn(page, Steps=2)
        viewer = opened(page, cards(page).first)
        expect(viewer.get_by_role("button", name="Use as image")).to_be_visible()
        expect(viewer.get_by_role("button", name="Denoise")).to_be_hidden()


def test_models_that_draw_no_pictures_have_no_such_view(browser: Browser, tmp_path: Path) -> None:
    sizes = {"in_channels": 4, "model_channels": 8, "channel_multipliers": [1, 2], "image_size": [8, 16]}
    weights = write_weights(tmp_path / "bands", **sizes, schedule={})
    with serving_here(weights=str(weights)) as server, playing(browser, server, path="/#image") as page:
        expect(page.locator("#view-draw")).to_be_visible()
        assert page.locator("nav a:visible").all_inner_texts() == ["Draw", "Compare", "Denoise"]
        draw(page, Seed=7)
        finished(page)
        expect(opened(page, cards(page).first).get_by_role("button", name="Use as image")).to_be_hidden()


# Prompts, sizes, and people.


def test_a_prompt_into_a_part_of_an_image(browser: Browser, text_server: LocalServer) -> None:
    with playing(browser, text_server, path="/#image") as page:
        wide = a_photo(100, 52)
        take(page, wide)
        assert view(page).get_by_role("group", name="Size").get_by_label("64×32", exact=True).is_checked()
        fill(page, "Brush size", 9)
        drag(page, (10, 10), (20, 10))
        view(page).get_by_label("Paste original").check()
        file = drawn(page, Prompt="a fox", **{"Negative prompt": "dark", "Strength": 0.7})
        recipe = read_parameters(file)
        asked = {"prompt": "a fox", "negative_prompt": "dark", "strength": 0.7, "paste_original": True, "fit": "crop"}
        assert {name: recipe[name] for name in asked} == asked
        assert (recipe["width"], recipe["height"]) == (64, 32)
        original = fitted(Image.open(io.BytesIO(wide["buffer"])), Group(32, 64), "crop")
        kept = (read_png(file) == original).all(axis=-1)
        y, x = np.mgrid[:32, :64]
        mask = np.hypot(x - x.clip(10, 20), y - 10) <= 4.5
        assert recipe["mask_sha256"] == sha256(mask)
        assert kept[~mask].all()
        assert not kept.all()
        choose(page, "Size", "64×64")  # the paint stays where it is
        again = read_parameters(drawn(page))
        assert (again["width"], again["height"]) == (64, 64)
        assert "mask_sha256" in again


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [PHONE, {"width": 1280, "height": 800}], ids=["phone", "desk"])
def test_every_state_is_accessible(
    browser: Browser, text_server: LocalServer, server: ServerProcess, scheme: Any, viewport: ViewportSize
) -> None:
    """Names, contrast, width; and focus stays where the person put it."""
    has_touch = viewport is PHONE
    for one in (text_server, server):
        options: Json = {"viewport": viewport, "color_scheme": scheme, "has_touch": has_touch}
        with playing(browser, one, REFUSED, path="/#image", **options) as page:

            def check() -> None:
                root = page.locator("html")
                width, most = root.evaluate("root => [root.scrollWidth, root.clientWidth]")
                assert width <= most
                assert low_contrast(page) == []
                assert_accessible(page)

            check()
            take(page)
            drag(page, (2, 3), (12, 3))
            check()
            if has_touch:
                view(page).get_by_text("How it is drawn").tap()
            fill(page, "Steps", 2)
            fill(page, "Images", 2)
            button = view(page).get_by_role("button", name="Draw", exact=True)
            button.focus()
            button.press("Enter")
            finished(page)
            expect(button).to_be_focused()
            expect(view(page).locator(".divider")).to_be_in_viewport()
            check()
            draw(page, Strength=2)
            expect(trouble(page)).to_contain_text("Strength must be")
            check()
            opened(page, cards(page).first)
            check()
