"""Figures: colours that mean one thing, order of groups, sizes for print, fonts, and how a figure shows itself."""

import re
import struct
import warnings
import zlib
from dataclasses import replace

import matplotlib
import numpy as np
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
from vlmneurons.errors import MismatchError
from vlmneurons.look.figures import BLUE, ORANGE, natural, ordered, shortened
from vlmneurons.look.plots import plot_effects, plot_flips
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
