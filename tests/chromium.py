"""A headless Chromium for tests of pages; run by ``.ci/browser``, which installs it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

SIZES = (1280, 420)
"""Widths of a window in pixels: of a desk, and of a phone."""


class Chromium:
    """A browser with what a test asks of a page.

    Attributes:
        driver: selenium's.
    """

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, page: Path | str, address: str = "") -> None:
        """Open a page from disk, as a double click does, at an address within it."""
        self.driver.get("about:blank")  # else a change of the address alone is no new visit
        self.driver.get(f"{Path(page).resolve().as_uri()}{address}" if isinstance(page, Path) else page + address)

    def size(self, width: int, height: int = 900) -> None:
        """Give the window a size."""
        how = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", how)

    def dark(self, wanted: bool = True) -> None:
        """Ask pages for their dark colours, or for their light ones."""
        feature = {"name": "prefers-color-scheme", "value": "dark" if wanted else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    def run(self, script: str, *given: Any) -> Any:
        """What a script returns."""
        return self.driver.execute_script(script, *given)

    def all(self, selector: str) -> list[Any]:
        """Elements by a CSS selector."""
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> Any:
        """The only element of a CSS selector."""
        (found,) = self.all(selector)
        return found

    def text(self, selector: str = "main") -> str:
        """What is read in an element."""
        return self.one(selector).text

    def press(self, *keys: str) -> None:
        """Press keys where the focus is."""
        for key in keys:
            self.driver.switch_to.active_element.send_keys(getattr(Keys, key))

    def complaints(self) -> list[str]:
        """What the console has said since it was asked last."""
        return [f"{one['level']}: {one['message']}" for one in self.driver.get_log("browser")]

    def wider(self) -> float:
        """By how many pixels the page is wider than the window: it would have to be pushed sideways."""
        return self.run("return document.documentElement.scrollWidth - window.innerWidth")

    def contrasts(self) -> dict[str, float]:
        """Texts with less than 4.5 to 1 between letters and the nearest plain background, with their contrast."""
        return self.run(_CONTRAST)

    def picture(self, path: Path, *, whole: bool = True) -> None:
        """A screenshot, of the whole page."""
        import base64

        shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": whole})
        path.write_bytes(base64.b64decode(shot["data"]))


_CONTRAST = """
const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
  .reduce((sum, v, n) => sum + v * [.2126, .7152, .0722][n], 0);
const parse = text => { const n = text.match(/[\\d.]+/g).map(Number); return n.length === 3 ? [...n, 1] : n; };
const over = (top, under) => [0, 1, 2].map(k => top[k] * top[3] + under[k] * (1 - top[3]));
const found = {};
for (const node of document.querySelectorAll("main *, header *")) {
  const own = [...node.childNodes].some(child => child.nodeType === 3 && child.textContent.trim());
  if (!own || !node.getClientRects().length) continue;
  const layers = [];
  for (let at = node; at; at = at.parentElement) {
    const style = getComputedStyle(at), tint = style.backgroundImage.match(/^linear-gradient\\((rgba?\\([^)]*\\))/);
    if (tint) layers.push(parse(tint[1]));
    layers.push(parse(style.backgroundColor));
  }
  const behind = layers.reverse().reduce((under, top) => over(top, under), [255, 255, 255]);
  const [a, b] = [light(parse(getComputedStyle(node).color)), light(behind)].sort((x, y) => y - x);
  const contrast = (a + .05) / (b + .05);
  if (contrast < 4.5) found[node.textContent.trim().slice(0, 40)] = Math.round(100 * contrast) / 100;
}
return found;
"""


@contextlib.contextmanager
def chromium() -> Iterator[Chromium]:
    """Start a browser, and end it."""
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver"))
    try:
        driver.set_page_load_timeout(60)
        yield Chromium(driver)
    finally:
        driver.quit()
