"""Make the moving picture of the README: the attention explorer in a headless Chromium.

    python docs/make_explorer_gif.py

It writes docs/explorer.gif. It needs the `test` and `notebooks` extras, and Chromium: the
system's, or Playwright's own (`playwright install chromium`).
"""

from __future__ import annotations

import argparse
import io
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ase.io import read
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from allscaip_lite import load_model
from allscaip_lite.notebook.explorer import explore_attention

ROOT = Path(__file__).resolve().parents[1]
STRUCTURE = ROOT / "notebooks" / "molecules" / "caffeine.xyz"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH = 820  # pixels of the finished picture
COLOURS = 160
TURN, STAY = (
    110,
    1100,
)  # ms a frame: while the molecule turns, and where there is text to read


def scenes(page: Page) -> Iterator[int]:
    """Use the explorer as a reader does; the milliseconds for which to show each state."""
    canvas = page.locator("[data-part=canvas]")
    canvas.focus()
    page.locator("[data-part=head]").select_option(label="0")
    yield STAY
    for _ in range(3):
        page.keyboard.press("ArrowRight")  # the next atom
        yield STAY
    for _ in range(2):
        page.keyboard.press("ArrowDown")  # the next head
        yield STAY
    for key in "d" * 8 + "w" * 3:
        page.keyboard.press(key)  # turn
        yield TURN
    for _ in range(2):
        page.keyboard.press("ArrowRight")
        yield STAY
    for key in "s" * 3 + "a" * 8:
        page.keyboard.press(key)
        yield TURN


def frames(view: Path, browser: str | None) -> Iterator[tuple[Image.Image, int]]:
    """Pictures of the explorer saved at `view`, each with its time in milliseconds."""
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page(
            viewport={"width": WIDTH, "height": 900},
            color_scheme="light",
            device_scale_factor=1,
        )
        page.goto(view.as_uri())
        page.locator("[data-part=body]").wait_for(state="visible")
        top = page.locator(".allscaip-view").bounding_box()
        last = page.locator("[data-part=text]").bounding_box()
        height = last["y"] + last["height"] - top["y"]
        clip = {"x": top["x"], "y": top["y"], "width": top["width"], "height": height}
        for milliseconds in scenes(page):
            picture = Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB")
            yield picture, milliseconds
        chromium.close()


def main() -> None:
    """Write the picture and print its size."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "explorer.gif")
    args = parser.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    explorer = explore_attention(load_model("lite"), read(STRUCTURE), kind="node", query=0)
    with tempfile.TemporaryDirectory() as folder:
        pictures, times = zip(
            *frames(explorer.save(Path(folder) / "view.html"), browser), strict=True
        )
    palette = pictures[0].quantize(COLOURS)
    reduced = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    reduced[0].save(
        args.out,
        save_all=True,
        append_images=reduced[1:],
        duration=times,
        loop=0,
        optimize=True,
    )
    print(f"{args.out}: {len(reduced)} frames, {args.out.stat().st_size / 2**20:.2f} MB")


if __name__ == "__main__":
    main()
