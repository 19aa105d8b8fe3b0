"""The report, the comparison and the page of a neuron in a real browser; run by ``.ci/browser``."""

import os
from pathlib import Path

import pytest
import torch

import vlmneurons as vn
from chromium import SIZES
from test_effects import random_result


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Each page that is one file, by its name."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("pages")
    model, questions = vn.load_demo("organism")
    some = questions.filter(group={"Egypt", "Japan"}).balanced(8, seed=0)
    neuron = vn.demo_truth().space.locate(int(vn.demo_truth()["Egypt"].indices[0]))
    vn.inspect_neuron(model, some, neuron, k=3, batch_size=16).save(folder / "neuron.html")
    one, other = random_result(n=15), random_result(1, n=15)
    quick = {"permutations": 20}
    return {
        "neuron": folder / "neuron.html",
        "report": one.report(folder / "report", others={"blind": other}, **quick),
        "compared": vn.compare({"one": one, "other": other}, **quick).report(folder / "compared"),
    }


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", SIZES)
@pytest.mark.parametrize("name", ["neuron", "report", "compared"])
def test_a_page_of_one_file_fits_the_window_and_is_read_in_either_light(browser, pages, name, width, dark):
    browser.size(width)
    browser.dark(dark)
    browser.open(pages[name])
    assert browser.complaints() == []
    assert browser.wider() <= 0
    assert browser.contrasts() == {}
    assert browser.run("return [...document.images].every(i => i.complete && i.naturalWidth > 0)")
    loaded = browser.run("return performance.getEntriesByType('resource').map(e => e.name)")
    assert all(one.startswith("data:") for one in loaded)
    if "VLMNEURONS_SHOTS" in os.environ:
        light = "dark" if dark else "light"
        browser.picture(Path(os.environ["VLMNEURONS_SHOTS"]) / f"page-{name}-{width}-{light}.png")


def test_a_map_lies_on_its_picture_which_is_in_the_page_once(browser, pages):
    browser.size(1280)
    browser.open(pages["neuron"])
    boxes = browser.run(
        "return [...document.querySelectorAll('svg:has(.map)')].map(s => [...s.children].map(c => "
        "{ const r = c.getBoundingClientRect(); return [r.x, r.y, r.width, r.height].map(Math.round); }))"
    )
    assert len(boxes) >= 6
    assert all(picture == heat and picture[2] > 100 for picture, heat in boxes)
    assert browser.run("return document.querySelectorAll('image:not(.map)').length") <= 6
