"""The explorer in a real browser, clicked through; run by ``.ci/browser``, not with the other tests.

Each view is asserted against the objects that it was written from. A made-up study of 25 groups x 2,652 neurons x
10,000 questions says what the folder takes and how soon its first page is there.
"""

import json
import os
import time
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import vlmneurons as vn
from chromium import SIZES, Chromium
from vlmneurons.cli import main
from vlmneurons.look.explorer import write_explorer
from vlmneurons.look.neuron_pages import InspectedItem, NeuronView, Patch
from vlmneurons.look.numbers import in_matrix
from vlmneurons.study.masks import Mask
from vlmneurons.study.result import KnockoutResult


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study of the organism with four groups, and its explorer; or one that is there (``VLMNEURONS_STUDY``)."""
    torch.set_num_threads(1)
    model, questions = vn.load_demo("organism")
    identify, evaluate = questions.filter(group={"Egypt", "Japan", "France", "Mexico"}).split(0.5, seed=0)
    items = vn.record_items(model, identify, tmp_path_factory.mktemp("items"), batch_size=64)
    stats, rule = items.group_by("group", condition="correct", balanced=True), vn.CAS(count=12)
    selection = rule.select(stats)
    evaluate = evaluate.balanced(8, seed=0)
    controls = [vn.LayerMatchedRandom(selection, seed=seed).select(stats) for seed in range(2)]
    result = vn.knockout(model, evaluate, {"CAS": selection, "random": controls}, batch_size=64)
    how = {"model": model, "stats": stats, "items": items, "selectors": {"CAS": rule}, "strongest": 6}
    page = result.explore(tmp_path_factory.mktemp("explorer"), evaluate, {"CAS": selection}, **how)
    return page, result, selection, stats, evaluate


def ready(browser: Chromium) -> None:
    """Wait until the page shows what its address says."""
    for _ in range(400):
        if browser.run(
            "return document.body.dataset.ready !== undefined && document.body.dataset.ready === location.hash"
        ):
            return
        time.sleep(0.025)
    raise AssertionError(f"{browser.driver.current_url} does not get ready: {browser.text('body')[:500]}")


def click(browser: Chromium, element) -> None:
    element.click()
    ready(browser)


def switch(browser: Chromium, name: str, value: str) -> None:
    """Choose a value of a switch, as a user does."""
    from selenium.webdriver.support.ui import Select

    Select(browser.one(f"[data-switch={name}]")).select_by_value(value)
    ready(browser)


def cells(browser: Chromium) -> list[list[str]]:
    script = "return [...document.querySelectorAll('.matrix tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
    return browser.run(script)


def address(page: Path, *parts: object) -> str:
    return "#/" + "/".join(quote(str(part), safe="") for part in parts)


@pytest.mark.parametrize("value", ["correct", "margin"])
@pytest.mark.parametrize("selector", ["CAS", "random"])
def test_the_first_view_is_the_matrix_of_the_result_with_its_intervals(browser, study, selector, value):
    page, result, *_ = study
    browser.open(page)
    ready(browser)
    assert browser.complaints() == []
    switch(browser, "Selector", selector)
    switch(browser, "Value", value)
    matrix = result.matrix(selector, value="delta" if value == "correct" else "margin")
    shown = cells(browser)
    assert [row[0] for row in shown] == list(matrix.index)
    for row, numbers in zip(shown, matrix.to_numpy(dtype=float), strict=True):
        scale, digits = (100, 0) if value == "correct" else (1, 1)
        assert row[1:] == [in_matrix(number, digits) for number in scale * numbers]  # as a figure has it
    table = result.effects(selector, value=value, permutations=0).set_index(["mask", "group"])
    for place, cell in enumerate(browser.all(".matrix td a")):
        browser.run("arguments[0].dispatchEvent(new MouseEvent('mouseenter'))", cell)
        mask, group = matrix.index[place // len(matrix.columns)], matrix.columns[place % len(matrix.columns)]
        told, one = browser.text("#detail"), table.loc[(mask, group)]
        assert told.startswith(f"Neurons of {mask} off, questions about {group}: ")
        assert f"{one.n} questions about {one.units} pictures, {one.changed} with an effect" in told
        assert ("too few for an interval" in told) == bool(np.isnan(one.low))
    assert browser.complaints() == []


def test_the_questions_of_a_condition_are_those_of_the_result(browser, study):
    page, result, *_ = study
    browser.open(page)
    ready(browser)
    switch(browser, "Questions", "wrong")
    matrix = result.matrix("CAS", condition="wrong").reindex(columns=result.group_names)
    given = [[text for text in row[1:]] for row in cells(browser)]
    shown = dict(zip([row[0] for row in cells(browser)], given, strict=True))
    for mask, numbers in matrix.iterrows():
        expected = ["" if np.isnan(one) else f"{100 * one:.0f}" for one in numbers.to_numpy(dtype=float)]
        assert [text.replace("−", "-") for text in shown[mask]] == expected


def test_a_cell_opens_the_questions_whose_answers_changed(browser, study):
    page, result, selection, _, evaluate = study
    browser.open(page)
    ready(browser)
    click(browser, browser.all(".matrix td.own a")[0])
    mask = selection.groups[0]
    row = next(n for n in result.rows_of("CAS") if result.masks[n - 1].group == mask)
    own = [n for n, group in enumerate(result.groups) if group == mask and result.chosen[row, n] != result.chosen[0, n]]
    assert own
    assert browser.text("h1") == f"{mask} off, questions about {mask}"
    by_id = {item.id: item for item in evaluate}
    assert [card.get_attribute("id") for card in browser.all("article")] == [result.ids[n] for n in own]
    for n, card in zip(own, browser.all("article"), strict=True):
        item, text = by_id[result.ids[n]], card.text
        assert item.question in text
        order, (before, after) = evaluate.order(item), result.chosen[[0, row], n]  # as the model saw them
        letters = {option: "ABCD"[order.index(option)] for option in (before, after)}
        assert f"{letters[before]}. {item.options[before]}" in text
        assert f"Before {letters[before]}, under the mask {letters[after]}" in text
    wait_for_pictures(browser)
    harmed = sum(bool(result.correct[0, n]) for n in own)
    switch(browser, "Changes", "harm")
    assert len(browser.all("article")) == harmed
    assert browser.complaints() == []


def test_a_row_opens_the_neurons_which_are_sorted_and_filtered_by_layer(browser, study):
    page, _, selection, stats, _ = study
    browser.open(page)
    ready(browser)
    group = selection.groups[1]
    (name,) = [one for one in browser.all(".matrix tbody th a") if one.text == group]
    click(browser, name)
    neurons = selection[group]
    score = vn.CAS(count=12).score(stats)[stats.index(group)]
    order = sorted(neurons, key=lambda n: (-float(score[n]), n))
    names = ["{}[{}]".format(*selection.space.locate(n)) for n in order]
    links = ".rows tbody td a"
    assert [one.text for one in browser.all(links)] == names
    assert "Stability" in browser.text(".rows thead")
    column = "return [...document.querySelectorAll('.rows tbody tr')].map(r => r.cells[arguments[0]].textContent)"
    assert all(text.endswith("%") for text in browser.run(column, 4))
    fires = stats.probability[stats.index(group)]
    assert [
        f"{100 * float(fires[n]):.1f} %" in text for n, text in zip(order, browser.run(column, 3), strict=True)
    ] == [True] * len(order)
    click(browser, browser.one("[data-sort=site]"))
    by_site = ["{}[{}]".format(*selection.space.locate(n)) for n in sorted(neurons)]
    assert [one.text for one in browser.all(links)] == by_site
    click(browser, browser.one("[data-sort=site]"))
    assert [one.text for one in browser.all(links)] == by_site[::-1]
    layer = selection.space.locate(order[0])[0].layer
    switch(browser, "Layer", str(layer))
    kept = [name for name in by_site[::-1] if f"layers.{layer}." in name]
    assert 0 < len(kept) < len(by_site)
    assert [one.text for one in browser.all(links)] == kept
    assert f"layer={layer}" in browser.driver.current_url
    assert browser.complaints() == []


def test_a_neuron_has_an_address_of_its_own_with_pictures_maps_words_and_tokens(browser, study):
    page, _, selection, stats, evaluate = study
    model, _ = vn.load_demo("organism")
    group = selection.groups[0]
    score = vn.CAS(count=12).score(stats)[stats.index(group)]
    best = min(selection[group], key=lambda n: (-float(score[n]), n))
    site, number = selection.space.locate(best)
    browser.open(page, address(page, "neuron", site, number))  # as from a mail
    ready(browser)
    assert browser.text("h1") == f"Neuron {site}[{number}]"
    assert f"CAS for {group} (rank 1)" in browser.text()
    view = vn.inspect_neuron(model, evaluate, (site, number), k=8)
    shown = best_of_different_pictures(view.items)
    heads = [one.text for one in browser.all("article > div:last-child > .soft")]
    assert [head.split(" · ")[-1] for head in heads] == [one.question.id for one in shown]
    words = browser.run(
        "return [...document.querySelector('article .words').children].map(s => [s.textContent, s.dataset.v])"
    )
    counted = [[text, float(value)] for text, value in words if value is not None]
    assert [text for text, _ in counted] == [text for text, _, yes in shown[0].words() if yes]
    np.testing.assert_allclose(
        [value for _, value in counted], [value for _, value, yes in shown[0].words() if yes], rtol=0.01, atol=1e-3
    )
    promoted = [one.text for one in browser.all("[data-tokens=Promotes] li")]
    writes = vn.neuron_writes(model, vn.NeuronSet(selection.space, [best]))
    expected = writes[writes["direction"] == "promotes"]["token"]
    assert [one.strip() for one in promoted] == [one.replace("\n", "⏎").strip() for one in expected]
    rects = browser.run(
        "return [...document.querySelectorAll('canvas')].map(c => [c, c.parentElement.querySelector('img')]"
        ".map(e => { const r = e.getBoundingClientRect(); return [r.x, r.y, r.width, r.height].map(Math.round); }))"
    )
    assert len(rects) == len(shown)
    assert all(canvas == image for canvas, image in rects)  # a map lies on its picture, and nowhere else
    pixels = browser.run(
        "const c = document.querySelector('canvas'); return [c.width, c.height, "
        "[...c.getContext('2d').getImageData(0, 0, c.width, c.height).data].filter((_, n) => n % 4 === 3)]"
    )
    heat = shown[0].heat(size=(pixels[0], pixels[1]))
    np.testing.assert_allclose(
        np.array(pixels[2]).reshape(heat.shape) / 255, np.clip(heat / shown[0].value, 0, 1), atol=0.02
    )
    assert browser.complaints() == []


def best_of_different_pictures(items) -> list:
    """Six at most, two of a group, each of another picture."""
    chosen: list = []
    for one in sorted(items, key=lambda one: -one.value):
        of_group = sum(other.question.group == one.question.group for other in chosen)
        if of_group < 2 and one.question.image_key not in [other.question.image_key for other in chosen]:
            chosen.append(one)
    return chosen[:6]


def test_addresses_of_nothing_are_told_and_lead_back(browser, study):
    page, *_ = study
    for wrong in ("#/neuron/language.layers.0.mlp.gate/99999", "#/nowhere", "#/group/CAS/Atlantis", "#/cell/X/Y/Z"):
        browser.open(page, wrong)
        ready(browser)
        assert browser.text("h1") == "Not here"
        told = browser.text("[role=alert]")
        assert any(one in told for one in ("there is no", "there are no", "is in no selection"))
    browser.complaints()
    click(browser, browser.one("main a"))
    assert browser.all(".matrix")


def test_all_is_done_with_the_keyboard(browser, study):
    page, result, *_ = study
    browser.open(page)
    ready(browser)
    browser.run("document.querySelector('[data-at=\"0,0\"]').focus()")
    browser.press("ARROW_RIGHT", "ARROW_DOWN")
    assert browser.run("return document.activeElement.dataset.at") == "1,1"
    assert browser.text("#detail").startswith(f"Neurons of {result.group_names[1]} off")
    browser.press("ENTER")
    ready(browser)
    assert browser.text("h1").startswith(f"{result.group_names[1]} off")
    reached = set()
    for _ in range(12):
        browser.press("TAB")
        reached.add(browser.run("return document.activeElement.tagName"))
    assert {"A", "SELECT"} <= reached
    browser.driver.back()
    ready(browser)
    browser.run("document.querySelector('.matrix tbody th a').focus()")
    browser.press("ENTER")
    ready(browser)
    browser.run("document.querySelector('[data-sort=score]').focus()")
    browser.press("ENTER")
    ready(browser)
    assert browser.run("return document.activeElement.dataset.sort") == "score"  # where one was, one stays
    assert browser.one("[aria-sort=descending] button").get_attribute("data-sort") == "score"
    assert browser.complaints() == []


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", SIZES)
def test_every_view_fits_the_window_and_is_read_in_either_light(browser, study, width, dark, tmp_path):
    page, _, selection, *_ = study
    group = selection.groups[0]
    site, number = selection.space.locate(selection[group].indices[0].item())
    browser.size(width)
    browser.dark(dark)
    views = [("cell", "CAS", group, group), ("group", "CAS", group), ("neuron", site, number)]
    for name in ("", *(address(page, *view) for view in views)):
        browser.open(page, name)
        ready(browser)
        assert browser.wider() <= 0, name
        assert browser.contrasts() == {}, name
        if "VLMNEURONS_SHOTS" in os.environ:
            kind = name.split("/")[1] if name else "matrix"
            browser.picture(
                Path(os.environ["VLMNEURONS_SHOTS"]) / f"explorer-{kind}-{width}-{'dark' if dark else 'light'}.png"
            )
    browser.size(1280)
    browser.dark(False)


def test_nothing_is_loaded_from_elsewhere_and_texts_are_texts(browser, tmp_path):
    item = vn.Question(
        Image.new("RGB", (40, 30), "red"),
        "<img src=x onerror=alert(1)> </script>",
        ("<b>a</b>", "b"),
        0,
        "<i>G",
        id="<x>",
    )
    chosen = np.array([[0], [1]])
    result = KnockoutResult(("<x>",), ("<i>G",), np.array([0]), (Mask("<S>", 0, "<i>G", 1),), chosen, chosen + 0.5)
    space = vn.NeuronSpace.from_widths("language", "gate", [4])
    page = result.explore(tmp_path, [item], {"<S>": vn.Selection({"<i>G": vn.NeuronSet(space, [1])}, selector="</p>")})
    for name in ("", address(page, "cell", "<S>", "<i>G", "<i>G"), address(page, "group", "<S>", "<i>G")):
        browser.open(page, name)
        ready(browser)
        assert browser.all("main b b, main i i, main script") == []
        loaded = browser.run("return performance.getEntriesByType('resource').map(e => e.name)")
        assert all(one.startswith(("file://", "data:")) for one in loaded)
    assert "<i>G" in browser.text("h1")
    assert browser.complaints() == []


# -- the whole study of the demo, as the command line makes it ---------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """``vlmneurons study`` and ``explore``; ``VLMNEURONS_STUDY`` names a study's folder with an explorer/."""
    if "VLMNEURONS_STUDY" in os.environ:
        run = Path(os.environ["VLMNEURONS_STUDY"])
    else:
        run = tmp_path_factory.mktemp("whole") / "study"
        how = ["--model", "demo", "--data", "demo", "--batch-size", "32", "--quiet"]
        assert main(["study", *how, "--out", str(run)]) == 0
        assert main(["explore", str(run), "--quiet"]) == 0
    return run / "explorer" / "index.html", vn.KnockoutResult.load(run / "knockout"), run


def test_every_view_of_the_whole_study_is_that_of_its_files(browser, whole):
    page, result, run = whole
    browser.open(page)
    ready(browser)
    names = [one.text for one in browser.all("[data-switch=Selector] option")]
    assert names == list(result.selectors)
    seen = {"matrix": 0, "cell": 0, "group": 0, "neuron": 0}
    for name in names:
        browser.open(page, f"#/?s={quote(name)}")
        ready(browser)
        matrix = 100 * result.matrix(name)
        order = [row[0] for row in cells(browser)]
        shown = [[float(text.replace("−", "-")) for text in row[1:]] for row in cells(browser)]
        np.testing.assert_allclose(np.array(shown), matrix.loc[order].to_numpy(dtype=float), atol=0.51)
        seen["matrix"] += 1
    for name in ("LAP", "LAPE", "MAD", "CAS"):
        selection = vn.Selection.load(run / "selections" / f"{name}.safetensors")
        for row in result.rows_of(name):
            mask = result.masks[row - 1].group
            browser.open(page, address(page, "cell", name, mask, mask))
            ready(browser)
            own = (np.array(result.groups) == mask) & (result.chosen[row] != result.chosen[0])
            ids = [result.ids[n] for n in np.flatnonzero(own)]
            assert [card.get_attribute("id") for card in browser.all("article")] == ids[:50]
            assert browser.all("main p")[0].text.startswith(f"{len(ids)} answer")
            seen["cell"] += 1
            browser.open(page, address(page, "group", name, mask))
            ready(browser)
            listed = [one.text for one in browser.all(".rows tbody td a")]
            assert sorted(listed) == sorted("{}[{}]".format(*selection.space.locate(n)) for n in selection[mask])
            seen["group"] += 1
            click(browser, browser.all(".rows tbody td a")[0])
            assert browser.text("h1") == f"Neuron {listed[0]}"
            assert f"{name} for {mask} (rank 1)" in browser.text()
            assert len(browser.all("article")) == 6
            assert len(browser.all("[data-tokens] li")) == 20
            wait_for_pictures(browser)
            seen["neuron"] += 1
    assert browser.complaints() == []
    print(f"\nclicked through {seen} views of {page.parent}")


def wait_for_pictures(browser: Chromium) -> None:
    """Pictures come when they are scrolled to."""
    browser.run("document.images.length && [...document.images].forEach(i => i.loading = 'eager')")
    for _ in range(200):
        if browser.run("return [...document.images].every(i => i.complete && i.naturalWidth > 0)"):
            return
        time.sleep(0.025)
    raise AssertionError("pictures are not shown")


# -- a large study -----------------------------------------------------------------------------------------------------

GROUPS, NEURONS, QUESTIONS, LAYERS, WIDTH = 25, 2652, 10_000, 28, 18_944


def large(folder: Path) -> Path:
    """A made-up study of the size of a paper's, with a picture for every question."""
    generator = np.random.default_rng(0)
    groups = [f"Country {n}" for n in range(GROUPS)]
    words = [f"word{n}" for n in range(500)]
    noise = generator.integers(0, 255, (64, 8, 8, 3), dtype=np.uint8)

    def text(n: int) -> str:
        return " ".join(generator.choice(words, n))

    def picture() -> Image.Image:
        small = Image.fromarray(
            noise[generator.integers(64)] // 2 + generator.integers(0, 127, (8, 8, 3), dtype=np.uint8)
        )
        return small.resize((224, 224), Image.Resampling.BICUBIC)

    items = [
        vn.Question(picture, text(12), [text(2) for _ in range(4)], 0, groups[n % GROUPS], id=f"q{n}", image_id=f"p{n}")
        for n in range(QUESTIONS)
    ]
    masks = tuple(Mask("CAS", 0, group, NEURONS) for group in groups)
    of = np.arange(QUESTIONS) % GROUPS
    lost = generator.random((GROUPS, QUESTIONS)) < np.where(np.arange(GROUPS)[:, None] == of, 0.3, 0.06)
    clean = (generator.random(QUESTIONS) < 0.3).astype(int)
    chosen = np.vstack([clean[None], np.where(lost, generator.integers(1, 4, lost.shape), clean)])
    ids, names = tuple(item.id for item in items), tuple(item.group for item in items)
    answers, margins = np.zeros(QUESTIONS, dtype=int), generator.standard_normal(chosen.shape)
    result = KnockoutResult(
        ids, names, answers, masks, chosen, margins, pictures=tuple(item.image_id for item in items)
    )
    space = vn.NeuronSpace.from_widths("language", "gate", [WIDTH] * LAYERS)
    sets = {one: vn.NeuronSet(space, np.sort(generator.choice(len(space), NEURONS, replace=False))) for one in groups}
    tokens = np.full(GROUPS, 4000)
    stats = vn.ActivationStatistics.from_counts(
        space, groups, generator.integers(0, 4000, (GROUPS, len(space))), tokens
    )
    indices = np.unique(np.concatenate([one.indices.numpy() for one in sets.values()]))
    located = [space.locate(int(n)) for n in indices]
    rows = [
        (str(site), number, direction, f" token{(number * 31 + k) % 9999}")
        for site, number in located
        for direction in ("promotes", "suppresses")
        for k in range(10)
    ]
    writes = pd.DataFrame(rows, columns=["site", "neuron", "direction", "token"])
    places = tuple(
        Patch(0, "picture", (x / 16, y / 16, (x + 1) / 16, (y + 1) / 16)) for y in range(16) for x in range(16)
    )
    image = torch.tensor([True] * 256 + [False] * 60)
    views = []
    for group in groups:
        for n in sets[group].indices[:50].tolist():
            site, number = space.locate(n)
            shown = tuple(
                InspectedItem(
                    items[k], 3.0, ("",) * 256 + tuple(f"{word} " for word in generator.choice(words, 60)),
                    torch.from_numpy(generator.standard_normal(316)).float(), ~image | image, image, places,
                )
                for k in generator.integers(0, QUESTIONS, 6)
            )  # fmt: skip
            views.append(NeuronView("made up", site, number, shown, {}))
    how = {"stats": stats, "selectors": {"CAS": vn.CAS()}, "views": views, "writes": writes}
    return write_explorer(result, folder, items, {"CAS": vn.Selection(sets, selector="CAS()")}, **how)


@pytest.fixture(scope="module")
def paper_sized(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    start = time.perf_counter()
    page = large(folder)
    return page, time.perf_counter() - start


def test_a_study_of_the_papers_size_takes_80_mb_and_shows_itself_within_a_second(browser, paper_sized, record_property):
    page, took = paper_sized
    files = [path for path in page.parent.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    parts = {}
    for path in files:
        kind = path.relative_to(page.parent).parts[: 2 if path.parts[-2] != "thumbs" else 1]
        name = "/".join(kind[:2]) if kind[0] == "data" and len(kind) > 1 and not kind[1].endswith(".js") else kind[0]
        parts[name] = parts.get(name, 0) + path.stat().st_size
    thumbs = [path.stat().st_size for path in files if path.suffix == ".webp"]
    times = []
    for _ in range(3):
        browser.open(page)
        ready(browser)
        times.append(browser.run("return performance.getEntriesByName('ready')[0].startTime"))
    print(f"\nwritten in {took:.0f} s; {len(files):,} files, {size / 1e6:.1f} MB:")
    for name, part in sorted(parts.items(), key=lambda one: -one[1]):
        print(f"  {name:20} {part / 1e6:7.1f} MB")
    print(f"{len(thumbs):,} thumbnails of at most {max(thumbs):,} bytes; first view after {json.dumps(times)} ms")
    assert size <= 80e6
    assert max(thumbs) <= 2560
    assert min(times) < 1000
    assert len(cells(browser)) == GROUPS
    later = {}
    for name in (("cell", "CAS", "Country 3", "Country 3"), ("group", "CAS", "Country 3")):
        start = time.perf_counter()
        browser.open(page, address(page, *name))
        ready(browser)
        later[name[0]] = round(time.perf_counter() - start, 2)
    assert len(browser.all(".rows tbody tr")) == 100
    start = time.perf_counter()
    click(browser, browser.all(".rows tbody td a")[0])
    later["neuron"] = round(time.perf_counter() - start, 2)
    print(f"later views after {later} s")
    assert browser.complaints() == []
