"""The report, the comparison and the page of a neuron in a real browser; run by ``.ci/browser``."""

import os
from pathlib import Path

import pytest
import torch

import vlmneurons as vn
from chromium import SIZES
from test_effects import random_result
from test_report import asked_in, chosen


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
    shown = {"questions": asked_in(one), "selections": {"MAD": chosen(one.group_names, shared=4)}}
    return {
        "neuron": folder / "neuron.html",
        "report": one.report(folder / "report", others={"blind": other}, **shown, **quick),
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


@pytest.mark.parametrize("width", SIZES)
def test_the_value_of_each_word_is_seen_without_pointing_at_it(browser, pages, width):
    browser.size(width)
    browser.open(pages["neuron"])
    shown = browser.run(
        "return [...document.querySelectorAll('ruby')].map(r => { const v = r.querySelector('rt'), a = "
        "r.getBoundingClientRect(), b = v.getBoundingClientRect(), s = getComputedStyle(v); return [v.textContent, "
        "b.width > 0 && s.visibility === 'visible', b.top >= a.top, parseFloat(s.fontSize)]; })"
    )
    assert len(shown) > 30
    assert all(seen and below and size >= 9 for _, seen, below, size in shown)
    assert all(float(value.replace("−", "-")) < 100 for value, *_ in shown)
    assert not browser.all(".words [title]")


def test_the_models_answer_stands_at_one_option_of_each_question(browser, pages):
    browser.open(pages["neuron"])
    cards = browser.run(
        "return [...document.querySelectorAll('article')].map(a => [...a.querySelectorAll('.options li')].map(l => "
        "l.textContent))"
    )
    assert len(cards) == 6
    assert [sum("the model’s answer" in one for one in options) for options in cards] == [1] * 6


def test_examples_of_changed_answers_stand_beside_each_other_where_there_is_room(browser, pages):
    for width, beside in ((1280, True), (420, False)):
        browser.size(width)
        browser.open(pages["report"])
        boxes = browser.run(
            "return [...document.querySelectorAll('.examples .card')].map(c => c.getBoundingClientRect()).map(r => "
            "[Math.round(r.left), r.right])"
        )
        assert (len({left for left, _ in boxes}) > 1) == beside
        assert max(right for _, right in boxes) <= width
