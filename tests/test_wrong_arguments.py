"""Arguments of a wrong kind: refused at once with the library's own error, which says what was given and is allowed.

The worst are those that Python takes without a word: True for 1, a text for the list of its letters, NaN, with which
every comparison is false, None that turns into a group named "None", a set whose order changes from run to run.
`docs/abuse.md` has the table of these cases.
"""

import dataclasses
import json

import datasets
import numpy as np
import pandas as pd
import pytest
import torch

import vlmneurons as vn
from helpers import picture, some_questions
from vlmneurons.checks import as_fraction, as_names, as_number, as_whole, check_kind, is_missing
from vlmneurons.errors import (
    AblationError,
    ArchitectureError,
    FileFormatError,
    MismatchError,
    QuestionError,
    SelectionError,
    SiteError,
    VLMNeuronsError,
)

pytestmark = pytest.mark.usefixtures("unchecked")  # the library's own checks are tried, not the tests' type checker

NAN = float("nan")
SPACE = vn.NeuronSpace.from_widths("language", "gate", [8, 8])
OTHER = vn.NeuronSpace.from_widths("language", "gate", [8, 9])
COUNTS = np.random.default_rng(0).integers(0, 9, (3, 16))
STATS = vn.ActivationStatistics.from_counts(SPACE, ["A", "B", "C"], COUNTS, [10] * 3, [4] * 3)
SELECTION = vn.CAS(0.2).select(STATS)
NEURONS = SELECTION["A"]
TABLE = datasets.Dataset.from_dict({"question": ["a"], "answer": [0], "group": ["A"], "A": ["x"], "B": ["y"]})


def ask(n: int = 0, **changes) -> vn.Question:
    metadata = {"number": n % 3, "nothing": None, "nan": NAN}
    values = {"question": "What?", "options": ("x", "y"), "answer": 0, "group": "AB"[n % 2], "id": f"q{n}"}
    return vn.Question(**{"image": None, "metadata": metadata, **values, **changes})


QUESTIONS = vn.QuestionSet(ask(n) for n in range(8))

QUESTION = {
    "id=None": (lambda: ask(id=None), "id is a text or a whole number; got None. Leave it out, and it is derived"),
    "id=True": (lambda: ask(id=True), "id is a text or a whole number; got True"),
    "id of NaN": (lambda: ask(id=NAN), "id is a text or a whole number; got nan"),
    "image_id of NaN": (lambda: ask(image_id=NAN), "image_id is a text or a whole number; got nan"),
    "metadata=3": (lambda: ask(metadata=3), "metadata is a dictionary of values by name; got 3"),
    "metadata=None": (lambda: ask(metadata=None), "metadata is a dictionary of values by name; got None"),
    "metadata of text": (lambda: ask(metadata="ab"), "metadata is a dictionary of values by name; got 'ab'"),
    "options that have no order": (lambda: ask(options={"x", "y"}), "options are a sequence of strings; got {"),
    "image=3": (lambda: ask(image=3), "a picture is a PIL image, a path, bytes or a function; got int"),
    "an array": (lambda: ask(image=np.zeros((4, 4, 3))), "got ndarray: PIL.Image.fromarray makes one"),
    "an empty path": (lambda: ask(image=""), "a picture's path is empty; give image=None"),
    "no set": (lambda: vn.QuestionSet(3), "a QuestionSet is made of a list of Question objects; got int"),
    "None for a set": (lambda: vn.QuestionSet(None), "made of a list of Question objects; got NoneType"),
    "a single question": (lambda: vn.QuestionSet(ask()), "made of a list of Question objects; got Question"),
    "prompt=3": (lambda: vn.QuestionSet([ask()], prompt=3), "prompt=3 is no prompt: give a function of a question and"),
    "answer=3": (lambda: vn.QuestionSet([ask()], answer=3), "answer=3 is not a way of reading answers; choose from"),
    "answer=None": (lambda: vn.QuestionSet([ask()], answer=None), "answer=None is not a way of reading answers"),
    "a reader's class": (
        lambda: vn.QuestionSet([ask()], answer=vn.Letters),
        "or give an AnswerReader, such as Generate",
    ),
    "shuffle=False": (lambda: vn.QuestionSet([ask()], shuffle=False), "or None to show them as they are; got False"),
    "shuffle of text": (lambda: vn.QuestionSet([ask()], shuffle="x"), "shuffle is a whole number; got 'x'"),
    "groups of None": (
        lambda: QUESTIONS.group_by(lambda item: None),
        "question 'q0' has None from the function that groups, which is no group: leave such questions out with filter",
    ),
    "a column of None": (lambda: QUESTIONS.group_by("nothing"), "question 'q0' has None in the column 'nothing'"),
    "a column of NaN": (lambda: QUESTIONS.group_by("nan"), "question 'q0' has None in the column 'nan'"),
    "a list of columns": (lambda: QUESTIONS.group_by(["number"]), "grouped by a column or a function of the question"),
    "filter of text": (
        lambda: QUESTIONS.filter("A"),
        "kept by a function, or by values such as group='Japan'; got 'A'",
    ),
    "balanced(1.5)": (lambda: QUESTIONS.balanced(1.5), "size is a whole number; got 1.5"),
    "balanced(True)": (lambda: QUESTIONS.balanced(True), "size is a whole number; got True"),
    "balanced(NaN)": (lambda: QUESTIONS.balanced(NAN), "size is a whole number; got nan"),
    "no seed": (lambda: QUESTIONS.balanced(2, seed=None), "seed is a whole number; got None"),
    "at_least of text": (lambda: QUESTIONS.at_least("x"), "size is a whole number; got 'x'"),
    "at_least(True)": (lambda: QUESTIONS.at_least(True), "size is a whole number; got True"),
    "split of text": (lambda: QUESTIONS.split("0.5"), "fraction is a number; got '0.5'"),
    "split(NaN)": (lambda: QUESTIONS.split(NAN), r"fraction nan is outside \(0, 1\)"),
    "split(True)": (lambda: QUESTIONS.split(True), "fraction is a number; got True"),
    "order of a number": (lambda: QUESTIONS.order(3), "question is a Question; got 3"),
    "a dataset of 3": (lambda: vn.QuestionSet.from_dataset(3), "from_dataset takes a datasets.Dataset; got int"),
    "a dataset of a list": (lambda: vn.QuestionSet.from_dataset([{}]), "got list. QuestionSet.from_rows reads"),
    "a dataset of splits": (
        lambda: vn.QuestionSet.from_dataset(datasets.DatasetDict({"train": TABLE, "test": TABLE})),
        "from_dataset takes one split; got a DatasetDict of train, test: choose one",
    ),
    "columns of text": (
        lambda: vn.QuestionSet.from_dataset(TABLE, "question"),
        "columns is a dictionary {field: column}",
    ),
    "a field that is none": (
        lambda: vn.QuestionSet.from_dataset(TABLE, {"imge": "question"}),
        "columns has no field 'imge'; a question has image, question",
    ),
    "a folder of 3": (lambda: vn.QuestionSet.from_folder(3), "folder is a path; got 3"),
    "a table of 3": (lambda: vn.QuestionSet.from_folder("x", 3), "table is the name of a file; got 3"),
    "CVQA of 3": (lambda: vn.load_cvqa(3), "source is a name on the Hub, a path or a datasets.Dataset; got 3"),
    "CVQA of x items": (lambda: vn.load_cvqa("x.tsv", min_items="x"), "min_items is a whole number; got 'x'"),
    "no text": (lambda: vn.parse_answer(None, ["x", "y"]), "text is a text; got None"),
    "options of one text": (
        lambda: vn.parse_answer("A", "xy"),
        "options must be a list of names; got the single text 'xy'",
    ),
    "no options": (lambda: vn.parse_answer("A", []), "there are no options that the text could name"),
    "no new tokens": (lambda: vn.Generate(max_new_tokens=0), "max_new_tokens 0 is less than 1"),
    "new tokens of text": (lambda: vn.Generate(max_new_tokens="x"), "max_new_tokens is a whole number; got 'x'"),
    "a prefix of 3": (lambda: vn.TextLikelihood(prefix=3), "prefix is a text; got 3"),
    "a set of questions": (lambda: vn.QuestionSet({ask()}), "made of a list of Question objects; got set"),
    "a set of options": (
        lambda: vn.parse_answer("A", {"x", "y"}),
        "options is a list of names; got a set, which has no",
    ),
}

TABLES = {
    "a group for groups": (lambda: STATS.select_groups("A"), "groups must be a list of names; got the single text 'A'"),
    "no groups": (lambda: STATS.select_groups(None), "groups must be a list of names; got None"),
    "a group of 3": (lambda: STATS.select_groups([3]), "groups must be a list of names; one is 3"),
    "merge None": (lambda: STATS.merge_groups(None), "merged is a dictionary, such as {'Asia': "),
    "merge a list": (lambda: STATS.merge_groups(["A"]), "merged is a dictionary, .*; got list"),
    "merge into 3": (lambda: STATS.merge_groups({"X": 3}), r"merged\['X'\] must be a list of names; got 3"),
    "no space": (lambda: vn.ActivationStatistics.from_counts(None, ["A"], [[0] * 16], [1]), "space is a NeuronSpace"),
    "counts of 3 groups": (lambda: vn.ActivationStatistics.from_counts(SPACE, 3, [[0]], [1]), "groups must be a list"),
    "jaccard with 3": (lambda: NEURONS.jaccard(3), "other is a NeuronSet, such as selection"),
    "jaccard with a selection": (lambda: NEURONS.jaccard(SELECTION), "other is a NeuronSet, .*; got Selection"),
    "disjoint from a list": (lambda: NEURONS.isdisjoint([1]), "other is a NeuronSet, .*; got list"),
    "overlap with 3": (lambda: vn.overlap_by_layer(NEURONS, 3), "second is a NeuronSet, .*; got 3"),
    "groups of LAPE": (lambda: vn.Selection.from_lape([[[1], [2]]], SPACE, None), "groups must be a list of names"),
    "no selections": (lambda: vn.agreement(None), "selections is a dictionary of selections by name; got None"),
    "selections of 3": (lambda: vn.agreement({"x": 3, "y": SELECTION}), r"selections\['x'\] is a Selection; got 3"),
    "layers of a set": (lambda: vn.layer_counts(NEURONS), "selection is a Selection; got NeuronSet"),
    "one selection for many": (
        lambda: vn.layer_profile(SELECTION, resampled=SELECTION),
        "resampled is several selections, such as resampled_selections gives; got a single one",
    ),
    "a plot of 3": (lambda: vn.plot_matrix(3), "result is a KnockoutResult, which knockout gives; got 3"),
    "a plot of a set": (lambda: vn.plot_layers(NEURONS), "selection is a Selection; got NeuronSet"),
    "a plot of no profiles": (
        lambda: vn.plot_profiles(3),
        "profiles is the table that Comparison.profiles gives; got 3",
    ),
    "ablate no model": (lambda: vn.Ablation(3, NEURONS), "model is a VLM, such as VLM.from_pretrained gives; got 3"),
    "record no model": (lambda: vn.record(3, QUESTIONS), "model is a VLM, such as VLM.from_pretrained gives; got 3"),
    "study no model": (lambda: vn.knockout(3, QUESTIONS, {"x": NEURONS}), "model is a VLM, .*; got 3"),
    "screen no model": (lambda: vn.screen(3, QUESTIONS, {"x": NEURONS}), "model is a VLM, .*; got 3"),
    "attribute no model": (lambda: vn.attribute(3, QUESTIONS), "model is a VLM, .*; got 3"),
    "run no model": (lambda: vn.run_study(None, QUESTIONS, "x"), "model is a VLM, .*; got None"),
    "a set of groups": (
        lambda: vn.ActivationStatistics.from_counts(SPACE, {"A", "B"}, [[0] * 16] * 2, [1, 1]),
        r"groups is a list of names; got a set, which has no order: sorted\(…\) gives it one",
    ),
    "a set to choose": (lambda: STATS.select_groups({"A", "B"}), "groups is a list of names; got a set, which"),
    "a set for LAPE": (lambda: vn.Selection.from_lape([[[1], [2]]], SPACE, {"A"}), "got a set, which has no order"),
    "resampled neurons": (
        lambda: vn.layer_profile(SELECTION, resampled=[3]),
        "each of resampled is a Selection; got 3",
    ),
    "resampled elsewhere": (
        lambda: vn.layer_profile(SELECTION, resampled=[vn.Selection({g: vn.NeuronSet(OTHER, [1]) for g in "ABC"})]),
        "the neurons are of different spaces",
    ),
    "no folder for items": (lambda: vn.record_items(None, QUESTIONS, "x"), "model is a VLM, .*; got None"),
    "no folder to load": (lambda: vn.KnockoutResult.load(None), "folder is a path; got None"),
}

SITES = {
    "a width for widths": (
        lambda: vn.NeuronSpace.from_widths("language", "gate", 8),
        "widths is a list with the width",
    ),
    "sites of 3": (lambda: vn.NeuronSpace(3, (4,)), "sites is a sequence of sites; got 3"),
    "the same as None": (lambda: SPACE.same_neurons(None), "other is a NeuronSpace; got None"),
    "a layer for layers": (lambda: SPACE.restrict(layers=1), "layers is a list of numbers; got 1"),
    "towers of 3": (lambda: SPACE.restrict(towers=3), "towers is a list of names; got 3"),
    "an empty set of nothing": (lambda: vn.NeuronSet.empty(None), "a NeuronSet needs a NeuronSpace; got NoneType"),
    "a full set of 3": (lambda: vn.NeuronSet.full(3), "a NeuronSet needs a NeuronSpace; got int"),
    "indices of no space": (lambda: vn.NeuronSet.from_indices(None, {0: [1]}), "needs a NeuronSpace; got NoneType"),
    "a mask of no space": (lambda: vn.NeuronSet.from_mask(None, [True]), "needs a NeuronSpace; got NoneType"),
    "a set of widths": (
        lambda: vn.NeuronSpace.from_widths("language", "gate", {8, 9}),
        "widths is a list with the width of each layer; got a set, which has no order",
    ),
    "a set of sites": (
        lambda: vn.NeuronSpace({vn.Site("language", 0), vn.Site("language", 1)}, (8, 9)),
        "sites is a sequence of sites; got a set, which has no order",
    ),
    "a boolean of PyTorch": (lambda: vn.NeuronSet(SPACE, [torch.tensor(True)]), r"tensor\(True\) is a boolean"),
}

SELECTORS = {
    "layers=True": (lambda: vn.CAS(0.5, layers=True), "a layer's number is a whole number; got True"),
    "a layer of a half": (lambda: vn.CAS(0.5, layers=[0.5]), "a layer's number is a whole number; got 0.5"),
    "conditions of 3": (lambda: vn.Conditions(3), "statistics is a dictionary of statistics by condition; got 3"),
    "universal in nothing": (
        lambda: vn.universal_neurons(STATS),
        "items is GroupedItems, which ItemStatistics.grouped",
    ),
    "no selector": (lambda: vn.relatedness(STATS, None), r"selector is a Selector, such as CAS\(0.01\); got None"),
    "a selector's class": (
        lambda: vn.selection_strength(STATS, vn.CAS),
        "selector is a Selector, .*; got the class CAS",
    ),
    "a selection for it": (lambda: vn.relatedness(STATS, SELECTION), "selector is a Selector, .*; got Selection"),
    "confidence of 95": (lambda: vn.layer_counts(SELECTION, confidence=95), r"confidence 95 is outside \(0, 1\)"),
    "confidence of NaN": (lambda: vn.layer_counts(SELECTION, confidence=NAN), r"confidence nan is outside \(0, 1\)"),
    "confidence of text": (lambda: vn.layer_counts(SELECTION, confidence="x"), "confidence is a number; got 'x'"),
    "0 uniform choices": (lambda: vn.layer_profile(SELECTION, uniform=0), "uniform 0 is less than 1"),
    "2.5 uniform choices": (lambda: vn.layer_profile(SELECTION, uniform=2.5), "uniform is a whole number; got 2.5"),
    "a profile of no seed": (lambda: vn.layer_profile(SELECTION, seed=None), "seed is a whole number; got None"),
    "a study's fraction": (lambda: vn.Protocol(fraction=2), r"fraction 2 is outside \(0, 1\]"),
    "a study's fraction of NaN": (lambda: vn.Protocol(fraction=NAN), "fraction nan is not finite"),
    "a sweep of one number": (lambda: vn.Protocol(fractions=0.1), "fractions is a list of numbers; got 0.1"),
    "strengths of text": (lambda: vn.Protocol(alphas=("x",)), "each of alphas is a number; got 'x'"),
    "sizes of 0": (lambda: vn.Protocol(sizes=(0,)), "sizes are numbers of questions, at least 1; got"),
    "a study's share": (lambda: vn.Protocol(share=NAN), r"share nan is outside \(0, 1\)"),
    "-1 repeats": (lambda: vn.Protocol(repeats=-1), "repeats -1 is less than 0"),
    "repeats=True": (lambda: vn.Protocol(repeats=True), "repeats is a whole number; got True"),
    "a study's batches": (lambda: vn.Protocol(batch_size=0), "batch_size 0 is less than 1"),
    "a study's minimum": (lambda: vn.Protocol(minimum="x"), "minimum is a whole number; got 'x'"),
    "a study's seed": (lambda: vn.Protocol(seed=None), "seed is a whole number; got None"),
    "a condition for several": (
        lambda: vn.Protocol(conditions="all"),
        "conditions must be a list of names; got the single",
    ),
    "another condition": (lambda: vn.Protocol(conditions=("right",)), "conditions='right' does not exist; choose from"),
    "other tokens": (lambda: vn.Protocol(tokens="word"), "tokens='word' does not exist; choose from content, image"),
    "another answer": (
        lambda: vn.Protocol(answer="letter"),
        "answer='letter' does not exist; choose from None, letters",
    ),
    "other errors": (lambda: vn.Protocol(on_error="pass"), "on_error='pass' does not exist; choose from raise, skip"),
    "a group twice": (
        lambda: vn.Selection([("A", NEURONS), ("A", vn.NeuronSet(SPACE, [5]))]),
        "a NeuronSet for each group, .* a group stands in it twice",
    ),
    "a condition of 3": (lambda: vn.Conditions({"3": STATS, 3: STATS}), "a condition's name is a text .*; got 3"),
    "a study of a set": (
        lambda: vn.Protocol(conditions={"all"}),
        "conditions is a list of names; got a set, which has",
    ),
}

OTHERS = {
    "a factor of text": (lambda: vn.Intervention(NEURONS, factor="x"), AblationError, "factor is a number; got 'x'"),
    "an architecture of None": (
        lambda: vn.register_architecture("X", None),
        ArchitectureError,
        "architecture is an Architecture; got None",
    ),
    "an architecture for 3": (
        lambda: vn.register_architecture(3, vn.Architecture()),
        ArchitectureError,
        "registered for a class's name or a function; got 3",
    ),
    "the towers of 3": (
        lambda: vn.testing.check_architecture(3),
        ArchitectureError,
        "hf_model is a loaded transformers model; got 3",
    ),
    "a model named 3": (
        lambda: vn.VLM.from_pretrained(3),
        ArchitectureError,
        "name_or_path is a name on the Hub, or a folder; got 3",
    ),
    "a file named 3": (lambda: NEURONS.save(3), FileFormatError, "path is a path; got 3"),
    "a file named None": (lambda: vn.Selection.load(None), FileFormatError, "path is a path; got None"),
    "a LAPE file named 3": (lambda: SELECTION.to_lape(3), FileFormatError, "path is a path; got 3"),
    "a recording named 3": (lambda: vn.ItemStatistics.load(3), FileFormatError, "folder is a path; got 3"),
    "a repository named 3": (lambda: vn.from_hub(3), VLMNeuronsError, "repo_id is a repository's name, .*; got 3"),
    "no repository": (lambda: vn.push_to_hub(NEURONS, None), VLMNeuronsError, "repo_id is a repository's .*; got None"),
}

CASES = {
    **{name: (make, QuestionError, message) for name, (make, message) in QUESTION.items()},
    **{name: (make, MismatchError, message) for name, (make, message) in TABLES.items()},
    **{name: (make, SiteError, message) for name, (make, message) in SITES.items()},
    **{name: (make, SelectionError, message) for name, (make, message) in SELECTORS.items()},
    **OTHERS,
}


@pytest.mark.parametrize("case", CASES)
def test_an_argument_of_a_wrong_kind_is_refused_with_what_is_allowed(case):
    make, error, message = CASES[case]
    with pytest.raises(error, match=message):
        make()


# -- with a model ------------------------------------------------------------------------------------------------------


def run(model, **how):
    return vn.record(model, some_questions(2), condition="all", progress=False, **how)


def study(model, masks=None, **how):
    masks = {"x": vn.NeuronSet(model.space(), [1, 70])} if masks is None else masks
    return vn.knockout(model, some_questions(4), masks, progress=False, **how)


def ablated(model, *how, **more):
    return vn.Ablation(model, vn.NeuronSet(model.space(), [1, 70]), *how, **more)


WITH_MODEL = {
    "batch_size=True": (lambda m: run(m, batch_size=True), QuestionError, "batch_size is a whole number; got True"),
    "batches of 1.5": (lambda m: run(m, batch_size=1.5), QuestionError, "batch_size is a whole number; got 1.5"),
    "prefetch of 1.5": (lambda m: run(m, prefetch=1.5), QuestionError, "prefetch is a whole number; got 1.5"),
    "a space of text": (
        lambda m: run(m, space="language"),
        MismatchError,
        "space is a NeuronSpace, such as model.space",
    ),
    "remote=3": (lambda m: run(m, remote=3), MismatchError, "remote=3 is no place to run; choose from False, True"),
    "a study's batches": (lambda m: study(m, batch_size=2.5), QuestionError, "batch_size is a whole number; got 2.5"),
    "a study's prefetch": (lambda m: study(m, prefetch="x"), QuestionError, "prefetch is a whole number; got 'x'"),
    "a study's controls": (
        lambda m: study(m, controls=3),
        QuestionError,
        "a QuestionSet is made of a list of Question",
    ),
    "a mask named None": (lambda m: study(m, {None: NEURONS}), MismatchError, "a mask's name is a text .*; got None"),
    "a mask named 1": (lambda m: study(m, {1: NEURONS}), MismatchError, "a mask's name is a text .*; got 1"),
    "a mask of no name": (
        lambda m: study(m, {"": NEURONS}),
        MismatchError,
        "a mask's name is a text that is not empty",
    ),
    "a factor of text": (lambda m: ablated(m, "scale", factor="x"), AblationError, "factor is a number; got 'x'"),
    "factor=True": (lambda m: ablated(m, "scale", factor=True), AblationError, "factor is a number; got True"),
    "values of text": (
        lambda m: ablated(m, "add", values="x", at="post"),
        AblationError,
        "values are a number or a tensor",
    ),
    "values=True": (lambda m: ablated(m, "add", values=True, at="post"), AblationError, "they are torch.bool"),
    "complex values": (lambda m: ablated(m, "add", values=1j, at="post"), AblationError, "they are torch.complex64"),
    "a label of 3": (
        lambda m: vn.Recorder(m).group(3).__enter__(),
        MismatchError,
        "label must be a list of names; got 3",
    ),
    "labels of None": (
        lambda m: vn.Recorder(m).group([None]).__enter__(),
        MismatchError,
        "label must be .* one is None",
    ),
    "a tower of 3": (lambda m: m.space(3), SiteError, "tower is the name of a tower, or a list of names; got 3"),
    "a site of 3": (lambda m: m.site(3), SiteError, "name is a Site, or the name of one; got 3"),
    "inputs of 3": (
        lambda m: m.prepare(3),
        QuestionError,
        "a QuestionSet is made of a list of Question objects; got int",
    ),
    "steps of 1.5": (lambda m: vn.attribute(m, some_questions(1), steps=1.5), QuestionError, "steps is a whole number"),
    "a threshold of text": (
        lambda m: vn.attribute(m, some_questions(1), threshold="x"),
        QuestionError,
        "threshold is a number; got 'x'",
    ),
    "screening by x": (
        lambda m: vn.screen(m, some_questions(2), {"x": NEURONS}, batch_size="x"),
        QuestionError,
        "batch_size is a whole number; got 'x'",
    ),
    "a neuron of text": (lambda m: vn.inspect_neuron(m, some_questions(2), "x"), SiteError, "whole number; got 'x'"),
    "neuron True": (lambda m: vn.inspect_neuron(m, some_questions(2), True), SiteError, "whole number; got True"),
    "a study of 3": (lambda m: vn.run_study(m, 3, "x"), QuestionError, "questions is a QuestionSet; got 3"),
    "a protocol of 3": (lambda m: vn.run_study(m, QUESTIONS, "x", 3), SelectionError, "protocol is a Protocol; got 3"),
    "sums by text": (lambda m: run(m, magnitudes="no"), MismatchError, "magnitudes is True or False; got 'no'"),
    "items' folder": (
        lambda m: vn.record_items(m, some_questions(2), 3, progress=False),
        MismatchError,
        "folder is a path; got 3",
    ),
    "a study's folder": (lambda m: study(m, folder=3), MismatchError, "folder is a path; got 3"),
    "a whole study's folder": (lambda m: vn.run_study(m, QUESTIONS, 3), MismatchError, "folder is a path; got 3"),
    "an MLP of 3": (lambda m: m.mlp_of(3), SiteError, "site is a Site, or the name of one; got 3"),
    "a value at 3": (lambda m: m.set_site(3, 0), SiteError, "name is a Site, or the name of one; got 3"),
    "a module of 3": (lambda m: m.envoy(3), SiteError, "path is the path of a module, .*; got 3"),
    "padding in the middle": (
        lambda m: m.prepare(some_questions(1), padding_side="middle"),
        QuestionError,
        "padding_side='middle' does not exist; choose from left, right",
    ),
    "padding nowhere": (
        lambda m: m.prepare(some_questions(1), padding_side=None),
        QuestionError,
        "padding_side=None does not exist",
    ),
    "a processor of 3": (lambda m: vn.VLM(m.hf, 3), ArchitectureError, "a processor makes .*; got 3. Make one"),
    "a template of text": (
        lambda m: vn.VLM(m.hf, m.processor, template="{}"),
        ArchitectureError,
        "template is a function .*; got '{}'",
    ),
}


@pytest.mark.parametrize("case", WITH_MODEL)
def test_an_argument_of_a_wrong_kind_is_refused_before_the_model_runs(model, case):
    make, error, message = WITH_MODEL[case]

    def refuse(*_):
        raise AssertionError("the model ran")

    handle = model.hf.register_forward_pre_hook(refuse)
    try:
        with pytest.raises(error, match=message):
            make(model)
    finally:
        handle.remove()


# -- of a recording and of a study -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recording(load, tmp_path_factory):
    model = load("qwen2_5_vl")
    return vn.record_items(model, some_questions(8), tmp_path_factory.mktemp("items"), progress=False)


@pytest.fixture(scope="module")
def result(load):
    return study(load("qwen2_5_vl"))


RULE = vn.CAS(0.1)

RECORDED = {
    "labels of 3": (
        lambda i, g: i.labels(3),
        MismatchError,
        "by is a column, a function, or a label for each question",
    ),
    "a minimum of NaN": (lambda i, g: i.grouped(minimum=NAN), SelectionError, "minimum is a whole number; got nan"),
    "balanced by 1.5": (lambda i, g: g.balanced(1.5), SelectionError, "size is a whole number; got 1.5"),
    "balanced by text": (lambda i, g: g.balanced("x"), SelectionError, "size is a whole number; got 'x'"),
    "a group for groups": (
        lambda i, g: g.select_groups("AB"),
        MismatchError,
        "list of names; got the single text 'AB'",
    ),
    "a group twice": (
        lambda i, g: g.select_groups(["A", "A"]),
        MismatchError,
        "groups are some of A, B, each once; got A",
    ),
    "no groups": (lambda i, g: g.select_groups([]), MismatchError, "groups are some of A, B, each once; got none"),
    "0 resamples": (lambda i, g: vn.stability(g, RULE, resamples=0), SelectionError, "resamples 0 is less than 1"),
    "resamples=True": (
        lambda i, g: vn.stability(g, RULE, resamples=True),
        SelectionError,
        "resamples is a whole number",
    ),
    "confidence of 95": (lambda i, g: vn.stability(g, RULE, confidence=95), SelectionError, "confidence 95 is outside"),
    "no seed": (lambda i, g: vn.stability(g, RULE, seed=None), SelectionError, "seed is a whole number; got None"),
    "a seed of -1": (lambda i, g: vn.stability(g, RULE, seed=-1), SelectionError, "seed -1 is less than 0"),
    "a selector's class": (
        lambda i, g: vn.stability(g, vn.CAS),
        SelectionError,
        "selector is a Selector, .* class CAS",
    ),
    "pools of text": (lambda i, g: vn.stability(g, RULE, method="pools", size="x"), SelectionError, "size is a whole"),
    "0 shuffles": (
        lambda i, g: vn.null_distribution(g, RULE, permutations=0),
        SelectionError,
        "permutations 0 is less",
    ),
    "a measure of 3": (
        lambda i, g: vn.null_distribution(g, RULE, measure=3),
        SelectionError,
        "measure is a function; got 3",
    ),
    "one size": (
        lambda i, g: vn.sample_sizes(g, RULE, 3),
        SelectionError,
        "sizes is a list of numbers of questions; got 3",
    ),
    "sizes of a half": (
        lambda i, g: vn.sample_sizes(g, RULE, [1.5]),
        SelectionError,
        "each of sizes is a whole number; got 1.5",
    ),
    "0 repeats": (lambda i, g: vn.sample_sizes(g, RULE, [2], repeats=0), SelectionError, "repeats 0 is less than 1"),
    "resampling nothing": (
        lambda i, g: vn.resampled_selections(3, RULE),
        SelectionError,
        "questions are drawn from Item",
    ),
    "labels by id": (
        lambda i, g: i.labels({item.id: "A" for item in i.items}),
        MismatchError,
        r"got a dict: give lambda row: labels\[row\['id'\]\]",
    ),
    "a set of labels": (lambda i, g: i.labels(set("ABCDEFGH")), MismatchError, "got a set, which has no order"),
    "row -1": (
        lambda i, g: list(i.chunks([-1])),
        MismatchError,
        r"rows are numbers of questions, from 0 to 7; got \[-1",
    ),
    "row 8": (lambda i, g: list(i.chunks([8])), MismatchError, "rows are numbers of questions, from 0 to 7"),
    "a mask of rows": (lambda i, g: list(i.chunks([True] * 8)), MismatchError, "rows are numbers of questions"),
    "rows by 0": (lambda i, g: list(i.chunks([0], size=0)), MismatchError, "size 0 is less than 1"),
}


@pytest.mark.parametrize("case", RECORDED)
def test_an_argument_of_a_wrong_kind_is_refused_by_what_reads_a_recording(recording, case):
    make, error, message = RECORDED[case]
    with pytest.raises(error, match=message):
        make(recording, recording.grouped(condition="all"))


STUDIED = {
    "confidence of text": (lambda r: r.summary(confidence="x"), "confidence is a number; got 'x'"),
    "no value": (lambda r: r.summary(value="grade"), "value='grade' is not among those that effects are"),
    "-1 sign flips": (lambda r: r.summary(permutations=-1), "permutations -1 is less than 0"),
    "no seed": (lambda r: r.summary(seed=None), "seed is a whole number; got None"),
    "pairs' confidence": (lambda r: r.pairs("x", confidence=95), r"confidence 95 is outside \(0, 1\)"),
    "pairs' flips": (lambda r: r.pairs("x", permutations=2.5), "permutations is a whole number; got 2.5"),
    "effects of nothing": (lambda r: r.effects("CAS "), "there is no selector 'CAS ' here; there are"),
    "a difference of one": (lambda r: r.difference("x", "x"), "two selectors are compared; got 'x' twice"),
    "a plot of 3": (lambda r: r.plot_matrix(3), "selector is the name of a selector, or a list of names; got 3"),
    "colours up to NaN": (lambda r: vn.plot_matrix(r, limit=NAN), "limit nan is not finite"),
    "colours up to -1": (
        lambda r: vn.plot_matrix(r, limit=-1),
        "limit -1 is the value at which colours end, and above 0",
    ),
    "colours up to True": (lambda r: vn.plot_matrix(r, limit=True), "limit is a number; got True"),
    "nothing drawn": (lambda r: r.plot_matrix([]), "there is no selector to draw"),
    "its own control": (lambda r: r.against_random("x", "x"), "'x' is compared with another name's masks; got it as"),
    "a report's folder": (lambda r: r.report(3), "folder is a path; got 3"),
    "a result's folder": (lambda r: r.save(3), "folder is a path; got 3"),
}


@pytest.mark.parametrize("case", STUDIED)
def test_an_argument_of_a_wrong_kind_is_refused_by_the_result_of_a_study(result, case):
    make, message = STUDIED[case]
    with pytest.raises(MismatchError, match=message):
        make(result)


# -- what is no wrong kind ---------------------------------------------------------------------------------------------


def test_numbers_of_numpy_and_pytorch_are_numbers(model):
    for number in (np.int64(2), np.uint8(2), torch.tensor(2)):
        assert QUESTIONS.balanced(number) == QUESTIONS.balanced(2)
        assert len(QUESTIONS.at_least(number)) == 8
        assert run(model, batch_size=number) == run(model, batch_size=2)
    for number in (np.float32(0.5), np.float64(0.5), torch.tensor(0.5)):
        assert QUESTIONS.split(number) == QUESTIONS.split(0.5)
        assert ablated(model, "scale", factor=number).factor == 0.5
    assert vn.QuestionSet([ask()], shuffle=np.int64(3)).order(ask()) == vn.QuestionSet([ask()], shuffle=3).order(ask())
    assert ask(id=3).id == ask(id=np.int64(3)).id == "3"


def test_numbers_of_numpy_are_kept_as_plain_ones(model, tmp_path):
    """Else a study could not note its settings, and one selection would have two names."""
    numbers = vn.Protocol(fraction=np.float32(0.5), fractions=[np.float64(0.1)], sizes=(np.int64(5),), seed=np.int8(3))
    plain = vn.Protocol(fraction=0.5, fractions=(0.1,), sizes=(5,), seed=3)
    assert numbers == plain
    assert json.dumps(dataclasses.asdict(numbers)) == json.dumps(dataclasses.asdict(plain))
    assert repr(vn.CAS(np.float64(0.1))) == repr(vn.CAS(0.1)) == "CAS(fraction=0.1)"
    assert repr(vn.CAS(count=np.int64(3))) == "CAS(count=3)"
    found = vn.attribute(
        model, some_questions(2), condition="all", threshold=np.float32(0.5), steps=np.int64(2), progress=False
    )
    assert found.provenance["threshold"] == 0.5
    items = vn.record_items(model, some_questions(2), tmp_path, magnitudes=np.True_, progress=False)
    assert "total" in items.tables


def test_names_of_numpy_and_pandas_are_names():
    for names_given in (np.array(["B", "A"]), pd.Series(["B", "A"]), dict.fromkeys("BA").keys(), iter("BA")):
        groups = STATS.select_groups(names_given).groups
        assert groups == ("B", "A")
        assert {type(group) for group in groups} == {str}
    assert STATS.merge_groups({"X": {"A", "B"}}) == STATS.merge_groups({"X": ["A", "B"]})  # a pool has no order


def test_any_collection_of_values_filters():
    expected = QUESTIONS.filter(number=[0, 1])
    assert len(expected) == 6
    for values in ({0, 1}, (0, 1), range(2), np.array([0, 1]), pd.Series([0, 1]), {0: "", 1: ""}.keys()):
        assert QUESTIONS.filter(number=values) == expected


def test_a_label_that_stands_for_nothing_leaves_a_question_out(recording):
    labels = ["A", None, "B", NAN, np.float32("nan"), pd.NA, pd.NaT, "B"]
    assert recording.labels(labels) == ["A", None, "B", None, None, None, None, "B"]
    assert recording.grouped(labels, condition="all").items.tolist() == [1, 2]


def test_a_study_in_a_folder_is_not_gone_on_with_by_other_values_of_numpy(model, tmp_path):
    """The text of a long array leaves out its middle, where these two differ."""
    masks = {"x": vn.NeuronSet(model.space(), [1, 70])}
    values, one = np.zeros(len(model.space())), np.zeros(len(model.space()))
    one[120] = 1
    with np.printoptions(threshold=10):
        study(model, masks, mode="replace", values=values, at="post", folder=tmp_path)
        with pytest.raises(MismatchError, match=r"its masks\.x is"):
            study(model, masks, mode="replace", values=one, at="post", folder=tmp_path)


def test_pictures_may_be_all_that_opens(tmp_path):
    picture().save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    for source in (picture(), str(tmp_path / "a.png"), tmp_path / "a.png", data, lambda: data, {"bytes": data}):
        assert ask(image=source).load_images()[0].size == (32, 24)


@pytest.mark.parametrize("value", [True, np.bool_(True), torch.tensor(True), 1.0, "1", None, NAN, [1], torch.ones(2)])
def test_what_is_no_whole_number(value):
    with pytest.raises(QuestionError, match="x is a whole number; got "):
        as_whole("x", value, QuestionError)


def test_the_checks_say_what_they_are_for():
    assert as_whole("x", np.int8(3), QuestionError, least=3) == 3
    with pytest.raises(QuestionError, match="x 3 is less than 4"):
        as_whole("x", 3, QuestionError, least=4)
    for value, message in (
        (float("inf"), "x inf is not finite"),
        (np.array([1.0]), "x is a number; got ndarray"),
        ("1", "x is a number; got '1'"),
        (False, "x is a number; got False"),
        (1j, "x is a number; got complex"),
    ):
        with pytest.raises(SelectionError, match=message):
            as_number("x", value, SelectionError)
    for value in (0, 1, -1.5, NAN, float("inf")):
        with pytest.raises(SelectionError, match=r"x .* is outside \(0, 1\)"):
            as_fraction("x", value, SelectionError)
    assert as_names("x", (one for one in "ab"), QuestionError) == ("a", "b")
    with pytest.raises(QuestionError, match=r"x is an int or a str; got list"):
        check_kind("x", [], (int, str), QuestionError)
    with pytest.raises(QuestionError, match=r"x is a text; got '" + "y" * 58 + "…"):
        check_kind("x", "y" * 100, int, QuestionError, "a text")
    assert [is_missing(value) for value in (None, NAN, pd.NA, pd.NaT, 0, "", "nan", ())] == [True] * 4 + [False] * 4
