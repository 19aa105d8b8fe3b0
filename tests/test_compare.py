"""Several models side by side: their tables, what differs between them, and the page."""

import itertools
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from scipy import stats as scipy_stats

import vlmneurons as vn
from helpers import PAPER_MODELS, picture
from test_report import Links
from vlmneurons.cli import main
from vlmneurons.errors import FileFormatError, MismatchError
from vlmneurons.study.masks import Mask, setting_name
from vlmneurons.study.result import KnockoutResult
from vlmneurons.trust.pvalues import holm


def drawn(seed, groups="ABCDE", n=15, model="m", layers=4, skip=()):
    """A random study: ``n`` questions a group, masks of two selectors and a sweep; harm is strongest at home."""
    random = np.random.default_rng(seed)
    names = [f"{letter}land" for letter in groups]
    of = np.repeat(np.array(names), n)
    answers = np.arange(len(of)) % 4  # of the questions, which all models are asked alike
    masks, rows = [], [np.where(random.random(len(of)) < 0.8, answers, (answers + 1) % 4)]
    selectors = [name for name in ("CAS", "MAD", setting_name("CAS", "r", 0.1)) if name not in skip]
    for selector, name in itertools.product(selectors, names):
        spread = random.multinomial(12, np.ones(layers) / layers)
        masks.append(Mask(selector, 0, name, 12, layers=tuple(int(number) for number in spread)))
        wrong = random.random(len(of)) < np.where(of == name, 0.5, 0.1) * (1 + (of == "Aland"))
        rows.append(np.where(wrong, (answers + 1) % 4, rows[0]))
    chosen = np.stack(rows)
    margins = np.where(chosen == answers, 1.0, -1.0) + random.random(chosen.shape)
    about = {"model": model, "layers": [f"language {number}" for number in range(layers)], "answer": "Letters()"}
    ids = tuple(f"{name}-{place}" for place, name in enumerate(of))
    pictures = tuple(f"{name}-{place // 2}" for place, name in enumerate(of))
    return KnockoutResult(ids, tuple(of), answers, tuple(masks), chosen, margins, about, pictures=pictures)


@pytest.fixture(scope="module")
def three():
    results = {"LLaVA": drawn(0), "Qwen": drawn(1, layers=6), "Pangea": drawn(2, groups="ABCDX", skip=("MAD",))}
    return vn.compare(results, permutations=150)


def test_the_table_is_that_of_each_model_corrected_over_models(three):
    table = three.table().set_index(["selector", "model"])
    assert list(table.index) == [("CAS", m) for m in ("LLaVA", "Qwen", "Pangea")] + [("MAD", "LLaVA"), ("MAD", "Qwen")]
    for name, result in three.results.items():
        own = result.summary(permutations=150).set_index(["selector", "group"])
        for selector in set(result.selectors) & {"CAS", "MAD"}:
            row, whole = table.loc[(selector, name)], own.loc[(selector, "all")]
            for column in ("n", "clean", "self_effect", "self_effect_low", "gap_high", "cross_caused", "p", "gap_p"):
                assert row[column] == pytest.approx(whole[column], abs=1e-12)
            assert row["groups"] == 5
    for column in ("p", "cross_p", "gap_p"):
        np.testing.assert_allclose(table.loc["CAS"][f"{column}_holm"], holm(table.loc["CAS"][column].tolist()))


def test_groups_say_in_how_many_models_they_are_harmed(three):
    groups = three.groups()
    for (_, group), rows in groups.groupby(["selector", "group"]):
        np.testing.assert_allclose(rows["p_holm"], holm(rows["p"].tolist()))
        assert set(rows["models"]) == {len(rows)}
        harmed = ((rows["self_effect"] < 0) & (rows["p_holm"] < 0.05)).sum()
        assert set(rows["harmed"]) == {harmed}
        assert (group == "Xland") <= (rows["model"].tolist() == ["Pangea"])
    assert groups["harmed"].max() == 3


def test_agreement_is_a_rank_correlation_tested_by_every_shuffle_of_the_groups(three):
    found = three.agreement()
    assert len(found) == 4
    for row in found.itertuples():
        a, b = (three.results[name].matrix(row.selector) for name in (row.first, row.second))
        shared = sorted(set(a.columns) & set(b.columns))
        assert row.groups == len(shared) == (4 if "Pangea" in (row.first, row.second) else 5)
        a, b = a.loc[shared, shared].to_numpy(), b.loc[shared, shared].to_numpy()
        cells = ~np.eye(len(shared), dtype=bool)
        for ours, p, where in ((row.spearman, row.p, ~cells), (row.cells, row.cells_p, cells)):
            expected = scipy_stats.spearmanr(a[where], b[where]).statistic
            assert ours == pytest.approx(expected)
            orders = list(itertools.permutations(range(len(shared))))
            drawn_ones = [scipy_stats.spearmanr(a[where], b[np.ix_(o, o)][where]).statistic for o in orders]
            assert p == pytest.approx(np.mean(np.abs(drawn_ones) >= abs(expected) - 1e-9))


def test_profiles_are_over_relative_depth(three):
    profiles = three.profiles()
    for (selector, model), rows in profiles.groupby(["selector", "model"]):
        result = three.results[model]
        shares = np.mean([np.array(mask.layers) / 12 for mask in result.masks if mask.selector == selector], axis=0)
        np.testing.assert_allclose(rows["share"], shares)
        np.testing.assert_allclose(rows["density"].mean(), 1)
        np.testing.assert_allclose(rows["depth"], (np.arange(len(rows)) + 0.5) / len(rows))
    assert set(profiles["selector"]) == {"CAS", "MAD"}


def test_profiles_are_drawn_as_a_line_a_model_over_relative_depth(three):
    profiles = three.profiles()
    for name, models in (("CAS", ["LLaVA", "Qwen", "Pangea"]), ("MAD", ["LLaVA", "Qwen"])):
        figure = vn.plot_profiles(profiles, name, width=3.3)
        *lines, even = figure.axes[0].lines
        assert [line.get_label() for line in lines] == models
        assert list(even.get_ydata()) == [1, 1]
        for model, line in zip(models, lines, strict=True):
            masks = [mask for mask in three.results[model].masks if mask.selector == name]
            share = np.mean([np.array(mask.layers) / sum(mask.layers) for mask in masks], axis=0)
            np.testing.assert_allclose(line.get_ydata(), share * len(share))
            np.testing.assert_allclose(line.get_xdata(), (np.arange(len(share)) + 0.5) / len(share))
        assert figure.axes[0].get_ylabel().replace("\n", " ") == f"Neurons of {name}, times even"
    axis = Figure().subplots()
    assert vn.plot_profiles(profiles, ax=axis) is axis.figure  # of the first selector
    assert len(axis.lines) == 4
    with pytest.raises(MismatchError, match="no profile of 'LAP'; there are those of CAS, MAD"):
        vn.plot_profiles(profiles, "LAP")
    with pytest.raises(MismatchError, match="no profile of None; there are those of no selector"):
        vn.plot_profiles(profiles[:0])


def test_models_with_several_towers_have_a_line_for_each(three):
    profiles = three.profiles()
    both = pd.concat([profiles, profiles.assign(tower="vision")])
    labels = [line.get_label() for line in vn.plot_profiles(both, "MAD").axes[0].lines]
    assert labels == ["LLaVA, language", "LLaVA, vision", "Qwen, language", "Qwen, vision", "evenly"]


def test_what_differs_is_said(three):
    assert three.notes == (
        "LLaVA was asked 75 questions and Pangea 75; 60 are the same.",
        "Qwen was asked 75 questions and Pangea 75; 60 are the same.",
        "Pangea has no masks of MAD.",
    )
    other = replace(drawn(0), provenance={"answer": "Generate()"})
    assert vn.compare({"a": drawn(0), "b": other}).notes == ("Answers are read by Letters() (a); Generate() (b).",)
    assert vn.compare({"a": drawn(0), "b": drawn(3)}).notes == ()
    told = "a was asked 75 questions and b 75; 74 are the same."  # of the same ids, with options in another order
    answers = np.concatenate([[(drawn(0).answers[0] + 1) % 4], drawn(0).answers[1:]])
    assert vn.compare({"a": drawn(0), "b": replace(drawn(3), answers=answers)}).notes == (told,)


@pytest.mark.parametrize("name", [1, None, ""])
def test_a_name_that_is_no_text_would_stand_for_another_and_is_refused(unchecked, name):
    with pytest.raises(MismatchError, match="the name of a model is a text that is not empty; got "):
        vn.compare({name: drawn(0), str(name or "b"): drawn(1)})


def test_sweeps_alone_are_not_compared():
    swept = drawn(0, skip=("CAS", "MAD"))
    with pytest.raises(MismatchError, match="all masks are settings of sweeps, which are not compared"):
        vn.compare({"a": swept, "b": swept})


def test_shuffles_that_leave_nothing_to_rank_count_against_agreement():
    results = {}
    for name, seed in (("a", 0), ("b", 1)):
        one = drawn(seed, groups="ABC", n=6)
        asked = np.ones(one.chosen.shape, dtype=bool)
        for row, mask in enumerate(one.masks, start=1):
            for place, group in enumerate(one.groups):  # three cells beside the self effects are there, and others not
                asked[row, place] = mask.group == group or (mask.group, group) in KNOWN
        results[name] = replace(one, asked=asked)
    compared = vn.compare(results)
    one, other = (result.matrix("CAS").to_numpy() for result in results.values())
    found = compared.agreement().query("selector == 'CAS'").iloc[0]
    ranked = []
    for order in itertools.permutations(range(3)):
        pairs = [(one[m, e], other[order[m], order[e]]) for m, e in itertools.permutations(range(3), 2)]
        known = np.array([pair for pair in pairs if not np.isnan(pair).any()])
        ranked.append(scipy_stats.spearmanr(*known.T).statistic if len(known) > 2 else np.nan)
    assert found["cells"] == pytest.approx(ranked[0])
    extreme = [np.isnan(one) or abs(one) >= abs(ranked[0]) - 1e-12 for one in ranked]
    assert np.isnan(ranked).any()
    assert found["cells_p"] == np.mean(extreme)


KNOWN = {("Aland", "Bland"), ("Bland", "Cland"), ("Aland", "Cland")}


def test_models_are_compared_on_a_value_that_all_hold(tmp_path):
    graded = replace(drawn(0), scores=np.random.default_rng(0).random(drawn(0).chosen.shape))
    assert vn.compare({"a": graded, "b": graded}).value == "score"
    assert vn.compare({"a": graded, "b": drawn(1)}).value == "correct"
    one = vn.compare({"a": drawn(0), "b": drawn(1)}, value="margin", permutations=20).table()
    assert one["self_effect"].tolist()[0] == pytest.approx(
        drawn(0).summary(value="margin", permutations=20).query("group == 'all'")["self_effect"].iloc[0]
    )
    with pytest.raises(MismatchError, match="'b': value='score': these answers have no score"):
        vn.compare({"a": graded, "b": drawn(1)}, value="score")
    with pytest.raises(MismatchError, match="value='luck' is not among those"):
        vn.compare({"a": graded, "b": drawn(1)}, value="luck")
    with pytest.raises(MismatchError, match="models are compared with each other: give at least two; got 1"):
        vn.compare({"a": graded})
    part = replace(drawn(1), provenance={"part": "1/4"})
    with pytest.raises(MismatchError, match="'b' is part 1/4 of a run: join it with the others first"):
        vn.compare({"a": graded, "b": part})
    with pytest.raises(FileFormatError, match="does not hold a knockout result"):
        vn.compare({"a": graded, "b": tmp_path})
    with pytest.raises(MismatchError, match="main='LAP' has no masks here; there are CAS, MAD"):
        vn.compare({"a": drawn(0), "b": drawn(1)}).report(tmp_path, main="LAP")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_the_command_writes_the_page_of_three_models(load, tmp_path, capsys):
    for name in PAPER_MODELS:
        model = load(name)
        items = [
            vn.Question(picture(i), f"What is {i}?", ("Tea", "Rice"), i % 2, "ABC"[i % 3], id=f"q{i}") for i in range(9)
        ]
        sets = {g: vn.NeuronSet(model.space(), range(n, 250, 4)) for n, g in enumerate("ABC")}
        masks = {"CAS": vn.Selection(sets)}
        vn.knockout(model, vn.QuestionSet(items), masks, folder=tmp_path / name / "knockout", progress=False)
    folders = [str(tmp_path / name) for name in PAPER_MODELS]
    assert main(["compare", *folders, "--out", str(tmp_path / "page")]) == 0
    told = capsys.readouterr().out
    assert told.splitlines()[-1] == str(tmp_path / "page" / "index.html")
    assert all(name in told for name in PAPER_MODELS)
    page = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    links = Links()
    links.feed(page)
    assert not links.open
    ids = set(re.findall(r'id="([^"]+)"', page))
    for link in links.found:
        assert link.startswith("data:") or (
            link[1:] in ids if link.startswith("#") else (tmp_path / "page" / link).stat().st_size > 0
        )
    for heading in ("Self against cross effect", "Where the neurons lie", "Which groups agree", "How alike two models"):
        assert heading in page
    written = pd.read_csv(tmp_path / "page" / "tables" / "models.csv")
    assert written["model"].tolist() == list(PAPER_MODELS)
    assert main(["compare", *folders, "--name", "a", "--name", "b"]) == 1
    assert "3 runs with the names a, b: give each one of its own" in capsys.readouterr().err
