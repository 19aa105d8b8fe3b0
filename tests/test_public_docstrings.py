"""The documentation of the code is whole: what is public has an entry, and a docstring that says all that it must.

What is checked: that every public name, method and property has an entry in the built pages of the API; that every
argument, attribute and error of the library is explained; that what is returned is said; that arrays have shapes and
units; that tables name their columns; and that methods from papers name the paper.
"""

import inspect
import re
from dataclasses import fields, is_dataclass, replace

import griffe
import numpy as np
import pandas as pd
import pytest
import yaml

import vlmneurons as vn
from helpers import some_questions
from public import API, Callee, callees, entries, own_bases, public_things, raised, sections
from test_effects import random_result
from test_trust import made_items
from vlmneurons import errors
from vlmneurons.selectors import Selector

THINGS = public_things()
CLASSES = {name: thing for name, thing in THINGS.items() if inspect.isclass(thing)}
CALLEES = callees()

VERBS = {"Ask", "Build", "Load", "Make", "Open", "Put", "Run", "Runs", "Write", "Would"}
"""A first line that begins so says what is done, not what is given."""

UNITS = re.compile(
    r"probabilit|nats|logit|points|share|accuracy|from -?\d to \d|standard deviation|Jaccard|correlation|activation|"
    r"uniform numbers|average precision|z-score|in the unit of|exact p of|p-values|bit for bit|``pre`` or ``up``",
    re.IGNORECASE,
)


def inherited(one: Callee) -> list[Callee]:
    """What a method overrides, in the library's own classes."""
    member = one.name.rpartition(".")[2]
    bases = own_bases(one.owner)[1:] if one.owner else []
    above = [(base, vars(base)[member]) for base in bases if inspect.isfunction(vars(base).get(member))]
    return [Callee(f"{base.__name__}.{member}", base, function) for base, function in above]


def explained(one: Callee) -> set[str]:
    """Names of the arguments that are explained, here or where the method is defined first."""
    names = set(entries(sections(one.doc).get("Args", "")))
    if one.name.endswith(".__init__"):
        of_class = sections(inspect.cleandoc(one.owner.__doc__ or ""))
        names |= {*entries(of_class.get("Args", "")), *entries(of_class.get("Attributes", ""))}
    return names.union(*(explained(above) for above in inherited(one)[:1]))


def test_everything_public_has_a_docstring():
    assert len(THINGS) > 90
    assert len(CALLEES) > 250
    bare = [name for name, thing in THINGS.items() if not thing.__doc__]
    assert not bare + [name for name, one in CALLEES.items() if not one.doc]


def test_a_first_line_is_a_sentence_of_its_own():
    for name, one in CALLEES.items():
        first, _, rest = one.doc.partition("\n")
        assert first.rstrip().endswith((".", "?", "!")), f"{name}: {first!r} does not end"
        assert not rest or rest.startswith("\n"), f"{name}: no empty line after the first"


def test_every_argument_is_explained_and_nothing_that_is_none():
    wrong = []
    for name, one in CALLEES.items():
        if one.is_property:
            continue
        there = {*one.parameters, *inspect.signature(one.function).parameters}
        wrong += [f"{name} does not explain {argument}" for argument in sorted(set(one.parameters) - explained(one))]
        told = entries(sections(one.doc).get("Args", ""))
        wrong += [f"{name} explains {argument}, which is none" for argument in told if argument not in there]
    assert not wrong, "\n".join(wrong)


def test_every_field_of_a_dataclass_is_explained():
    wrong = []
    for name, kind in CLASSES.items():
        if is_dataclass(kind):
            texts = [sections(inspect.cleandoc(base.__doc__ or "")) for base in own_bases(kind)]
            told = {one for text in texts for title in ("Attributes", "Args") for one in entries(text.get(title, ""))}
            public = {one.name for one in fields(kind) if not one.name.startswith("_")}
            wrong += [f"{name} does not explain {field}" for field in sorted(public - told)]
    assert not wrong, "\n".join(wrong)


def test_errors_that_the_code_raises_are_named():
    wrong = []
    for name, one in CALLEES.items():
        told = set(entries(sections(one.doc).get("Raises", "")))
        if name.endswith(".__init__"):
            told |= set(entries(sections(inspect.cleandoc(one.owner.__doc__ or "")).get("Raises", "")))
        for kind in sorted(raised(one)):
            if not told & {above.__name__ for above in getattr(errors, kind).__mro__}:
                wrong.append(f"{name} raises {kind}, and its docstring does not say when")
    assert not wrong, "\n".join(wrong)


def test_what_is_given_back_is_said_in_the_first_line_or_under_returns():
    wrong = []
    for name, one in CALLEES.items():
        if one.is_property or name.endswith("__init__") or one.returns in ("None", "<class 'NoneType'>"):
            continue
        text = sections(one.doc)
        if not one.returns:
            wrong.append(f"{name} has no annotation of what it returns")
        elif refers := re.match(r"See `([\w.]+)`\.", one.doc):
            if f"vlmneurons.{refers.group(1)}" not in CALLEES:
                wrong.append(f"{name} points to {refers.group(1)}, which is not public")
        elif one.doc.split()[0] in VERBS and not {"Returns", "Yields"} & set(text):
            wrong.append(f"{name} says what it does, and nowhere what it gives")
    assert not wrong, "\n".join(wrong)


def test_what_is_said_of_a_result_is_not_taken_for_its_type():
    # What stands before a colon in the first line would be shown in the place of the annotation, and, unless the site's
    # options say otherwise, each line as a result of its own.
    site = yaml.safe_load((API.parent.parent / "mkdocs.yml").read_text(encoding="utf-8"))
    plugin = next(one["mkdocstrings"] for one in site["plugins"] if "mkdocstrings" in one)
    how = plugin["handlers"]["python"]["options"]["docstring_options"]
    assert not how["returns_multiple_items"]
    wrong = []
    for name, one in CALLEES.items():
        for section in griffe.Docstring(one.doc).parse("google", **how, warnings=False):
            if section.kind.value in ("returns", "yields"):
                wrong += [f"{name}: {value.annotation!r}" for value in section.value if value.annotation]
    assert not wrong, "\n".join(wrong)


def test_arrays_have_shapes_and_those_of_floats_have_units():
    wrong = []
    for name, one in CALLEES.items():
        if not re.search("Tensor|ndarray", one.returns):
            continue
        annotated = re.search(r"(Float|Int|Bool)\d*\[\w+, '[\w. ]*'\]", one.returns)
        if not annotated and not re.search(
            r"``\[[\w., +]+\]``|``result\[group\]\[layer\]``|keyword arguments", one.doc
        ):
            wrong.append(f"{name} returns {one.returns}, and does not say of what shape")
        about = one.doc + inspect.cleandoc((one.owner.__doc__ if one.owner else "") or "")
        is_float = "Float" in one.returns or one.returns == repr(np.ndarray)
        if is_float and not UNITS.search(about) and name != "vlmneurons.Selector.score":
            wrong.append(f"{name} does not say in what unit")
    assert not wrong, "\n".join(wrong)


# -- papers ------------------------------------------------------------------------------------------------------------

ARXIV = re.compile(r"arXiv (\d{4}\.\d{5})")


def test_selectors_name_the_paper_that_the_methods_page_names(request):
    page = (request.config.rootpath / "docs" / "methods.md").read_text(encoding="utf-8")
    table = page.partition("## Selectors")[2].partition("##")[0]
    rows = {row.split("|")[1]: row for row in table.splitlines() if row.startswith("| `")}
    names = {cell: re.findall(r"`(\w+)`", cell.split("(")[0]) for cell in rows}
    from_papers = {name: set(ARXIV.findall(rows[cell])) for cell in rows for name in names[cell]}
    known = {name for name in vn.__all__ if inspect.isclass(thing := getattr(vn, name)) and issubclass(thing, Selector)}
    assert known - {"Selector", "ConAct"} <= set(from_papers), "a selector without its row in docs/methods.md"
    for name, papers in from_papers.items():
        doc = getattr(vn, name).__doc__
        told = set(ARXIV.findall(doc))
        assert papers <= told, f"{name}: docs/methods.md names {papers}, its docstring {told}"
        assert told or re.search("control|ours", doc), f"{name} says neither whose it is nor that it is ours"


OF_PAPERS = {
    "record": "2510.24942",
    "attribute": "2104.08696",
    "universal_neurons": "2605.12290",
    "load_cvqa": "2406.05967",
    "ItemStatistics.grouped": "2601.03115",
    "study.controls.strength_sweep": "2601.03115",
    "study.controls.item_sweep": "2608.08772",
}


@pytest.mark.parametrize("name", OF_PAPERS)
def test_other_methods_from_papers_name_them(name):
    assert OF_PAPERS[name] in CALLEES[f"vlmneurons.{name}"].doc


# -- tables ------------------------------------------------------------------------------------------------------------


WIDE = {
    "Selection.table": "Columns are layer numbers",
    "Selection.overlap": "tables of group x group",
    "KnockoutResult.matrix": "columns groups of questions",
    "KnockoutResult.curve": "The rows of `summary`",
}
"""Tables whose columns are not a fixed list, and what their docstrings say of them."""


def tables(folder, model) -> dict[str, pd.DataFrame]:
    """One of each table that the library gives."""
    counts = np.random.default_rng(0).binomial(50, 0.3, (60, 40))
    items = made_items(folder, counts, [("A", "B", "C")[n % 3] for n in range(60)])
    stats = items.group_by("group", condition="all")
    selection, other = vn.MAD(0.2).select(stats), vn.LAP(0.2).select(stats)
    result, questions = random_result(), some_questions(4)
    masks = {"x": vn.Selection({group: vn.NeuronSet(model.space(), [1, 2]) for group in "AB"})}
    drawn = list(vn.resampled_selections(items, vn.MAD(0.2), condition="all", resamples=3))
    layers = {"layers": ["language 0", "language 1"]}
    masked = replace(result, provenance=layers, masks=tuple(replace(one, layers=(4, 6)) for one in result.masks))
    compared = vn.compare({"a": masked, "b": random_result(1)}, permutations=20)
    return {
        **{f"Comparison.{name}": getattr(compared, name)() for name in ("table", "groups", "agreement", "profiles")},
        "ActivationStatistics.table": stats.table(),
        "KnockoutResult.answer_table": result.answer_table(),
        "KnockoutResult.table": result.table(),
        "KnockoutResult.summary": result.summary(permutations=20),
        "KnockoutResult.effects": result.effects(permutations=20),
        "KnockoutResult.pairs": result.pairs("CAS", permutations=20),
        "KnockoutResult.difference": result.difference("CAS", "MAD", permutations=20),
        "detectable": vn.detectable(50),
        "KnockoutResult.against_random": result.against_random("CAS", "random"),
        "screen": vn.screen(model, questions, masks, progress=False),
        "stability": vn.stability(items, vn.MAD(0.2), condition="all", resamples=3),
        "null_distribution": vn.null_distribution(items, vn.MAD(0.2), condition="all", permutations=3),
        "sample_sizes": vn.sample_sizes(items, vn.MAD(0.2), [5], condition="all", repeats=2),
        "agreement": vn.agreement({"MAD": selection, "LAP": other}),
        "relatedness": vn.relatedness(stats, vn.MAD(0.2)),
        "layer_counts": vn.layer_counts(selection),
        "layer_profile": vn.layer_profile(selection, resampled=drawn, uniform=20),
        "overlap_by_layer": vn.overlap_by_layer(selection["A"], other["A"]),
        "look.neuron_pages.NeuronView.table": vn.inspect_neuron(
            model, questions, ("language.layers.1.mlp.gate", 3), k=1
        ).table(),
        "neuron_writes": vn.neuron_writes(model, masks["x"]["A"], k=2),
    }


def test_every_column_of_every_table_is_explained(tmp_path, model):
    made = tables(tmp_path / "items", model)
    of_tables = {name.removeprefix("vlmneurons.") for name, one in CALLEES.items() if "DataFrame" in one.returns}
    assert of_tables == {*made, *WIDE}
    wrong = []
    for name, table in made.items():
        told = set(re.findall(r"``([\w\[\]=\" ]+)``", CALLEES[f"vlmneurons.{name}"].doc))
        endings = {one for one in told if one.startswith("_")}
        for column in [*table.columns, *filter(None, table.index.names)]:
            ways = {column, *(column.removesuffix(ending) for ending in endings if column.endswith(ending))}
            if not ways & told:
                wrong.append(f"{name} does not explain its column {column}")
    wrong += [
        f"{name} does not say {text!r}" for name, text in WIDE.items() if text not in CALLEES[f"vlmneurons.{name}"].doc
    ]
    assert not wrong, "\n".join(wrong)
