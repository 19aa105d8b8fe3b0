"""Figures: colours that mean one thing, order of groups, sizes for print, fonts, and how a figure shows itself."""

import re
import struct
import warnings
import zlib
from dataclasses import replace

import matplotlib
import numpy as np
import pandas as pd
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.t2CharStringPen import T2CharStringPen
from fontTools.pens.ttGlyphPen import TTGlyphPen
from fontTools.ttLib import TTFont
from matplotlib import font_manager
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

import vlmneurons as vn
from test_effects import random_result
from test_trust import made_items
from vlmneurons.errors import MismatchError
from vlmneurons.look.figures import BLUE, ORANGE, natural, ordered, shortened
from vlmneurons.look.plots.effects import plot_effects, plot_flips
from vlmneurons.study.masks import Mask
from vlmneurons.study.result import KnockoutResult

RESULT = random_result(n=15)


def named(groups):
    """The result of random answers, with its four groups named otherwise."""
    new = dict(zip(RESULT.group_names, groups, strict=True))
    masks = tuple(replace(mask, group=new[mask.group]) for mask in RESULT.masks)
    return replace(RESULT, groups=tuple(new.get(group, group) for group in RESULT.groups), masks=masks)


def a_selection(groups, layers=2, width=50):
    space = vn.NeuronSpace.from_widths("language", "gate", [width] * layers)
    generator = np.random.default_rng(0)
    sets = {g: vn.NeuronSet(space, np.sort(generator.choice(layers * width, 20, replace=False))) for g in groups}
    return vn.Selection(sets, selector="CAS")


def warm(colour):
    """Whether a colour is nearer to the colour of harm than to that of gain, by its red and blue; None for grey."""
    red, _, blue = colour[:3]
    return None if abs(red - blue) < 0.02 else bool(red > blue)


def ticks(axis):
    return [label.get_text() for label in axis.get_xticklabels()], [
        label.get_text() for label in axis.get_yticklabels()
    ]


@pytest.mark.parametrize(
    ("value", "sign"), [("delta", 1), ("correct", 1), ("margin", 1), ("right_to_wrong", -1), ("wrong_to_right", 1)]
)
def test_harm_is_orange_and_gain_is_blue_whatever_the_value(value, sign):
    image = vn.plot_matrix(RESULT, "CAS", value=value).axes[0].images[0]
    drawn = np.asarray(image.get_array(), dtype=float)
    colours = image.to_rgba(drawn)
    assert np.abs(drawn).max() > 0
    for number, colour in zip(drawn.ravel(), colours.reshape(-1, 4), strict=True):
        assert warm(colour) in ({None} if number == 0 else {sign * number < 0, None})  # None: nearly white
    strongest = np.abs(drawn).argmax()
    assert warm(colours.reshape(-1, 4)[strongest]) == (sign * drawn.ravel()[strongest] < 0)
    np.testing.assert_allclose(image.to_rgba([0.0])[0], (1, 1, 1, 1))


def test_the_colours_of_matrices_are_those_of_flips():
    bars = {bar.get_label(): bar.patches[0].get_facecolor()[:3] for bar in plot_flips(RESULT).axes[0].containers[:3]}
    assert bars["right → wrong"] == to_rgb(ORANGE)
    assert bars["wrong → right"] == to_rgb(BLUE)
    for value, colour in (("right_to_wrong", ORANGE), ("wrong_to_right", BLUE)):
        half = vn.plot_matrix(RESULT, "CAS", value=value, limit=100).axes[0].images[0].to_rgba([50.0])[0]
        np.testing.assert_allclose(half[:3], to_rgb(colour), atol=0.01)


@pytest.mark.parametrize("value", ["flips", "ablated", "clean", "failures", "wrong_to_wrong"])
def test_what_is_neither_harm_nor_gain_has_a_map_of_its_own_from_zero(value):
    image = vn.plot_matrix(RESULT, "CAS", value=value).axes[0].images[0]
    assert image.cmap.name == "cividis"
    assert image.norm.vmin == 0
    assert image.norm.vmax == pytest.approx(100 * RESULT.matrix("CAS", value=value).to_numpy().max() or 1)


def test_groups_with_numbers_are_in_the_order_of_the_numbers():
    figure = vn.plot_matrix(named(["G10", "G2", "G1", "G33"]), "CAS")
    columns, rows = ticks(figure.axes[0])
    assert columns == ["G1", "G2", "G10", "G33", "general"]
    assert rows == ["G1", "G2", "G10", "G33"]
    assert ticks(vn.plot_layers(a_selection(["G10", "G2", "G1"])).axes[0])[1] == ["G1", "G2", "G10"]
    assert sorted(["a10b2", "a10b1", "a9", "b", "10", "9"], key=natural) == ["9", "10", "a9", "a10b1", "a10b2", "b"]


def test_a_cell_keeps_its_number_in_any_order():
    usual = RESULT.matrix("CAS") * 100
    order = list(RESULT.group_names)[::-1]
    axis = vn.plot_matrix(RESULT, "CAS", order=order).axes[0]
    columns, rows = ticks(axis)
    assert (columns, rows) == ([*order, "general"], order)
    np.testing.assert_allclose(axis.images[0].get_array(), usual.loc[rows, columns].to_numpy(dtype=float))
    numbers = {(round(t.get_position()[1]), round(t.get_position()[0])): t.get_text() for t in axis.texts}
    for (row, column), text in numbers.items():
        assert float(text.replace("−", "-")) == pytest.approx(usual.loc[rows[row], columns[column]], abs=0.501)


def test_clustering_puts_alike_groups_beside_each_other():
    profiles = np.array([[0.0, 1], [9, 9], [0, 1.1], [9, 9.1]])
    found = ordered(["a", "b", "c", "d"], "clustered", profiles)
    assert {frozenset(found[:2]), frozenset(found[2:])} == {frozenset("ac"), frozenset("bd")}
    columns, rows = ticks(vn.plot_matrix(RESULT, order="clustered").axes[0])
    assert sorted(rows) == list(RESULT.group_names)
    assert columns == [*rows, "general"]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"order": "best"}, "order 'best' is not one: give all groups in their order, or 'clustered'"),
        ({"order": ["BRA", "EGY", "JPN", "X"]}, "order has each group once; it lacks SGP, has X, which is no group"),
        ({"order": ["BRA", "EGY", "JPN", "SGP", "SGP"]}, "order has each group once; it has one twice"),
        ({"width": 1}, "width 1 is too narrow: it is in inches, at least 2"),
        ({"width": "3"}, "width is a number; got '3'"),
        ({"ax": 3}, "ax is axes of a matplotlib figure; got 3"),
        ({"ax": Figure().subplots(), "width": 3.3}, "width is that of a new figure, and ax has a figure"),
    ],
)
@pytest.mark.usefixtures("unchecked")  # the library's own checks are tried, not the tests' type checker
def test_what_cannot_be_drawn_is_refused(how, message):
    with pytest.raises(MismatchError, match=re.escape(message)):
        vn.plot_matrix(RESULT, "CAS", **how)
    if "BRA" not in str(how):
        with pytest.raises(MismatchError, match=re.escape(message)):
            vn.plot_layers(a_selection("ab"), **how)


def test_several_selectors_and_one_ax_are_refused():
    with pytest.raises(MismatchError, match="ax takes one panel, and there are 6: name one selector"):
        vn.plot_matrix(RESULT, ax=Figure().subplots())


def test_a_panel_is_drawn_into_a_part_of_a_figure():
    figure = Figure(figsize=(9, 4))
    left, _ = figure.subfigures(1, 2)
    assert plot_effects(RESULT.summary(), ax=left.subplots()) is figure


def test_a_panel_is_drawn_into_given_axes():
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    assert vn.plot_matrix(RESULT, "MAD", ax=left) is figure
    assert vn.plot_layers(a_selection(["x", "y"]), ax=right) is figure
    np.testing.assert_allclose(left.images[0].get_array(), 100 * RESULT.matrix("MAD").to_numpy(dtype=float))
    assert np.asarray(right.images[0].get_array()).sum() == 40
    assert tuple(figure.get_size_inches()) == (9, 4)


@pytest.mark.parametrize("width", [3.3, 6.75])
@pytest.mark.parametrize("number", [8, 25])
def test_a_figure_of_a_given_width_has_readable_labels_that_do_not_overlap_and_are_not_cut_off(width, number):
    groups = [f"{'Saint Vincent and the Grenadines' if n == 3 else 'Land'} {n}" for n in range(number)]
    generator = np.random.default_rng(0)
    answers = np.zeros(2 * number, dtype=int)
    masks = tuple(Mask("CAS", 0, group, 5) for group in groups)
    chosen = generator.integers(0, 2, (1 + number, 2 * number))
    result = KnockoutResult(
        tuple(map(str, range(2 * number))), tuple(groups * 2), answers, masks, chosen, chosen.astype(float)
    )
    for figure in (vn.plot_matrix(result, width=width), vn.plot_layers(a_selection(groups, 80), width=width)):
        figure.draw_without_rendering()
        assert figure.get_size_inches()[0] == width
        edge = figure.bbox
        texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
        assert min(text.get_fontsize() for text in texts) >= (6 if number > 8 else 7)
        for axis in (figure.axes[0].xaxis, figure.axes[0].yaxis):
            boxes = [label.get_window_extent() for label in axis.get_ticklabels() if label.get_text()]
            for box in boxes:
                assert edge.x0 - 1 <= box.x0 < box.x1 <= edge.x1 + 1
                assert edge.y0 - 1 <= box.y0 < box.y1 <= edge.y1 + 1
            across = axis.axis_name == "x"
            middles = sorted((box.x0 + box.x1) / 2 if across else (box.y0 + box.y1) / 2 for box in boxes)
            apart = min(np.diff(middles))
            assert apart >= 0.9 * min(box.width if across else box.height for box in boxes)


def test_names_are_cut_only_as_far_as_they_differ():
    assert shortened(["Saint Vincent", "Chile"], 8) == ["Saint V…", "Chile"]
    assert shortened(["language one", "language two"], 6) == ["language o…", "language t…"]


def test_a_figure_shows_itself_and_keeps_its_letters_in_a_pdf(tmp_path):
    for figure in (vn.plot_matrix(RESULT, "CAS"), plot_effects(RESULT.summary(permutations=20).head(3))):
        image = figure._repr_png_()
        assert image[:8] == b"\x89PNG\r\n\x1a\n"
        wide, high = struct.unpack(">II", image[16:24])
        np.testing.assert_allclose(np.array([wide, high]) / 110, figure.get_size_inches(), atol=0.02)
        figure.savefig(tmp_path / "figure.pdf")
        pdf = (tmp_path / "figure.pdf").read_bytes()
        assert b"/Type3" not in pdf
        assert b"/CIDFontType2" in pdf


@pytest.fixture
def a_font(tmp_path):
    """A font that has one letter only, which the font of figures has not."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for point in ((0, 700), (700, 700), (700, 0)):
        pen.lineTo(point)
    pen.closePath()
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder([".notdef", "letter"])
    font.setupCharacterMap({ord("日"): "letter"})
    font.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "letter": pen.glyph()})
    font.setupHorizontalMetrics({".notdef": (500, 0), "letter": (800, 0)})
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": "One Letter Sans", "styleName": "Regular"})
    font.setupOS2(usWeightClass=400)
    font.setupPost()
    font.save(tmp_path / "one.ttf")
    before = list(font_manager.fontManager.ttflist)
    font_manager.fontManager.addfont(tmp_path / "one.ttf")
    yield "One Letter Sans"
    font_manager.fontManager.ttflist[:] = before


def only_these_fonts(monkeypatch, *more):
    """As on a machine that has the fonts that matplotlib brings, and no others."""
    fonts = [entry for entry in font_manager.fontManager.ttflist if entry.name.startswith(("DejaVu", *more))]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", fonts)


def test_a_name_in_another_script_gets_an_installed_font(a_font, monkeypatch, tmp_path):
    only_these_fonts(monkeypatch, a_font)
    monkeypatch.setattr(matplotlib, "__version__", "3.11.0")  # else it is said that letters are not joined
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of a box
        figure = vn.plot_matrix(named(["日", "EGY", "مصر", "SGP"]), "CAS")
        figure.savefig(tmp_path / "figure.png")
    families = {tuple(text.get_fontfamily()) for text in figure.findobj(Text)}
    assert families == {("sans-serif", a_font)}


@pytest.fixture
def a_postscript_font(monkeypatch, tmp_path):
    """A font with PostScript's outlines, which alone has some letters; its copies go to the test's folder."""
    pen, empty = T2CharStringPen(800, None), T2CharStringPen(500, None)
    pen.moveTo((0, 0))
    pen.curveTo((0, 400), (300, 700), (700, 700))
    pen.lineTo((700, 0))
    pen.closePath()
    font = FontBuilder(1000, isTTF=False)
    font.setupGlyphOrder([".notdef", "letter", "other"])
    font.setupCharacterMap({ord("日"): "letter"} | {ord(letter): "other" for letter in "月हि"})
    glyphs = {".notdef": empty.getCharString(), "letter": pen.getCharString(), "other": pen.getCharString()}
    font.setupCFF("CubicSans", {}, glyphs, {})
    font.setupHorizontalMetrics({".notdef": (500, 0), "letter": (800, 0), "other": (800, 0)})
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": "Cubic Sans", "styleName": "Regular"})
    font.setupOS2(usWeightClass=400)
    font.setupPost()
    font.save(tmp_path / "cubic.otf")
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [*font_manager.fontManager.ttflist])
    font_manager.fontManager.addfont(tmp_path / "cubic.otf")
    only_these_fonts(monkeypatch, "Cubic Sans")
    monkeypatch.setattr(matplotlib, "get_cachedir", lambda: str(tmp_path))


@pytest.mark.usefixtures("a_postscript_font")
def test_letters_that_join_are_not_copied_and_what_a_pdf_lacks_then_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(matplotlib, "__version__", "3.11.0")  # else it is said that letters are not joined
    with pytest.warns(
        UserWarning, match="Cubic Sans has PostScript outlines: MuPDF and Ghostscript draw no letter of हि"
    ):
        vn.plot_matrix(named(["हि", "EGY", "USA", "SGP"]), "CAS")
    assert not [*tmp_path.glob("vlmneurons-*.ttf")]


@pytest.mark.usefixtures("a_postscript_font")
def test_letters_of_a_font_with_postscript_outlines_are_copied_as_truetype(tmp_path):
    figure = vn.plot_matrix(named(["日", "EGY", "USA", "SGP"]), "CAS")
    figure.savefig(tmp_path / "figure.pdf")
    (copy,) = tmp_path.glob("vlmneurons-*.ttf")
    with TTFont(copy) as copied:
        assert copied.getBestCmap().keys() == {ord("日")}
        assert copied["hmtx"]["letter"] == (800, 0)
        box = copied["glyf"]["letter"]
        assert (box.xMin, box.yMin, box.xMax, box.yMax) == (0, 0, 700, 700)
    embedded = [zlib.decompressobj().decompress(part) for part in streams((tmp_path / "figure.pdf").read_bytes())]
    fonts = [one for one in embedded if one[:4] in (b"\0\1\0\0", b"OTTO")]
    assert len(fonts) >= 2  # DejaVu's and the copy's
    assert all(one[:4] == b"\0\1\0\0" for one in fonts)
    again = vn.plot_matrix(named(["日", "EGY", "USA", "SGP"]), "CAS")  # with the same copy
    (families,) = {tuple(text.get_fontfamily()) for text in again.findobj(Text)}
    assert f"Cubic Sans {copy.stem.removeprefix('vlmneurons-')}" in families
    assert [*tmp_path.glob("vlmneurons-*.ttf")] == [copy]


def streams(pdf):
    """The compressed parts of a PDF."""
    return [part for part in re.findall(rb"stream\r?\n(.*?)\r?\nendstream", pdf, re.DOTALL) if part[:1] == b"x"]


def test_a_name_that_no_font_can_write_is_said_once_with_what_to_install(monkeypatch, tmp_path):
    only_these_fonts(monkeypatch)
    monkeypatch.setattr(matplotlib, "__version__", "3.11.0")  # else it is said that letters are not joined
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        figure = vn.plot_matrix(named(["日本", "한국", "हि", "SGP"]), "CAS")
        figure.savefig(tmp_path / "figure.png")
        figure._repr_png_()
    assert len(told) == 1
    text = str(told[0].message)
    assert all(letter in text for letter in "日本한국हि")
    assert "Install Noto Sans CJK and Noto Sans Devanagari (fonts.google.com/noto)" in text


def test_a_cell_without_questions_is_not_white_like_an_effect_of_zero():
    asked = np.ones(RESULT.chosen.shape, dtype=bool)
    row = next(n for n, mask in enumerate(RESULT.masks, 1) if (mask.selector, mask.group) == ("CAS", "BRA"))
    asked[row, np.array(RESULT.groups) == "EGY"] = False
    axis = vn.plot_matrix(replace(RESULT, asked=asked), "CAS").axes[0]
    columns, rows = ticks(axis)
    assert np.isnan(np.ma.filled(axis.images[0].get_array(), np.nan)[rows.index("BRA"), columns.index("EGY")])
    assert max(axis.get_facecolor()[:3]) < 0.9


# -- neurons before they are switched off ------------------------------------------------------------------------------


def marks(axis, label):
    """A figure's marks with this name in its legend: across, up, and how far the intervals there are reach."""
    (drawn,) = [one for one in axis.containers if one.get_label() == label]
    line, _, bars = drawn
    reach = [part for part in bars[0].get_segments() if len(part)]
    return np.asarray(line.get_xdata()), np.asarray(line.get_ydata()), np.array(reach)


def shared_sets():
    space = vn.NeuronSpace.from_widths("language", "gate", [10, 10])
    sets = {"G10": [0, 1, 2, 3], "G2": [2, 3, 4, 5, 6, 7], "G1": [12], "G33": [0, 1, 2]}
    return vn.Selection({group: vn.NeuronSet(space, one) for group, one in sets.items()}, selector="by hand")


@pytest.mark.parametrize("order", [None, ["G33", "G1", "G2", "G10"], "clustered"])
def test_the_overlap_drawn_is_that_of_the_sets_and_the_diagonal_is_left_out(order):
    selection = shared_sets()
    for value, of in (("jaccard", lambda a, b: 100 * len(a & b) / len(a | b)), ("shared", lambda a, b: len(a & b))):
        axis = vn.plot_overlap(selection, value=value, order=order).axes[0]
        columns, rows = ticks(axis)
        assert columns == rows
        assert sorted(rows) == sorted(selection)
        assert order == "clustered" or rows == (order or ["G1", "G2", "G10", "G33"])
        sets = {group: set(selection[group].indices.tolist()) for group in selection}
        wanted = [[of(sets[row], sets[column]) if row != column else np.nan for column in columns] for row in rows]
        np.testing.assert_allclose(np.ma.filled(axis.images[0].get_array(), np.nan), wanted)
        assert axis.get_title() == "by hand"
        numbers = {text.get_text() for text in axis.texts if text.get_text()}
        assert numbers == ({"0", "25", "75", "12"} if value == "jaccard" else {"0", "2", "3", "1"})


def test_overlaps_of_several_selections_stand_beside_each_other_on_one_scale():
    one, other = shared_sets(), a_selection(["G1", "G2", "G33", "G10"])
    figure = vn.plot_overlap({"MAD": one, "LAP": other}, value="shared", width=6.75)
    assert [axis.get_title() for axis in figure.axes[:2]] == ["MAD", "LAP"]
    (scale,) = {axis.images[0].get_clim() for axis in figure.axes[:2]}
    off = ~np.eye(4, dtype=bool)
    drawn = [np.asarray(axis.images[0].get_array())[off] for axis in figure.axes[:2]]
    assert scale == (0, max(one.max() for one in drawn))
    assert vn.plot_overlap(vn.Selection({"A": one["G1"]}, selector="")).axes[0].images[0].get_clim() == (0, 1)


def a_null():
    return pd.DataFrame(
        {
            "group": ["G10", "G2", "G1", "G33"],
            "strength": [0.5, 0.2, -np.inf, 0.4],
            "null_mean": [0.1, 0.15, -np.inf, -np.inf],
            "null_high": [0.2, 0.25, -np.inf, 0.3],
            "p_holm": [0.01, 0.6, 1.0, 0.05],
        }
    )


def test_strength_and_null_are_drawn_as_in_the_table_and_only_what_holds_is_filled():
    axis = vn.plot_null(a_null()).axes[0]
    assert ticks(axis)[1] == ["G1", "G2", "G10", "G33"]
    mean, rows, reach = marks(axis, "Shuffled labels: mean, and up to the 95th percentile")
    assert rows.tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(mean, [np.nan, 0.15, 0.1, 0.3])  # where shuffles select nothing, the percentile
    np.testing.assert_allclose(reach[:, :, 0], [[0.15, 0.25], [0.1, 0.2], [0.3, 0.3]])
    lines = {line.get_label(): line for line in axis.lines}
    held, open_ = lines["Strength, Holm’s p at most 0.05"], lines["Strength, Holm’s p above it"]
    assert list(zip(held.get_xdata(), held.get_ydata(), strict=True)) == [(0.5, 2), (0.4, 3)]
    assert list(zip(open_.get_xdata(), open_.get_ydata(), strict=True)) == [(0.2, 1)]
    assert (held.get_fillstyle(), open_.get_fillstyle()) == ("full", "none")
    assert [(text.get_text(), text.get_position()[1]) for text in axis.texts] == [("nothing selected", 0)]
    clustered = vn.plot_null(a_null(), order="clustered").axes[0]
    place = ticks(clustered)[1].index("G1")
    assert [(text.get_text(), text.get_position()[1]) for text in clustered.texts] == [("nothing selected", place)]


FIRST = vn.MAD(count=3)


@pytest.fixture
def counted(tmp_path):
    """Counts of 36 questions of three groups, some of whose neurons fire more at their own."""
    rate = np.full((3, 20), 0.2)
    for n in range(3):
        rate[n, 3 * n : 3 * n + 3] = 0.35
    counts = np.random.default_rng(0).binomial(50, np.repeat(rate, 12, 0))
    return made_items(tmp_path / "items", counts, [group for group in "ABC" for _ in range(12)])


def test_a_null_and_stabilities_of_items_are_drawn_as_they_come(counted):
    null = vn.null_distribution(counted, FIRST, permutations=100)
    lines = [line for line in vn.plot_null(null).axes[0].lines if str(line.get_label()).startswith("Strength")]
    drawn = sorted(float(x) for line in lines for x in line.get_xdata())
    assert drawn == pytest.approx(sorted(null["strength"]))
    table = vn.stability(counted, FIRST, method="halves", resamples=5)
    axis = vn.plot_stability(table, order=None).axes[0]
    assert ticks(axis)[1] == list(table["group"])
    for label, column in (("The group’s own", "jaccard"), ("Other groups’", "between_groups"), ("Chance", "chance")):
        x, _, reach = marks(axis, label)
        np.testing.assert_allclose(x, 100 * table[column])
        if column == "jaccard":
            np.testing.assert_allclose(reach[:, :, 0], 100 * table[["jaccard_low", "jaccard_high"]])
    wanted = ["all", *table["group"][:-1][::-1]]
    assert ticks(vn.plot_stability(table, order=wanted).axes[0])[1] == wanted


def test_overlaps_along_sizes_are_the_means_of_the_groups_or_those_of_all(counted):
    table = vn.sample_sizes(counted, FIRST, [8, 2, 4], repeats=3)
    axis = vn.plot_stability(table, width=3.3).axes[0]
    for label, column in (
        ("Their mean", "jaccard"),
        ("Two draws of this size", "between"),
        ("Chance", "chance"),
    ):
        x, y, _ = marks(axis, label)
        assert x.tolist() == [2, 4, 8]
        np.testing.assert_allclose(y, [100 * table[table["size"] == size][column].mean() for size in (2, 4, 8)])
    thin = [line for line in axis.lines if line.get_linewidth() == 0.8]
    first = table[table["group"] == table["group"].iloc[0]].sort_values("size")
    assert len(thin) == 3
    np.testing.assert_allclose(thin[0].get_ydata(), 100 * first["jaccard"])
    pools = [vn.stability(counted, FIRST, method="pools", size=n, resamples=4).assign(size=n) for n in (2, 6)]
    axis = vn.plot_stability(pd.concat(pools)).axes[0]
    whole = pd.concat(pools).query("group == 'all'")
    _, y, reach = marks(axis, "Their mean")
    np.testing.assert_allclose(y, 100 * whole["jaccard"])
    np.testing.assert_allclose(reach[:, :, 1], 100 * whole[["jaccard_low", "jaccard_high"]])
    np.testing.assert_allclose(marks(axis, "Other groups’")[1], 100 * whole["between_groups"])


def test_each_selector_is_a_mark_of_its_own_at_its_effects():
    summary = RESULT.summary(permutations=20)
    axis = vn.plot_selectors(summary).axes[0]
    whole = summary[summary["group"] == "all"].dropna(subset=["self_effect", "cross_effect"])
    looks = set()
    for row in whole.itertuples():
        (drawn,) = [one for one in axis.containers if one.get_label() == row.selector]
        assert (float(drawn[0].get_xdata()[0]), float(drawn[0].get_ydata()[0])) == pytest.approx(
            (100 * row.cross_effect, 100 * row.self_effect)
        )
        across, up = (bar.get_segments()[0] for bar in drawn[2])
        if np.isfinite(row.cross_effect_low):
            np.testing.assert_allclose(across[:, 0], [100 * row.cross_effect_low, 100 * row.cross_effect_high])
        if np.isfinite(row.self_effect_low):
            np.testing.assert_allclose(up[:, 1], [100 * row.self_effect_low, 100 * row.self_effect_high])
        looks.add((drawn[0].get_color(), drawn[0].get_marker()))
    assert len(looks) == len(whole) == len(axis.containers) > 3
    assert "Self = cross" in {line.get_label() for line in axis.lines}
    assert axis.get_xlim() == axis.get_ylim()  # else a small cross effect would look large
    margins = vn.plot_selectors(RESULT.summary(value="margin", permutations=20), value="margin").axes[0]
    assert margins.get_xlabel() == "Cross effect: change of log-probability margin (nats)"


def test_twenty_selectors_have_twenty_looks():
    columns = [f"{effect}{end}" for effect in ("self_effect", "cross_effect") for end in ("", "_low", "_high")]
    summary = pd.DataFrame({"selector": [f"S{n}" for n in range(20)], "group": "all", **dict.fromkeys(columns, 0.1)})
    drawn = [one[0] for one in vn.plot_selectors(summary).axes[0].containers]
    assert len({(line.get_color(), line.get_marker()) for line in drawn}) == 20


def test_every_value_of_a_neuron_and_its_quartiles_are_drawn():
    values = {"G10": [1.0, 2, 3, 10], "G2": [0.5], "G1": [-1.0, 4]}
    axis = vn.plot_values(values, width=3.3).axes[0]
    groups = ticks(axis)[1]
    assert groups == ["G1", "G2", "G10"]
    lines = [one.get_offsets() for one in axis.collections if one.get_alpha() == 0.6]
    assert [np.asarray(one)[:, 0].tolist() for one in lines] == [values[group] for group in groups]
    assert [set(np.asarray(one)[:, 1].round()) for one in lines] == [{0}, {1}, {2}]
    x, _, reach = marks(axis, "Median, and the middle half")
    np.testing.assert_allclose(x, [np.median(values[group]) for group in groups])
    np.testing.assert_allclose(reach[:, :, 0], [np.percentile(values[group], (25, 75)) for group in groups])


SUMMARY = RESULT.summary(permutations=20)
SIZES = pd.DataFrame({"group": ["a"], "size": [5], "jaccard": [0.5], "jaccard_low": [0.4], "jaccard_high": [0.6]})
REFUSED = {
    "no selection": (lambda: vn.plot_overlap(3), "selections is a Selection, or a dictionary of selections by name"),
    "a set": (lambda: vn.plot_overlap({"A": 3}), "selections['A'] is a Selection; got 3"),
    "none": (lambda: vn.plot_overlap({}), "there is no selection to draw: selections is empty"),
    "other groups": (
        lambda: vn.plot_overlap({"A": shared_sets(), "B": a_selection("xy")}),
        "selections are drawn in one order, and 'B' has other groups than the first",
    ),
    "no such overlap": (
        lambda: vn.plot_overlap(shared_sets(), value="dice"),
        "value='dice' does not exist; choose from jaccard, shared",
    ),
    "two panels": (
        lambda: vn.plot_overlap({"A": shared_sets(), "B": shared_sets()}, ax=Figure().subplots()),
        "ax takes one panel, and there are 2",
    ),
    "a null of 3": (lambda: vn.plot_null(3), "table is the table that null_distribution gives; got 3"),
    "a null of others": (
        lambda: vn.plot_null(SUMMARY),
        "the table has no column strength, null_mean, null_high: give the table of null_distribution",
    ),
    "an empty null": (lambda: vn.plot_null(a_null()[:0]), "the table has no row to draw: give the table of null_dist"),
    "two nulls": (
        lambda: vn.plot_null(pd.concat([a_null(), a_null()])),
        "the table has several rows for G10: draw one selector's alone",
    ),
    "an order of others": (lambda: vn.plot_null(a_null(), order=["G1"]), "order has each group once; it lacks G10"),
    "two sizes": (
        lambda: vn.plot_stability(pd.concat([SIZES, SIZES])),
        "the table has several rows for a, 5: draw one selector's alone",
    ),
    "an order of sizes": (
        lambda: vn.plot_stability(SIZES, order=["a"]),
        "order is that of rows, and a table with sizes is drawn along them: leave it out",
    ),
    "no overlap": (lambda: vn.plot_stability(SUMMARY), "the table has no column jaccard, jaccard_low, jaccard_high"),
    "no summary": (lambda: vn.plot_selectors(RESULT), "summary is the table that KnockoutResult.summary gives; got"),
    "a value of no summary": (
        lambda: vn.plot_selectors(SUMMARY, value="flips"),
        "value='flips' does not exist; choose from correct, margin, score",
    ),
    "groups alone": (
        lambda: vn.plot_selectors(SUMMARY[SUMMARY["group"] != "all"]),
        "no selector has a self and a cross effect over all groups: there is nothing to draw",
    ),
    "no values": (
        lambda: vn.plot_values(3),
        "values is what inspect_neuron gives, or a dictionary of numbers by group",
    ),
    "not a number": (
        lambda: vn.plot_values({"a": [1.0], "b": [float("nan")], "c": []}),
        "values are finite numbers of each group, at least one; not so: b, c",
    ),
    "no group": (lambda: vn.plot_values({}), "at least one; not so: no group"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.usefixtures("unchecked")
def test_tables_and_sets_that_cannot_be_drawn_are_refused(case):
    draw, message = REFUSED[case]
    with pytest.raises(MismatchError, match=re.escape(message)):
        draw()


def test_figures_of_selections_are_drawn_into_given_axes_and_have_the_width_that_is_wanted():
    for draw in (
        lambda **how: vn.plot_overlap(shared_sets(), **how),
        lambda **how: vn.plot_null(a_null(), **how),
        lambda **how: vn.plot_stability(SIZES.drop(columns="size"), **how),
        lambda **how: vn.plot_stability(SIZES, **how),
        lambda **how: vn.plot_selectors(SUMMARY, **how),
        lambda **how: vn.plot_values({"a": [1.0, 2], "b": [3.0]}, **how),
    ):
        figure = Figure(figsize=(9, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        assert draw(ax=right) is figure
        assert len(right.containers) + len(right.images) > 0
        assert not left.lines
        for width in (3.3, 6.75):
            assert draw(width=width).get_size_inches()[0] == width
        with pytest.raises(MismatchError, match="width is that of a new figure, and ax has a figure"):
            draw(ax=Figure().subplots(), width=3.3)
