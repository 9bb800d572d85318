"""Pictures of the playground for the README: the real server with the digits in the box, in a real browser.

    python -m bench.screenshot docs/playground.png

Draws one of each class. A second picture, docs/playground-phone.png, shows a phone in dark mode, on which a seven is
noised and denoised. In a third, docs/playground-image.png, a part of the seven is drawn anew. Needs Chromium.
"""

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import Browser, Page, ViewportSize, expect, sync_playwright

from bench.servers import running

SEED = 7
PATIENCE_MS = 120_000
DESK: ViewportSize = {"width": 1280, "height": 760}
PHONE: ViewportSize = {"width": 390, "height": 800}
DIGITS = "digits", "service", {"STEPWISE_WEIGHTS": "digits"}


def draw(page: Page) -> None:
    """Draw one of each class, and show its seed."""
    page.locator("#view-draw").get_by_label("Seed", exact=True).fill(str(SEED))
    page.get_by_role("button", name="Draw", exact=True).click()
    expect(page.locator("#view-draw .progress")).to_have_attribute("data-state", "done")
    page.mouse.move(0, 0)


def take_seven(page: Page, action: str) -> None:
    """Give a seven that was drawn to another view."""
    page.locator("#view-draw").get_by_role("button", name=f"7, seed {SEED + 7}: details").click()
    page.get_by_role("dialog").get_by_role("button", name=action).click()


def paint(page: Page) -> None:
    """Paint a strip across the seven, and draw one of each class into it."""
    view = page.locator("#view-image")
    sheet = view.get_by_role("application")
    expect(sheet).to_be_visible()
    box = sheet.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 0.2 * box["width"], box["y"] + 0.75 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.8 * box["width"], box["y"] + 0.75 * box["height"])
    page.mouse.up()
    view.get_by_label("One of each").check()
    view.get_by_label("Seed", exact=True).fill(str(SEED))
    view.get_by_role("button", name="Draw", exact=True).click()
    expect(view.locator(".progress")).to_have_attribute("data-state", "done")


def denoise(page: Page) -> None:
    """Denoise the seven."""
    take_seven(page, "Denoise")
    expect(page.locator("#view-denoise .progress")).to_have_attribute("data-state", "done")


def take(browser: Browser, url: str, desk: Path) -> None:
    """Write the three pictures."""
    page = browser.new_page(viewport=DESK, color_scheme="light", reduced_motion="reduce")
    page.goto(url)
    draw(page)
    page.screenshot(path=desk)
    take_seven(page, "Use as image")
    paint(page)
    page.evaluate("scrollTo(0, 0)")
    page.screenshot(path=desk.with_stem(f"{desk.stem}-image"))
    page = browser.new_page(viewport=PHONE, color_scheme="dark", reduced_motion="reduce")
    page.goto(url)
    draw(page)
    denoise(page)
    page.screenshot(path=desk.with_stem(f"{desk.stem}-phone"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("desk", metavar="FILE", type=Path, help="where to write the larger picture")
    arguments = parser.parse_args()
    expect.set_options(timeout=PATIENCE_MS)
    with (
        running(DIGITS) as [server],
        server.awake(),
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        take(browser, server.url, arguments.desk)
        browser.close()


if __name__ == "__main__":
    main()
