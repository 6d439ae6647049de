"""A headless browser that loads a page in a narrow frame and tells what it shows."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium")
_PROBE = """
<script>
const errors = [];
addEventListener("error", event => errors.push(event.message));
addEventListener("load", () => {
  const found = {
    images: [...document.images].map(image => [image.naturalWidth, image.getBoundingClientRect().width]),
    width: document.documentElement.clientWidth,
    scroll: document.documentElement.scrollWidth,
    back: getComputedStyle(document.body).backgroundColor,
    text: getComputedStyle(document.body).color,
    errors: errors,
  };
  document.body.setAttribute("data-found", JSON.stringify(found));
});
</script>
"""


def check_page(path: Path, folder: Path, *, dark: bool, num_images: int) -> None:
    """Check that a page shows all its images on a screen of 400 pixels, without errors or horizontal scrolling.

    Args:
        path: HTML file.
        folder: folder for files of the browser.
        dark: whether the browser prefers dark pages.
        num_images: number of images that the page must show.
    """
    found, log = _shown(path, folder, dark=dark)
    assert found["errors"] == []
    assert "CONSOLE" not in log
    assert found["width"] <= 400
    assert found["scroll"] == found["width"], "no horizontal scrolling"
    assert len(found["images"]) == num_images
    for natural, shown in found["images"]:
        assert natural > 0
        assert 250 < shown <= 400
    colors = ("rgb(21, 24, 28)", "rgb(228, 230, 233)") if dark else ("rgb(255, 255, 255)", "rgb(28, 30, 33)")
    assert (found["back"], found["text"]) == colors


def _shown(path: Path, folder: Path, *, dark: bool) -> tuple[dict[str, Any], str]:
    # A frame of 400 pixels, because a window of Chromium is at least 500 wide.
    page = path.read_text(encoding="utf-8")
    (folder / "probed.html").write_text(page.replace("<head>", f"<head>{_PROBE}"), encoding="utf-8")
    frame = folder / "frame.html"
    frame.write_text(
        '<iframe src="probed.html" width="400" height="800" style="border: 0"></iframe><script>addEventListener("load",'
        '() => document.body.append(document.querySelector("iframe").contentDocument.body.dataset.found))</script>'
    )
    flags = [
        *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
        *("--disable-component-update", "--disable-sync", "--allow-file-access-from-files"),
        *("--virtual-time-budget=5000", "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}"),
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
    ]
    done = subprocess.run(
        [str(CHROMIUM), *flags, "--dump-dom", f"file://{frame}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return json.loads(done.stdout[done.stdout.index('{"images"') : done.stdout.rindex("}") + 1]), done.stderr
