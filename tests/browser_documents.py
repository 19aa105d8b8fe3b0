"""Every page of the documentation in a real browser, at two widths, light and dark; run by ``.ci/browser``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from chromium import SIZES

ROOT = Path(__file__).parent.parent

# Said by Chromium of any page opened from disk, and of nothing on it.
HARMLESS = ("search_index.json", "from origin 'null'", "web worker", "Worker", "net::ERR_FAILED")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; ``VLMNEURONS_SITE`` names one that is there."""
    if "VLMNEURONS_SITE" in os.environ:
        return Path(os.environ["VLMNEURONS_SITE"])
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    how = {"NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true"}
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, **how})
    return folder


def pages(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.html") if path.name != "404.html")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", SIZES)
def test_every_page_fits_the_window_shows_its_pictures_and_is_read(browser, site, width, dark):
    browser.size(width)
    browser.dark(dark)
    browser.open(site / "index.html")
    browser.run("localStorage.clear()")  # the theme keeps the colours that it began with
    wrong = []
    for page in pages(site):
        name = page.relative_to(site).as_posix()
        browser.open(page)
        scheme = browser.run("return document.body.dataset.mdColorScheme")
        if scheme != ("slate" if dark else "default"):
            wrong.append(f"{name}: drawn in the colours of {scheme}")
        if browser.wider() > 0:
            wrong.append(f"{name}: {browser.wider():.0f} pixels wider than the window")
        broken = browser.run(BROKEN)
        wrong += [f"{name}: {source} is not shown" for source in broken]
        wrong += [f"{name}: {told}" for told in browser.complaints() if not any(one in told for one in HARMLESS)]
        wrong += [f"{name}: {text!r} has a contrast of {least}" for text, least in browser.run(PALE).items()]
        if "VLMNEURONS_SHOTS" in os.environ:
            light = "dark" if dark else "light"
            browser.picture(Path(os.environ["VLMNEURONS_SHOTS"]) / f"docs-{name.replace('/', '-')}-{width}-{light}.png")
    assert len(pages(site)) > 40
    assert not wrong, "\n".join(wrong)


def test_a_long_table_is_searched_by_words_and_a_short_one_is_not(browser, site):
    browser.size(1280)
    browser.open(site / "architectures.html")
    field, told = browser.all(".search-table input")[0], browser.all(".search-table output")[0]
    seen = "return [...document.querySelector('.search-table + *').querySelectorAll('tbody tr')]"
    seen += ".filter(row => row.offsetHeight).map(row => row.cells[0].textContent)"
    every = browser.run(seen)
    assert len(every) >= 100
    field.send_keys("Qwen vision")
    found = browser.run(seen)
    assert found
    assert all("qwen" in name for name in found)
    assert told.text == f"{len(found)} of {len(every)} rows"
    field.clear()
    field.send_keys(" ")  # a space is no word
    assert browser.run(seen) == every
    assert told.text == ""
    browser.open(site / "errors.html")
    assert not browser.all(".search-table")


BROKEN = """
return [...document.images].filter(i => i.loading !== "lazy" && !(i.complete && i.naturalWidth)).map(i => i.src);
"""

# Paragraphs, cells and captions on the page's own ground; the theme's code and navigation have colours of their own.
PALE = """
const light = c => c.map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
  .reduce((sum, v, n) => sum + v * [.2126, .7152, .0722][n], 0);
const parse = text => text.match(/[\\d.]+/g).map(Number), found = {};
const ground = parse(getComputedStyle(document.body).backgroundColor).slice(0, 3);
for (const node of document.querySelectorAll("article p, article li, article td, article em, article h1, article h2")) {
  const own = [...node.childNodes].some(child => child.nodeType === 3 && child.textContent.trim());
  const ink = parse(getComputedStyle(node).color), a = ink[3] ?? 1;
  if (!own || node.closest("pre, .admonition, details")) continue;
  const seen = ink.slice(0, 3).map((v, n) => v * a + ground[n] * (1 - a));
  const [x, y] = [light(seen), light(ground)].sort((p, q) => q - p), contrast = (x + .05) / (y + .05);
  if (contrast < 4.5) found[node.textContent.trim().slice(0, 40)] = Math.round(100 * contrast) / 100;
}
return found;
"""
