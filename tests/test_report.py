"""The report of a study: a page that needs nothing else, figures and tables as files, names of any kind."""

import html
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pandas as pd
import pytest
import scipy.stats

import vlmneurons as vn
from helpers import picture
from test_effects import random_result
from test_plots import only_these_fonts
from vlmneurons.cli import main
from vlmneurons.errors import MismatchError
from vlmneurons.look.examples import changed_answers
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


def lines_of(page):
    """The lines of the page's head, by name."""
    return dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page))


def chosen(groups, shared=0, rule="MAD(count=10)"):
    """Sets of ten neurons of a small space, neighbours with some in common."""
    space = vn.NeuronSpace.from_widths("language", "gate", [512] * 4)
    starts = {group: n * (10 - shared) for n, group in enumerate(groups)}
    sets = {group: vn.NeuronSet(space, range(start, start + 10)) for group, start in starts.items()}
    provenance = {"statistics": {"tokens": "image", "condition": "correct"}, "items": dict.fromkeys(groups, 16)}
    return vn.Selection(sets, selector=rule, provenance=provenance)


def asked_in(result):
    """Questions as the result's could have been; each has a picture of its own."""
    place = {name: n for n, name in enumerate(result.ids)}
    return [
        vn.Question(
            picture(n), f"What is <this> no. {n}?", ("bread & butter", "rice", "tea", "soup"), int(result.answers[n]),
            result.groups[n], id=name, image_id=f"p{n}",
        )
        for name, n in place.items()
    ]  # fmt: skip


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A report that was given all that there is, what was given, and its folder."""
    result = random_result(n=12)
    null = {"group": ["BRA", "EGY"], "questions": 8, "pictures": 6, "movable": 0.875, "strength": [0.7, 0.4]}
    null |= {"null_mean": 0.1234, "null_high": 0.3, "p": [0.0005, 0.2], "p_holm": [0.001, 0.2], "p_bh": 0.2}
    given = {
        "selections": {"CAS": chosen(result.group_names), "MAD": chosen(result.group_names, shared=4)},
        "settings": {"Split": "half and half", "Seeds": "split: 7"},
        "questions": asked_in(result),
        "tables": {"null of the selection": pd.DataFrame(null).assign(p_holm_least=0.02)},
    }
    folder = tmp_path_factory.mktemp("full")
    return result, given, folder, result.report(folder, seed=3, **given, **QUICK).read_text(encoding="utf-8")


def test_the_head_says_how_many_neurons_of_which_site_by_which_tokens_split_and_seeds(full, report):
    result, _, _, page = full
    told = lines_of(page)
    sizes = {mask.size for mask in result.masks if mask.selector == "CAS"}
    assert told["Neurons a mask"].startswith(f"{min(sizes):,} of 2,048 (")
    assert told["Site"] == "language.gate, 4 layers x 512"
    assert told["Chosen by"] == "MAD(count=10), on 16 questions a group, answered right"
    assert told["Tokens counted"] == "image"
    assert told["Split"] == "half and half"
    assert told["Seeds"] == "split: 7; 20 sign flips: 3"
    bare = lines_of(report[-1])
    assert [bare[name] for name in ("Site", "Tokens counted", "Split")] == ["not known"] * 3


def test_every_figure_and_table_is_explained_and_no_column_has_the_name_of_a_program(report):
    _, _, page = report
    for section in re.findall(r'<section id="(?:figure|table|examples).*?</section>', page, re.DOTALL):
        assert len(re.search(r'<p class="caption">(.*?)(<span|</p>)', section, re.DOTALL)[1].strip()) > 25
    heads = re.findall(r"<th(?: class=.n.)?>(.*?)</th>", page)
    assert {"self effect", "control mean", "share of neurons", "Holm"} <= set(heads)
    assert not [head for head in heads if "_" in head or head in ("delta", "units", "few", "p holm", "r")]


def test_matrices_of_all_selectors_are_one_figure_which_links_to_each_alone(report):
    _, _, page = report
    (section,) = re.findall(r'<section id="figure-matrices">.*?</section>', page, re.DOTALL)
    assert section.count("<img") == 1
    for name in ("mad", "random"):
        assert f'href="figures/matrix-{name}.svg"' in section
        assert f'id="figure-matrix-{name}"' not in page
    assert 'id="figure-matrix-cas"' in page  # the main one is shown by itself too, with its numbers
    assert 'id="figure-flips-matrix"' in page


def test_overlaps_are_told_with_their_chance_and_drawn_where_there_are_any(full):
    result, given, _, page = full
    groups, selections = result.group_names, given["selections"]
    rows = {row[0]: row[1:] for row in cells_of(page, "overlap")}
    overlap = selections["MAD"].overlap()
    pairs = np.triu_indices(4, 1)
    mean = 100 * overlap["jaccard"].to_numpy()[pairs].mean()
    assert parsed(rows["MAD"][0]) == pytest.approx(mean, abs=0.05)
    assert parsed(rows["MAD"][2]) == pytest.approx(100 * 4 / 16, abs=0.05)
    matrix = result.matrix("MAD").loc[[*groups], [*groups]].to_numpy(dtype=float)
    both = scipy.stats.spearmanr(overlap["jaccard"].to_numpy()[pairs], ((matrix + matrix.T) / 2)[pairs]).statistic
    assert parsed(rows["MAD"][4]) == pytest.approx(both, abs=0.006)
    assert rows["CAS"] == ["0.0", rows["CAS"][1], "0.0", "–", "–"]
    assert 'id="figure-overlap"' in page
    assert 'id="figure-related"' in page


def test_examples_are_questions_whose_answer_changed_before_and_after(full):
    result, given, _, page = full
    questions = given["questions"]
    cards = re.findall(r'<article class="card">.*?</article>', page, re.DOTALL)
    assert 4 <= len(cards) <= 16
    by_id, seen = {item.id: item for item in questions}, set()
    for card in cards:
        group, name = re.search(r"<header>(.*?) · (\S+)", card).groups()
        n = result.ids.index(name)
        (row,) = [n for n in result.rows_of("CAS") if result.masks[n - 1].group == group]
        assert result.groups[n] == group
        before, after = (result.chosen[at, n] for at in (0, row))
        assert before != after
        shown = re.findall(r"<bdi class=.*?>(.*?)</bdi>", card)
        assert shown == [html.escape(by_id[name].options[at]) for at in (before, after)]
        assert card.count("data:image/webp;base64,") == 1
        assert "What is &lt;this&gt;" in card
        seen.add(name)
    assert len(seen) == len(cards)
    assert max(map(len, cards)) < 6000


def test_pictures_and_overlaps_that_there_are_not_are_not_shown(full, tmp_path):
    result, given, _, _ = full
    questions, selections = given["questions"], {"CAS": given["selections"]["CAS"]}
    how = {"questions": questions, "selections": selections, **QUICK}
    page = result.report(tmp_path, images=False, **how).read_text(encoding="utf-8")
    assert "image/webp" not in page
    assert "Without pictures." in page
    assert 'id="table-overlap"' in page
    assert 'id="figure-overlap"' not in page


def test_questions_that_are_not_those_of_the_result_are_refused(full):
    result, given, _, _ = full
    questions, how = given["questions"], {"images": True, "seed": 0}
    with pytest.raises(MismatchError, match="1 questions of the result are not among those given, such as 'q"):
        changed_answers(result, "CAS", questions[1:], **how)
    wrong = [replace(questions[0], answer=(questions[0].answer + 1) % 4), *questions[1:]]
    with pytest.raises(MismatchError, match="1 questions of the result are others than those given"):
        changed_answers(result, "CAS", wrong, **how)


def test_the_null_of_a_selection_is_drawn_and_its_table_kept_as_it_is(full):
    _, given, folder, page = full
    assert 'id="figure-null-of-the-selection"' in page
    rows = cells_of(page, "null-of-the-selection")
    assert rows[0] == ["BRA", "8", "6", "87.5", "0.700", "0.123", "0.300", "&lt; 0.001", "0.001", "0.200"]
    kept = pd.read_csv(folder / "tables" / "null-of-the-selection.csv")
    pd.testing.assert_frame_equal(kept, given["tables"]["null of the selection"])


def test_results_of_one_group_of_a_set_of_no_group_and_with_gaps_are_reported(tmp_path):
    result = random_result(n=15, controls=0)
    one = result.at(np.flatnonzero(np.array(result.groups) == "EGY")).select("CAS")
    kept = [n for n, mask in enumerate(one.masks) if mask.group == "EGY"]
    rows = [0, *(n + 1 for n in kept)]
    one = replace(one, masks=tuple(one.masks[n] for n in kept), chosen=one.chosen[rows], margins=one.margins[rows])
    page = one.report(tmp_path / "one", questions=asked_in(one), **QUICK).read_text(encoding="utf-8")
    assert "of 1 group." in page
    assert "of other groups" not in re.search(r'<p class="finding">(.*?)</p>', page)[1]
    bare = replace(one, masks=(replace(one.masks[0], selector="mine", group="all"),))
    page = bare.report(tmp_path / "bare", questions=asked_in(bare), **QUICK).read_text(encoding="utf-8")
    assert '<p class="finding">Switching off the neurons of mine moves questions by' in page
    asked = np.ones(result.chosen.shape, dtype=bool)
    asked[1, np.array(result.groups) == "JPN"] = False
    page = replace(result, asked=asked).report(tmp_path / "gaps", questions=asked_in(result), **QUICK)
    assert "grey was not asked" in page.read_text(encoding="utf-8")


def compiled(folder, tables, engine="pdflatex"):
    """Compile tables in a column of 3.3 inches; gives what LaTeX complains of."""
    page = r"\documentclass[twocolumn]{article}\usepackage[textwidth=6.75in,textheight=9in,columnsep=.15in]{geometry}"
    page += r"\usepackage[T1]{fontenc}\usepackage{booktabs,graphicx}\begin{document}"
    page += "".join(rf"\input{{{path}}}\clearpage " for path in tables) + r"\end{document}"
    (folder / "page.tex").write_text(page, encoding="utf-8")
    run = subprocess.run([engine, "-interaction=nonstopmode", "page.tex"], cwd=folder, capture_output=True, check=False)
    log = (folder / "page.log").read_text(encoding="utf-8", errors="replace")
    return [run.returncode, *re.findall(r"^!.*|^Overfull.*|.*Float too large.*", log, re.MULTILINE)]


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX is installed")
def test_every_table_compiles_and_fits_a_column_of_a_paper(report, tmp_path):
    _, folder, _ = report
    odd = pd.DataFrame(
        {
            "a_b & c": [
                r"_ & % # $ ~ ^ \ { } < > | \"",
                "[x]",
                "*",
                "an extraordinarily long name that nobody would cut",
            ],
            "self effect": ["−51.8 [−57.8, −45.9]", "0.1 (few)", "–", "−0.01 [−0.02, −0.0007]"],
            **{f"column no. {n}": [0.5, -1.25, np.nan, 1e-7] for n in range(9)},
            "word": ["W" * 60, "Füße", "x", "y"],
        }
    )
    (tmp_path / "odd.tex").write_text(latex(odd, "100 % odd_ones. More", "tab:odd"), encoding="utf-8")
    long = pd.DataFrame({"group": [f"Country {n}" for n in range(90)], "effect": "−51.8 [−57.8, −45.9]"})
    (tmp_path / "long.tex").write_text(latex(long, "Long", "tab:long"), encoding="utf-8")
    tables = [*sorted((folder / "tables").glob("*.tex")), tmp_path / "odd.tex", tmp_path / "long.tex"]
    assert len(tables) > 10
    assert compiled(tmp_path, tables) == [0]


def test_wide_tables_are_set_in_blocks_and_letters_without_a_font_are_named():
    wide = pd.DataFrame({"group": ["مصر"], **{f"effect {n}": ["−51.8 [−57.8, −45.9]"] for n in range(6)}})
    text = latex(wide, "Effects. With intervals", "tab:x")
    assert text.splitlines()[0].endswith("; XeLaTeX or LuaLaTeX, with a font that has رصم")
    assert text.count(r"\begin{tabular}") == 2
    assert text.count(r"\begin{table}") == 1
    assert text.count("مصر") == 2  # the name of the row stands in each block
    assert text.count(r"\tiny [$-$57.8, $-$45.9]") == 6


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
        effect = row.effect.partition(" ")[0]
        assert parsed(effect) == pytest.approx(100 * pairs.loc[(row.mask, row.group), "delta"], abs=0.0501)


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
