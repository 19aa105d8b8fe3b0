"""Odd questions, pictures, texts and tables: each is asked as it is, or refused with an error that names it.

`docs/abuse.md` has the table of these cases.
"""

import contextlib
import io
import json
import os
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import vlmneurons as vn
from abuse import damaged, limits
from helpers import picture, some_questions
from vlmneurons.errors import QuestionError
from vlmneurons.questions.media import picture_size
from vlmneurons.testing import tiny_model, tiny_template

QUICK = settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

HEADER = "image,question,options,answer,group,id\n"
ROW = 'a.png,What?,"[""x"", ""y""]",0,A,1\n'


def saved(image: Image.Image, form: str, **how) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **how)
    return file.getvalue()


def ask(n: int = 0, **changes) -> vn.Question:
    values = {"image": None, "question": "What?", "options": ("x", "y"), "answer": 0, "group": "A", "id": f"q{n}"}
    return vn.Question(**{**values, **changes})


# -- tables ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl"])
def test_a_damaged_table_is_read_or_refused(name, tmp_path):
    if name == "t.jsonl":
        row = {"image": "a.png", "question": "What?", "options": ["x", "y"], "answer": 0, "group": "A"}
        whole = "\n".join(json.dumps({**row, "id": n}) for n in range(8)).encode()
    else:
        whole = (HEADER + "".join(ROW.replace(",1\n", f",{n}\n") for n in range(8))).encode()
        whole = whole.replace(b",", b"\t") if name == "t.tsv" else whole
    with limits(60):
        for data in damaged(whole, 200):
            (tmp_path / name).write_bytes(data)
            with contextlib.suppress(QuestionError):
                assert len(vn.QuestionSet.from_folder(tmp_path)) >= 0


ANY = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
CELL = ANY | st.lists(ANY, max_size=4) | st.dictionaries(st.text(max_size=6), ANY, max_size=3)


def test_a_row_of_any_json_is_a_question_or_refused(tmp_path):
    names = ["image", "question", "options", "answer", "group", "id", "image_id", "A", "B", "C"]

    @QUICK
    @given(st.dictionaries(st.sampled_from(names) | st.text(max_size=6), CELL, max_size=8))
    def try_one(row):
        row = {"question": "What?", "options": ["x", "y"], "answer": 0, "group": "A", **row}
        (tmp_path / "t.jsonl").write_text(json.dumps(row), encoding="utf-8")
        with contextlib.suppress(QuestionError):
            (question,) = vn.QuestionSet.from_folder(tmp_path)
            assert 0 <= question.answer < len(question.options)
            assert all(isinstance(option, str) for option in question.options)
            repr(question)

    with limits(60):
        try_one()


@pytest.mark.parametrize(
    ("line", "message"),
    [('{"answer": ' + "9" * 5000 + "}", "line 1 is not JSON"), ("[" * 100_000, "line 1 is not JSON"),
     ("NaN", "line 1 is not a JSON object"), ('{"question": "q", "options": "[[[", "answer": 0, "group": "A"}',
      "options must be a JSON list"),
     ('{"question": "q", "options": "[' + "9" * 5000 + ']", "answer": 0, "group": "A"}', "options must be a JSON list"),
     ('{"question": "q", "options": ["x", "y"], "answer": "' + "9" * 5000 + '", "group": "A"}', "neither an index"),
     ('{"question": "q", "options": ["x", "y"], "answer": NaN, "group": "A"}', "neither an index"),
     ('{"question": "q", "options": ["x", "y"], "answer": 1e300, "group": "A"}', "is outside the options"),
     ('{"question": "q", "options": ["x", null], "answer": 0, "group": "A"}', "row 1: an option is missing"),
     ('{"question": "q", "options": {"x": 1}, "answer": 0, "group": "A"}', "no options"),
     ('{"question": "q", "options": ["x"], "answer": 0, "group": "A"}', "2 to 26 options; got 1"),
     ('{"question": "q", "options": ' + json.dumps(list("abcdefghijklmnopqrstuvwxyz0")) +
      ', "answer": 0, "group": "A"}', "2 to 26 options; got 27")],
)  # fmt: skip
def test_hostile_lines_say_what_is_wrong(line, message, tmp_path):
    (tmp_path / "t.jsonl").write_text(line, encoding="utf-8")
    with limits(), pytest.raises(QuestionError, match=message):
        vn.QuestionSet.from_folder(tmp_path)


@pytest.mark.parametrize(
    "path",
    ["../secret.png", "/etc/passwd", "a/../../secret.png", "a\0b.png", "x" * 5000, "loop", "outside/secret.png",
     "file:///etc/passwd/../../..", "~/../../../../../../../etc/passwd"],
)  # fmt: skip
def test_paths_that_lead_out_or_nowhere_are_refused_before_they_are_opened(path, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(saved(picture(), "PNG"))
    (folder / "loop").symlink_to("loop")
    (folder / "outside").symlink_to(tmp_path, target_is_directory=True)
    row = {"image": path, "question": "What?", "options": ["x", "y"], "answer": 0, "group": "A"}
    (folder / "t.jsonl").write_text(json.dumps(row), encoding="utf-8")
    with limits(), pytest.raises(QuestionError):
        vn.QuestionSet.from_folder(folder)[0].load_images()


def test_a_pipe_in_place_of_a_table_or_a_picture_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "t.csv")
    with limits(5), pytest.raises(QuestionError, match=r"t\.csv cannot be read: it is no ordinary file"):
        vn.QuestionSet.from_folder(tmp_path)
    (tmp_path / "t.csv").unlink()
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text(HEADER + ROW)
    with limits(5), pytest.raises(QuestionError, match=r"row 1, column 'image': the picture '.*a\.png' is no ordinary"):
        vn.QuestionSet.from_folder(tmp_path)
    for question in (ask(image=tmp_path / "a.png"), ask(image=lambda: str(tmp_path / "a.png"))):
        with limits(5), pytest.raises(QuestionError, match=r"cannot be opened .* is no ordinary file"):
            question.load_images()
        with limits(5), pytest.raises(OSError, match="is no ordinary file"):
            picture_size(question.image)
    (tmp_path / "t.csv").unlink()
    for name in ("t.csv", "t.tsv", "t.parquet", "t.arrow"):
        os.mkfifo(tmp_path / name)
        with limits(5), pytest.raises(QuestionError, match="is no ordinary file"):
            vn.load_cvqa(tmp_path / name)


def test_a_dataset_with_holes_is_refused_by_row():
    datasets = pytest.importorskip("datasets")
    for column, value, message in [
        ("options", ["x", None], "row 1: an option is missing"),
        ("options", None, "row 1: .* 2 to 26 options; got 0"),
        ("question", None, "row 1: no value for question"),
        ("group", "", "row 1: no value for group"),
        ("answer", None, "row 1: no value for answer"),
        ("answer", -1, "row 1: .* answer -1 is outside the options"),
    ]:
        rows = [{"question": "q", "options": ["x", "y"], "answer": 0, "group": "A", "id": str(n)} for n in range(2)]
        rows[1][column] = value
        with pytest.raises(QuestionError, match=message):
            vn.QuestionSet.from_dataset(datasets.Dataset.from_list(rows))


# -- pictures ----------------------------------------------------------------------------------------------------------


def test_postscript_is_not_opened_because_another_program_would_run_it(tmp_path):
    code = saved(picture(), "EPS")
    for source in (code, tmp_path / "a.eps", tmp_path / "a.png"):
        if not isinstance(source, bytes):
            source.write_bytes(code)
        with pytest.raises(QuestionError, match=r"cannot be opened .UnidentifiedImageError"):
            ask(image=source).load_images()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "JPEG2000"])
def test_damaged_pictures_open_or_name_their_question(form):
    whole = saved(picture(), form)
    with limits(60), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow tells of odd metadata
        for data in damaged(whole, 60):
            try:
                (image,) = ask(image=data).load_images()
            except QuestionError as error:
                refused = str(error)
            else:
                refused = "question 'q0': the picture"
                assert image.mode == "RGB"
            assert refused.startswith("question 'q0': the picture")


def test_a_picture_that_unpacks_to_gigabytes_is_refused():
    bomb = saved(Image.new("1", (20_000, 20_000)), "PNG")  # 50 KB that would become 1.2 GB of RGB
    assert len(bomb) < 100_000
    with limits(gibibytes=0.5), pytest.raises(QuestionError, match="DecompressionBomb"):
        ask(image=bomb).load_images()


ODD_PICTURES = {
    "1 x 1": Image.new("RGB", (1, 1), "red"),
    "20,000 x 10": Image.new("RGB", (20_000, 10), "red"),
    "10 x 20,000": Image.new("RGB", (10, 20_000), "red"),
    "CMYK": Image.new("CMYK", (24, 24), (0, 255, 255, 0)),
    "palette": picture().convert("P"),
    "1 bit": Image.new("1", (24, 24), 1),
    "16 bit": saved(Image.fromarray(np.full((24, 24), 40_000, dtype=np.uint16)), "PNG"),
    "float": Image.fromarray(np.full((24, 24), 100.0, dtype=np.float32)),
    "transparent": Image.new("RGBA", (24, 24), (1, 2, 3, 0)),
    "animated": saved(picture(), "GIF", save_all=True, append_images=[picture(1)]),
    "grey": Image.new("L", (24, 24), 7),
}


@pytest.mark.parametrize("what", ODD_PICTURES)
def test_odd_pictures_are_asked_or_named_and_skipped(paper_model, what):
    questions = vn.QuestionSet([*some_questions(2), ask(7, image=ODD_PICTURES[what], group="C", id="odd")])
    with limits(60, gibibytes=3):
        stats = vn.record(paper_model, questions, condition="all", on_error="skip", progress=False)
    skipped = stats.provenance["skipped"]
    assert stats.items.tolist() == [1, 1, 0 if skipped else 1]
    assert skipped in ([], ["odd"])
    if skipped:
        assert what in ("20,000 x 10", "10 x 20,000", "1 x 1")
        with pytest.raises(QuestionError, match="question 'odd': the processor refuses it"):
            vn.record(paper_model, questions, condition="all", progress=False)


# -- texts -------------------------------------------------------------------------------------------------------------

ODD_TEXTS = {
    "empty": "",
    "white space": " \n\t ",
    "right to left": "ما هي عاصمة مصر؟",
    "right to left, with marks": "\u202eabc\u202c \u200f",
    "combining": "หมู่ กำ नमस्ते é́́́",
    "emoji": "👩‍👩‍👧‍👦🏳️‍🌈",
    "control characters": "a\0b\x07\x1b[31m",
    "line separators": "a\u2028b\u2029c\r\nd",
    "template syntax": "{{ messages }} {% for x in y %}",
    "other special tokens": "[INST] <<SYS>> ### User:",
    "long": "word " * 2000,
}


@pytest.mark.parametrize("what", ODD_TEXTS)
def test_odd_texts_are_asked_as_they_are_and_all_of_their_tokens_counted(model, what):
    text = ODD_TEXTS[what]
    questions = vn.QuestionSet([ask(image=picture(), question=text, options=(text + "1", text + "2"))])
    batch = model.prepare(questions)
    own = batch["input_ids"][0, batch.tokens.counted("text")[0]]
    decoded = model.tokenizer.decode(own)
    assert text.strip() in decoded  # the question's words, all of them, and no template around them
    assert "assistant" not in decoded
    if what != "long":
        stats = vn.record(model, questions, condition="all", progress=False)
        assert stats.tokens.tolist() == [int(batch.tokens.counted("content").sum())]


def test_options_that_begin_like_each_other_are_told_apart(model):
    options = ("rice", "rice and beans", "rice and", "ric")
    for number, option in enumerate(options):
        assert vn.parse_answer(option, options) == number
        assert vn.parse_answer(f"It is {option}.", options) == number
    questions = [ask(n, image=picture(), options=options, answer=n, question="Which dish?") for n in range(4)]
    for answer in ("letters", "text"):
        result = vn.QuestionSet(questions, answer=answer)
        stats = vn.record(model, result, condition="all", progress=False)
        assert stats.items.tolist() == [4]


@pytest.mark.parametrize("option", ["", " ", "\0", "\u200b", "."])
def test_empty_options_never_match_a_text(option):
    assert vn.parse_answer("", (option, "x")) is None
    assert vn.parse_answer("The dish on the table", (option, "x")) is None


def test_no_text_and_no_options_make_the_parser_guess_or_fail():
    @settings(QUICK, max_examples=300)
    @given(st.text(max_size=60), st.lists(st.text(max_size=20), min_size=2, max_size=26))
    def try_one(text, options):
        chosen = vn.parse_answer(text, options)
        assert chosen is None or 0 <= chosen < len(options)

    with limits(60):
        try_one()
        for text in ("(" * 20_000, "answer is " * 5000, "A. " * 5000, "not " * 5000, "\u0301" * 20_000, ": " * 10_000):
            vn.parse_answer(text, ["x", "answer", "not", "A"])


# -- arguments that are none -------------------------------------------------------------------------------------------

SPACE = vn.NeuronSpace.from_widths("language", "gate", [8, 8])
STATS = vn.ActivationStatistics.from_counts(SPACE, ["A", "B"], [[n % 10 for n in range(16)], [3] * 16], [10, 10])

STRANGE = {
    "a width that is no whole number": lambda: vn.NeuronSpace.from_widths("language", "gate", [8.5]),
    "widths as text": lambda: vn.NeuronSpace.from_widths("language", "gate", "88"),
    "a tower that is a number": lambda: vn.NeuronSpace.from_widths(3, "gate", [8]),
    "a tower of two lines": lambda: vn.NeuronSpace.from_widths("a\nb", "gate", [8]),
    "a site of layer 10^23": lambda: SPACE.position("language.layers.99999999999999999999999.mlp.gate"),
    "a site of layer -1": lambda: vn.Site.parse("language.layers.-1.mlp.gate"),
    "a site with other digits": lambda: vn.Site.parse("language.layers.٣.mlp.gate"),
    "a site with a line end": lambda: vn.Site.parse("language.layers.3.mlp.gate\n"),
    "no site": lambda: vn.Site.parse(None),
    "a flat index that is NaN": lambda: SPACE.locate(float("nan")),
    "a flat index of 10^30": lambda: SPACE.flat("language.layers.0.mlp.gate", 10**30),
    "a mask of floats": lambda: vn.NeuronSet.from_mask(SPACE, torch.ones(16)),
    "a mask of text": lambda: vn.NeuronSet.from_mask(SPACE, "x" * 16),
    "no mask": lambda: vn.NeuronSet.from_mask(SPACE, None),
    "a ragged mask": lambda: vn.NeuronSet.from_mask(SPACE, [[True], [True, False]]),
    "pairs of three": lambda: vn.NeuronSet.from_pairs(SPACE, [(1, 2, 3)]),
    "a number for pairs": lambda: vn.NeuronSet.from_pairs(SPACE, 5),
    "a layer that is none": lambda: vn.NeuronSet.from_indices(SPACE, {None: [1]}),
    "a layer that is true": lambda: vn.NeuronSet.from_indices(SPACE, {True: [1]}),
    "a selection of lists": lambda: vn.Selection({"A": [1]}),
    "no selection": lambda: vn.Selection(None),
    "a budget of text": lambda: vn.Selection({"A": vn.NeuronSet(SPACE)}, budget="x"),
    "a budget below 0": lambda: vn.Selection({"A": vn.NeuronSet(SPACE)}, budget=-1),
    "provenance that no file can hold": lambda: vn.Selection({"A": vn.NeuronSet(SPACE)}, provenance={"x": object()}),
    "counts below 0": lambda: vn.ActivationStatistics.from_counts(SPACE, ["A"], [[-1] * 16], [1]),
    "counts above the tokens": lambda: vn.ActivationStatistics.from_counts(SPACE, ["A"], [[9] * 16], [1]),
    "counts of a half": lambda: vn.ActivationStatistics.from_counts(SPACE, ["A"], [[0.5] * 16], [1]),
    "a group twice": lambda: vn.ActivationStatistics.from_counts(SPACE, ["A", "A"], [[0] * 16] * 2, [1, 1]),
    "a fraction of text": lambda: vn.CAS("0.1"),
    "an infinite fraction": lambda: vn.CAS(float("inf")),
    "a count of 10^30": lambda: vn.CAS(count=10**30).select(STATS),
    "layers that are not there": lambda: vn.CAS(0.5, layers=[99]).select(STATS),
    "layers of text": lambda: vn.CAS(0.5, layers="abc").select(STATS),
    "nothing to select from": lambda: vn.CAS(0.5).select(),
    "two tables to select from": lambda: vn.CAS(0.5).select(STATS, STATS),
    "a rule times NaN": lambda: (vn.CAS(0.5) * float("nan")).select(STATS),
    "a rule over 0": lambda: (vn.CAS(0.5) / 0).select(STATS),
    "no conditions": lambda: vn.CRFusion(0.5).select({}),
    "nothing to match": lambda: vn.LayerMatchedRandom(None).select(STATS),
}


@pytest.mark.parametrize("what", STRANGE)
@pytest.mark.usefixtures("unchecked")
def test_arguments_that_make_no_sense_get_an_error_of_the_library(what):
    with limits(20), pytest.raises(vn.VLMNeuronsError) as caught:
        STRANGE[what]()
    assert len(str(caught.value)) > 15


# -- how many ----------------------------------------------------------------------------------------------------------


def test_five_hundred_groups_are_split_counted_and_selected_from():
    questions = vn.QuestionSet(ask(n, group=f"group {n % 500:03}") for n in range(2000))
    identify, evaluate = questions.split(0.5)
    assert set(identify.counts().values()) | set(evaluate.counts().values()) <= {1, 2, 3}
    assert len(repr(questions)) < 400
    space = vn.NeuronSpace.from_widths("language", "gate", [256] * 4)
    counts = torch.randint(0, 100, (500, 1024), generator=torch.Generator().manual_seed(0))
    groups = [f"group {n:03}" for n in range(500)]
    stats = vn.ActivationStatistics.from_counts(space, groups=groups, positive=counts, tokens=[100] * 500)
    with limits(60):
        for selector in (vn.CAS(0.01), vn.LAP(0.01), vn.LAPE(0.01), vn.MAD(0.01)):
            selection = selector.select(stats)
            assert len(selection) == 500
            assert max(map(len, selection.values())) <= 10
    assert repr(stats).count("\n") < 45


def test_one_group_is_recorded_but_neither_selected_from_nor_compared(model):
    questions = some_questions(3, groups="A")
    stats = vn.record(model, questions, condition="all", progress=False)
    assert stats.groups == ("A",)
    for selector in (vn.CAS(0.1), vn.LAPE(0.1), vn.MAD(0.1)):
        with pytest.raises(vn.errors.SelectionError, match="group"):
            selector.select(stats)
    with pytest.raises(QuestionError, match="a knockout compares groups"):
        vn.knockout(model, questions, {"x": vn.NeuronSet(model.space(), [1])})


def test_items_with_the_same_id_are_refused_wherever_they_meet():
    with pytest.raises(QuestionError, match="ids must be unique; more than once there are q0"):
        vn.QuestionSet([ask(), ask()])
    with pytest.raises(QuestionError, match="ids must be unique"):
        vn.QuestionSet([ask()]) + vn.QuestionSet([ask()])


# -- none, one, none with a picture, and pictures too small ------------------------------------------------------------


def test_no_questions_at_all_are_refused_wherever_they_are_asked(model, tmp_path):
    none, masks = vn.QuestionSet([]), {"x": vn.NeuronSet(model.space(), [1])}
    asks = {
        "there are no questions to record": lambda: vn.record(model, none, progress=False),
        "there are no questions to encode": lambda: model.prepare(none),
        "there are no questions to screen with": lambda: vn.screen(model, none, masks, progress=False),
        "there are no questions to attribute": lambda: vn.attribute(model, none, progress=False),
        "there are no questions to look at": lambda: vn.inspect_neurons(model, none, masks["x"]),
        "needs questions of at least two; got none": lambda: vn.knockout(model, none, masks, progress=False),
    }
    for told, run in asks.items():
        with pytest.raises(QuestionError, match=told):
            run()
    with pytest.raises(QuestionError, match="there are no questions to record"):
        vn.record_items(model, none, tmp_path / "items", progress=False)
    assert [len(half) for half in none.split(0.5)] == [0, 0]


def test_one_question_is_recorded_whatever_the_batch_and_compared_with_none(model):
    one = some_questions(1)
    found = [vn.record(model, one, condition="all", batch_size=size, progress=False) for size in (1, 8)]
    assert found[0] == found[1]
    assert found[0].items.tolist() == [1]
    with pytest.raises(QuestionError, match="needs questions of at least two; got A"):
        vn.knockout(model, one, {"x": vn.NeuronSet(model.space(), [1])}, progress=False)


@pytest.mark.parametrize("name", ["paligemma", "got_ocr2"])
def test_questions_of_which_none_has_a_picture_are_refused_by_a_model_that_wants_one(name):
    model = vn.VLM(*tiny_model(name), template=tiny_template(name))
    blind = vn.QuestionSet([ask(0), ask(1)])
    for answer in ("letters", "generate"):
        with pytest.raises(QuestionError, match=r"question 'q0': the processor refuses it .*images"):
            vn.record(model, blind.asked(answer=answer), condition="all", progress=False)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "mllama"])
def test_questions_of_which_none_has_a_picture_are_asked_and_a_vision_tower_counts_nothing(name):
    model = vn.VLM(*tiny_model(name), template=tiny_template(name))
    blind = vn.QuestionSet([ask(0), ask(1, group="B")])
    assert vn.record(model, blind, condition="all", progress=False).tokens.min() > 0
    assert vn.record(model, blind, model.space("vision"), condition="all", progress=False).tokens.tolist() == [0, 0]


def test_a_picture_that_a_processor_cannot_scale_is_named_and_may_be_skipped():
    model = vn.VLM(*tiny_model("mistral3"))
    dot, line = (Image.new("RGB", size, (9, 90, 200)) for size in ((1, 1), (200, 1)))
    good = [ask(n, image=picture(n), group="AB"[n]) for n in range(2)]
    how = {"condition": "all", "progress": False}
    assert vn.record(model, [*good, ask(2, image=dot)], **how).items.tolist() == [2, 1]
    mixed = [*good, ask(2, image=line)]
    with pytest.raises(QuestionError, match="question 'q2': the processor refuses it"):
        vn.record(model, mixed, **how)
    kept = vn.record(model, mixed, on_error="skip", **how)
    assert kept.items.tolist() == [1, 1]
    assert torch.equal(kept.positive, vn.record(model, good, **how).positive)
