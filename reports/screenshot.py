"""A picture of a page of the report: `python -m paperclaims.reports.screenshot PAGE.html PICTURE.png [--width 1200] [--dark]`."""

import argparse
import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
FLAGS += ("--disable-component-update", "--disable-sync")


def chromium() -> str | None:
    """The system's Chromium, or the one that the environment variable CHROMIUM names."""
    names = (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
    return next((path for path in map(shutil.which, filter(None, names)) if path), None)


@contextlib.contextmanager
def browser() -> Iterator:
    """A headless Chromium, driven by playwright."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium(), args=list(FLAGS))
        try:
            yield running
        finally:
            running.close()


def screenshot(page: Path, picture: Path, width: int = 1200, height: int = 900, dark: bool = False, whole: bool = False) -> None:
    """Save what a window of `width` x `height` shows of `page`, or the whole page."""
    with browser() as running:
        tab = running.new_page(viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light")
        tab.goto(Path(page).resolve().as_uri())
        for plot in tab.locator(".chart").all() if whole else ():
            plot.scroll_into_view_if_needed()
            plot.locator(".main-svg").first.wait_for()
        tab.screenshot(path=picture, full_page=whole)


def png(svg: Path, picture: Path, scale: int = 2) -> bool:
    """Save an SVG file as PNG at `scale` times its own size; false, and no file, where no browser can be had."""
    try:
        from playwright.sync_api import Error

        try:
            with browser() as running:
                tab = running.new_page(device_scale_factor=scale, color_scheme="light")
                tab.goto(Path(svg).resolve().as_uri())
                shape = tab.evaluate(
                    "[document.documentElement.width.baseVal.value, document.documentElement.height.baseVal.value]"
                )
                tab.set_viewport_size(dict(zip(("width", "height"), map(round, shape), strict=True)))
                tab.screenshot(path=picture)
        except Error:
            return False
    except ImportError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description="Save a picture of a page of the report.")
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--width", type=int, default=1200)
    parser.add_argument("--height", type=int, default=900)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--whole", action="store_true", help="the whole page instead of the first screen")
    screenshot(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
