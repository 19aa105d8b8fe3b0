"""The report of a study: a page that needs nothing else, figures and tables as files, names of any kind."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pandas as pd
import pytest

from test_effects import random_result
from test_plots import only_these_fonts
from vlmneurons.cli import main
from vlmneurons.errors import MismatchError
from vlmneurons.look.latex import latex
from vlmneurons.look.plots import plot_effects
from vlmneurons.look.report import _finding
from vlmneurons.study.masks import Mask
from vlmneurons.study.result import KnockoutResult

QUICK = {"permutations": 20}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report with everything in it, and the result that it is of."""
    result = random_result(n=15)
    masks = [replace(mask, selector=mask.selector.replace("r=0.001", "r=0.0004")) for mask in result.masks]
    result = replace(result, masks=tuple(masks))
    folder = tmp_path_factory.mktemp("report")
    other = random_result(1, n=15)
    table = pd.DataFrame({"group": ["EGY"], "p": [0.0004]})
    page = result.report(folder, others={"blind": other}, tables={"a <table> of mine": table}, **QUICK)
    return result, folder, page.read_text(encoding="utf-8")


class Links(HTMLParser):
    """Collects what a page refers to, and checks that its tags are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("href", "src")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_loads_nothing_and_every_link_leads_to_a_file(report):
    _, folder, page = report
    links = Links()
    links.feed(page)
    assert not links.open
    ids = set(re.findall(r'id="([^"]+)"', page))
    for link in links.found:
        if link.startswith("#"):
            assert link[1:] in ids
        elif not link.startswith("data:image/svg+xml;base64,"):
            assert (folder / link).stat().st_size > 0
    assert "<script" not in page
    assert "a &lt;table&gt; of mine" in page.lower()


def test_the_page_opens_with_the_result_in_a_sentence(report):
    result, _, page = report
    one = result.summary(**QUICK).query("selector == 'CAS' and group == 'all'").iloc[0]
    (told,) = re.findall(r'<p class="finding">(.*?)</p>', page)
    for effect in ("self_effect", "cross_effect"):
        assert f"{100 * one[effect]:.1f} points of accuracy".replace("-", "−") in told
        bounds = (f"{100 * one[f'{effect}{end}']:.1f}" for end in ("_low", "_high"))
        expected = "[{}, {}]".format(*bounds).replace("-", "−")
        assert (expected in told) == bool(np.isfinite(one[f"{effect}_low"]))
    assert f"{one['n']} questions about {one['pictures']} pictures, of {len(result.group_names)} groups." in told
    assert "by chance" not in told  # it is not known here
    for chance, little in ((0.25, False), (float(np.mean(result.correct[0])) - 0.01, True)):
        finding = _finding(replace(result, provenance={"chance": chance}), result.summary(**QUICK), "CAS")
        assert finding.startswith(told.removesuffix(told[-1]))
        share = 100 * np.mean(result.correct[0])
        assert (
            finding.endswith(
                f" Without a mask {share:.1f} % are right, and {100 * chance:.1f} % by chance: little can be lost."
            )
            == little
        )


def test_every_figure_is_there_as_png_svg_and_pdf_and_every_table_as_csv_and_latex(report):
    result, folder, _ = report
    figures = {path.name for path in (folder / "figures").iterdir()}
    names = ["effects", "effects-by-group", "matrix-cas", "matrix-mad", "matrix-random", "flips", "random", "accuracy"]
    for name in [*names, "curve-cas-r"]:
        assert {f"{name}.png", f"{name}.svg", f"{name}.pdf"} <= figures
        assert b"/Type3" not in (folder / "figures" / f"{name}.pdf").read_bytes()
    for name in ("effects-overall", "effects-cas", "tests-cas", "pairs", "random", "conditions", "accuracy"):
        for ending in ("csv", "tex"):
            assert (folder / "tables" / f"{name}.{ending}").stat().st_size
    every = pd.read_csv(folder / "tables" / "every-mask.csv")
    pd.testing.assert_frame_equal(every, result.table(), check_dtype=False)
    assert set(pd.read_csv(folder / "tables" / "every-pair.csv")["selector"]) == {"CAS", "MAD", "random"}


def test_printed_effects_are_those_of_the_summary_in_points(report):
    result, folder, _ = report
    printed = pd.read_csv(folder / "tables" / "effects-overall.csv").set_index("selector")
    summary = result.summary(**QUICK).set_index(["selector", "group"])
    for name in ("CAS", "MAD", "random"):
        row = summary.loc[name, "all"]
        value, low, high = (100 * row[f"self_effect{end}"] for end in ("", "_low", "_high"))
        numbers = re.findall(r"[−\d.]+", printed.loc[name, "self effect"])
        expected = (value,) if "self_effect" in row["few"] else (value, low, high)
        assert [float(number.replace("−", "-")) for number in numbers] == [
            pytest.approx(number, abs=0.051) for number in expected
        ]
        assert ("(few)" in printed.loc[name, "self effect"]) == ("self_effect" in row["few"])
    margins = pd.read_csv(folder / "tables" / "effects-margin.csv").set_index("selector")
    by_margin = result.summary(value="margin", **QUICK).set_index(["selector", "group"])
    numbers = re.findall(r"[−\d.]+", margins.loc["CAS", "self effect"])
    ours = float(numbers[0].replace("−", "-"))
    assert ours == pytest.approx(by_margin.loc[("CAS", "all"), "self_effect"], abs=0.0051)


def test_a_sweep_is_printed_with_its_settings_and_said_to_be_exploratory(report):
    _, folder, page = report
    assert pd.read_csv(folder / "tables" / "curve-cas-r.csv", dtype=str)["r"].tolist() == ["0.0004", "0.01", "0.02"]
    assert ">0.0004</td>" in page
    assert "Exploratory: 3 settings were tried" in page
    assert pd.read_csv(folder / "tables" / "tests-cas.csv")["settings"].tolist() == [4] * 4


def renamed(result, names):
    """The result with its selectors named otherwise, sweeps left out."""
    kept = [n for n, mask in enumerate(result.masks) if mask.selector in names]
    masks = tuple(replace(result.masks[n], selector=names[result.masks[n].selector]) for n in kept)
    rows = [0, *(n + 1 for n in kept)]
    return replace(result, masks=masks, chosen=result.chosen[rows], margins=result.margins[rows])


@pytest.mark.parametrize(
    ("first", "second", "shared"),
    [
        ("CAS|LAPE", "CAS&LAPE", "matrix-cas-lape-"),
        ("文化", "言語", "matrix-unnamed-"),
        ("CAS", "cas", "matrix-cas-"),
        ("a" * 300 + "1", "a" * 300 + "2", f"matrix-{'a' * 60}-"),
        ("langue créole", "langue creole", "matrix-langue-creole-"),
    ],
)
@pytest.mark.filterwarnings("ignore:no installed font has")
def test_names_that_are_alike_keep_their_own_files(tmp_path, first, second, shared):
    result = renamed(random_result(n=12), {"CAS": first, "MAD": second, "random": "random"})
    tables = {"A|B": pd.DataFrame({"x": [1]}), "A&B": pd.DataFrame({"x": [2]}), "Summary": pd.DataFrame({"x": [3]})}
    page = result.report(tmp_path, main=first, tables=tables, **QUICK).read_text(encoding="utf-8")
    ids = re.findall(r'<section id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    files = re.findall(r'href="((?:figures|tables)/[^"]+)"', page)
    assert len(files) == len({file.lower() for file in files})
    assert {file for file in files if file.endswith((".png", ".svg", ".pdf"))} == {
        f"figures/{path.name}" for path in (tmp_path / "figures").iterdir()
    }
    matrices = sorted(path.name for path in (tmp_path / "figures").glob("matrix-*.svg"))
    assert len(matrices) == 3
    assert sum(name.startswith(shared) for name in matrices) == 2
    values = [pd.read_csv(path)["x"].tolist() for path in (tmp_path / "tables").glob("a-b-*.csv")]
    assert sorted(values) == [[1], [2]]
    assert len(pd.read_csv(tmp_path / "tables" / "summary.csv")) > 3  # not overwritten by the user's
    # A file is called the same when the other comes first.
    turned = renamed(random_result(n=12), {"CAS": second, "MAD": first, "random": "random"})
    turned.report(tmp_path / "again", main=second, tables=dict(reversed(tables.items())), **QUICK)
    assert sorted(path.name for path in (tmp_path / "again" / "figures").glob("matrix-*.svg")) == matrices
    assert {path.name for path in (tmp_path / "tables").glob("a-b-*")} == {
        path.name for path in (tmp_path / "again" / "tables").glob("a-b-*")
    }


def test_a_name_of_ones_own_never_takes_a_file_of_the_report(tmp_path):
    result = renamed(random_result(n=12), {"CAS": "overall", "MAD": "margin"})
    result.report(tmp_path, main="overall", **QUICK)
    tables = tmp_path / "tables"
    assert set(pd.read_csv(tables / "effects-overall.csv")) >= {"selector", "self effect"}
    of_main = [path for path in tables.glob("effects-overall-*.csv")]
    assert [set(pd.read_csv(path)) >= {"group", "self effect"} for path in of_main] == [True]


def parsed(text):
    """A number as a table prints it, or None."""
    plain = str(text).replace("−", "-")
    return float(plain) if re.fullmatch(r"-?\d+(\.\d+)?(e-?\d+)?", plain) else None


def cells_of(page, number):
    """The cells of the page's table of that section, row by row."""
    inner = re.search(rf'<section id="table-{number}">.*?<tbody>(.*?)</tbody>', page, re.DOTALL)[1]
    return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", inner)]


def test_nothing_prints_as_zero_that_is_not(tmp_path):
    values = [0.0001, 0.00025, 0.0005, 0.0025, 1e-7, -3e-5, 0.0999, 0.1, 1.23456, 0.0, 250.0]
    result = random_result(n=12)
    settings = {"r=0.01": "r=0.00025", "r=0.001": "r=0.0000001", "r=0.02": "r=0.12345678"}
    for old, new in settings.items():
        masks = [replace(mask, selector=mask.selector.replace(f"[{old}]", f"[{new}]")) for mask in result.masks]
        result = replace(result, masks=tuple(masks))
    page = result.report(tmp_path, tables={"mine": pd.DataFrame({"value": values})}, **QUICK)
    page = page.read_text(encoding="utf-8")
    for (text,), value in zip(cells_of(page, "mine"), values, strict=True):
        assert parsed(text) == pytest.approx(value, rel=0.006)
    latex_rows = re.findall(r"^(\S+) \\\\$", (tmp_path / "tables" / "mine.tex").read_text("utf-8"), re.MULTILINE)
    assert [parsed(row.replace("$-$", "−")) for row in latex_rows[1:]] == [
        parsed(row[0]) for row in cells_of(page, "mine")
    ]
    curve = pd.read_csv(tmp_path / "tables" / "curve-cas-r.csv", dtype=str)
    assert curve["r"].tolist() == ["1e-07", "0.00025", "0.12345678"]
    assert [row[0].replace("−", "-") for row in cells_of(page, "curve-cas-r")] == curve["r"].tolist()


def test_every_number_of_the_effects_can_be_read_back(report):
    result, folder, _ = report
    summary = result.summary(**QUICK).set_index(["selector", "group"])
    printed = pd.read_csv(folder / "tables" / "effects-cas.csv", dtype=str).set_index("group")
    for group, row in printed.iterrows():
        exact = summary.loc["CAS", group]
        for column, name in {"self effect": "self_effect", "cross effect": "cross_effect", "gap": "gap"}.items():
            wanted = [100 * exact[f"{name}{end}"] for end in ("", "_low", "_high")]
            read = [float(text.replace("−", "-")) for text in re.findall(r"−?[\d.]+", row[column])]
            for number, value in zip(read, wanted, strict=False):
                assert number == pytest.approx(value, abs=0.0501)
                assert (number == 0) == (abs(value) < 1e-9)
        for column in ("clean", "flips"):
            assert parsed(row[column]) == pytest.approx(100 * exact[column], abs=0.0501)
    pairs = result.pairs("CAS", **QUICK).set_index(["mask", "group"])
    shown = pd.read_csv(folder / "tables" / "pairs.csv", dtype=str)
    for row in shown.itertuples(index=False):
        assert parsed(row.delta) == pytest.approx(100 * pairs.loc[(row.mask, row.group), "delta"], abs=0.0501)


def test_latex_escapes_every_character():
    table = pd.DataFrame({"a_b": [r"50 % & \x {y} #1 $ ~ ^ < −1"], "n": [0.5]})
    text = latex(table, "100 % sure", "tab:x")
    assert r"50 \% \& \textbackslash{}x \{y\} \#1 \$ \textasciitilde{} \textasciicircum{} $<$ $-$1 & 0.500 \\" in text
    assert r"a\_b & n \\" in text
    assert r"\caption{100 \% sure}" in text
    assert text.count(r"\begin{tabular}{lr}") == 1


def test_a_result_without_effects_has_no_report(tmp_path):
    result = random_result(n=15)
    empty = KnockoutResult((), (), result.answers[:0], result.masks, result.chosen[:, :0], result.margins[:, :0])
    with pytest.raises(MismatchError, match="there is nothing to report: the result has no questions"):
        empty.report(tmp_path)
    with pytest.raises(MismatchError, match="main='LAP' has no masks here; there are CAS, MAD, random"):
        result.report(tmp_path, main="LAP", **QUICK)
    with pytest.raises(MismatchError, match="effect 'harm' is not in the summary; it has self_effect"):
        plot_effects(result.summary(**QUICK), effects=["harm"])


def test_groups_and_selectors_of_any_name_are_reported(tmp_path, monkeypatch):
    only_these_fonts(monkeypatch)
    monkeypatch.setattr(matplotlib, "__version__", "3.11.0")  # else it is said that letters are not joined
    result = random_result(n=12, controls=0)
    names = {"BRA": "<b>&amp;", "EGY": "مصر", "JPN": "日本 $x_1$ \\", "SGP": "a name that is far longer than any code"}
    masks = tuple(Mask(f"{m.selector} <i>/..", m.repeat, names[m.group], m.size) for m in result.masks[:8])
    groups = tuple(names[group] for group in result.groups)
    odd = KnockoutResult(result.ids, groups, result.answers, masks, result.chosen[:9], result.margins[:9])
    with pytest.warns(UserWarning, match="no installed font has the letters 日本"):
        page = odd.report(tmp_path, **QUICK)
    text = page.read_text(encoding="utf-8")
    assert "<i>" not in text.replace("<img", "")
    assert "&lt;b&gt;" in text
    assert {path.parent for path in tmp_path.rglob("*.svg")} == {tmp_path / "figures"}


def test_the_command_line_tells_errors_in_a_line(tmp_path, capsys):
    assert main(["report", "--run", str(tmp_path)]) == 1
    assert "error:" in capsys.readouterr().err
    assert main(["select", "--items", str(tmp_path), "--out", str(tmp_path / "x")]) == 1
    assert "does not hold item statistics" in capsys.readouterr().err
    assert main(["dance"]) == 2
    assert capsys.readouterr().err.startswith("error: No such command 'dance'.")


def test_the_command_line_writes_a_report_again(tmp_path, capsys):
    random_result(n=12).save(tmp_path / "run")
    assert main(["report", "--run", str(tmp_path / "run"), "--main", "MAD", "--out", str(tmp_path / "page")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'page' / 'index.html'}\n"
    assert (tmp_path / "page" / "figures" / "effects.svg").exists()


def test_a_matrix_is_a_table_too_with_the_numbers_of_its_figure(report):
    result, folder, page = report
    matrix = 100 * result.matrix("CAS")
    printed = pd.read_csv(folder / "tables" / "matrix-cas.csv", dtype=str).set_index("neurons of")
    assert printed.columns.tolist() == [*result.group_names, *result.control_names]
    for mask, row in printed.iterrows():
        for group, text in row.items():
            assert parsed(text) == pytest.approx(matrix.loc[mask, group], abs=0.501)
    assert 'href="tables/matrix-cas.tex"' in page
    text = (folder / "tables" / "matrix-cas.tex").read_text("utf-8")
    assert text.startswith("% \\usepackage{booktabs,graphicx}")
    assert rf"\rotatebox{{90}}{{{printed.columns[0]}}} & \rotatebox" in text
    assert "Change, in points of accuracy; rows are masks, columns the questions' groups." in text
