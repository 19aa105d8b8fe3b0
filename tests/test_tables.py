"""No table drops a picture, an option or a label: each form is asked with whole, or refused by row and column."""

import base64
import io
import json
import logging
import re

import datasets
import numpy as np
import pandas as pd
import pytest
from PIL import Image

import vlmneurons as vn
from abuse import limits
from helpers import picture
from vlmneurons.errors import QuestionError

FOUR = ["Tea", "Rice", "Bread", "Soup"]
List = getattr(datasets, "List", datasets.Sequence)  # called so before datasets 4
IMAGE, TEXT, MANY = datasets.Image(), datasets.Value("string"), List(datasets.Image())
STRUCT = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}


def png(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


def text_of(seed: int = 0) -> str:
    return base64.b64encode(png(seed)).decode()


def row(**more) -> dict:
    return {"question": "What?", "options": FOUR, "answer": 1, "group": "A", **more}


def made(columns: dict, features: dict) -> datasets.Dataset:
    """A dataset of as many rows as the columns have, each a question."""
    n = len(next(iter(columns.values())))
    plain = {"question": [f"What is {i}?" for i in range(n)], "options": [FOUR] * n, "answer": [1] * n}
    plain["group"] = ["A"] * n
    forms = {"question": TEXT, "options": List(TEXT), "answer": datasets.Value("int64"), "group": TEXT}
    given = datasets.Features({**{name: form for name, form in forms.items() if name not in features}, **features})
    return datasets.Dataset.from_dict({**plain, **columns}, features=given)


def seen(questions: vn.QuestionSet) -> list[list[int]]:
    """Which of the test's pictures each question shows, in order, by their pixels."""
    known = {picture(seed).tobytes(): seed for seed in range(8)}
    return [[known[image.tobytes()] for image in question.load_images()] for question in questions]


P = [picture(seed) for seed in range(8)]

# -- every form of a picture in a dataset ------------------------------------------------------------------------------

ASKED = {
    "a column of pictures": ({"image": [P[0], P[1]]}, {"image": IMAGE}, None, [[0], [1]]),
    "some without": ({"image": [P[0], None]}, {"image": IMAGE}, None, [[0], []]),
    "lists of pictures": ({"image": [[P[0], P[1]], [], [P[2]]]}, {"image": MANY}, None, [[0, 1], [], [2]]),
    "lists by another name": ({"images": [[P[0], P[1]], [P[2]]]}, {"images": MANY}, "images", [[0, 1], [2]]),
    "a list that is missing": ({"image": [[P[0]], None]}, {"image": MANY}, None, [[0], []]),
    "two columns": (
        {"image_1": [P[0], P[1]], "image_2": [P[2], None]}, {"image_1": IMAGE, "image_2": IMAGE},
        ["image_1", "image_2"], [[0, 2], [1]],
    ),
    "seven columns": (
        {f"image_{n}": [P[n], P[0] if n < 3 else None] for n in range(1, 8)},
        {f"image_{n}": IMAGE for n in range(1, 8)},
        [f"image_{n}" for n in range(1, 8)], [[1, 2, 3, 4, 5, 6, 7], [0, 0]],
    ),
    "rows that name theirs differently": (
        {"photo": [P[0], None], "drawing": [None, P[1]]}, {"photo": IMAGE, "drawing": IMAGE},
        ["photo", "drawing"], [[0], [1]],
    ),
    "a picture and a list": (
        {"first": [P[0]], "more": [[P[1], P[2]]]}, {"first": IMAGE, "more": MANY}, ["first", "more"], [[0, 1, 2]],
    ),
    "encoded files": ({"image": [{"bytes": png(3), "path": "a.png"}]}, {"image": STRUCT}, None, [[3]]),
    "lists of encoded files": (
        {"image": [[{"bytes": png(3), "path": None}, {"bytes": png(4), "path": None}]]}, {"image": [STRUCT]}, None,
        [[3, 4]],
    ),
    "bytes": ({"image": [png(5)]}, {"image": datasets.Value("binary")}, None, [[5]]),
    "base64": ({"image": [text_of(5), ""]}, {"image": TEXT}, None, [[5], []]),
    "base64 with line ends": ({"image": [base64.encodebytes(png(5)).decode()]}, {"image": TEXT}, None, [[5]]),
    "base64 for addresses": (
        {"image": [base64.urlsafe_b64encode(png(5)).decode()]}, {"image": TEXT}, None, [[5]],
    ),
    "a data URL": ({"image": ["data:image/png;base64," + text_of(6)]}, {"image": TEXT}, None, [[6]]),
    "lists of base64": ({"image": [[text_of(1), text_of(2)]]}, {"image": List(TEXT)}, None, [[1, 2]]),
    "the text of a list of base64": (
        {"image": [json.dumps([text_of(1), text_of(2)])]}, {"image": TEXT}, None, [[1, 2]],
    ),
}  # fmt: skip


def columns_of(image) -> dict | None:
    return None if image is None else {"image": image}


@pytest.mark.parametrize("form", ASKED)
def test_every_picture_of_a_dataset_is_asked_with(form):
    columns, features, image, expected = ASKED[form]
    questions = vn.QuestionSet.from_dataset(made(columns, features), columns=columns_of(image))
    assert [item.n_images for item in questions] == list(map(len, expected))
    assert seen(questions) == expected
    assert not any(item.metadata for item in questions)


@pytest.mark.parametrize(
    "form", ["a column of pictures", "lists of pictures", "two columns", "encoded files", "base64"]
)
@pytest.mark.parametrize(
    "how", ["shuffled", "streaming", "transform", "torch", "rows", "pandas", "stream of a transform"]
)
def test_however_a_dataset_is_handed_over_its_pictures_are_the_same(form, how):
    columns, features, image, expected = ASKED[form]
    dataset = made(columns, features)
    order = list(range(len(expected)))
    if how in ("rows", "pandas"):
        rows = list(dataset)
        rows = pd.DataFrame(rows) if how == "pandas" else rows
        questions = vn.QuestionSet.from_rows(rows, columns=columns_of(image))
    else:
        if how == "shuffled":
            order = order[::-1]
            dataset = dataset.select(order)
        elif how == "streaming":
            dataset = dataset.to_iterable_dataset()
        elif how == "torch":
            dataset = dataset.with_format("torch", columns=["question"])
        elif how == "stream of a transform":
            dataset = dataset.to_iterable_dataset().map(lambda values: values)
        elif how == "transform":
            dataset = dataset.with_transform(lambda batch: {**batch, "seen": [1] * len(batch["question"])})
        questions = vn.QuestionSet.from_dataset(dataset, columns=columns_of(image))
    assert seen(questions) == [expected[n] for n in order]


def test_pictures_that_only_a_transform_makes_are_asked_with_and_made_when_they_are_needed():
    made_so_far = []

    def draw(batch):
        made_so_far.append(len(batch["number"]))
        return {**batch, "image": [picture(number) for number in batch["number"]]}

    dataset = made({"number": [3, 1]}, {"number": datasets.Value("int64")}).with_transform(draw)
    questions = vn.QuestionSet.from_dataset(dataset)
    before = len(made_so_far)
    assert seen(questions) == [[3], [1]]
    assert len(made_so_far) > before
    with pytest.raises(QuestionError, match=r"the dataset has no column 'answer' for 'answer'|no value for answer"):
        vn.QuestionSet.from_dataset(
            dataset.with_transform(lambda batch: {"question": batch["question"], "group": ["A"]})
        )


# -- pictures that no field names --------------------------------------------------------------------------------------

HELD = {
    "a column by another name": ({"photo": [None, P[0]]}, {"photo": IMAGE}, "row 1, column 'photo'", "'photo'"),
    "a list column": ({"images": [[P[0]], []]}, {"images": MANY}, "row 0, column 'images'", "'images'"),
    "one beside the picture": (
        {"image": [P[0]], "image2": [P[1]]}, {"image": IMAGE, "image2": IMAGE}, "row 0, column 'image2'",
        r"\['image', 'image2'\]",
    ),
    "the second of two": (
        {"image_1": [P[0]], "image_2": [P[1]]}, {"image_1": IMAGE, "image_2": IMAGE}, "row 0, column 'image_1'",
        r"\['image_1', 'image_2'\]",
    ),
    "an encoded file": (
        {"photo": [{"bytes": b"x", "path": "a.png"}]}, {"photo": STRUCT}, "row 0, column 'photo'", "'photo'",
    ),
    "lists of encoded files": (
        {"photo": [[{"bytes": png(), "path": None}]]}, {"photo": [STRUCT]}, "row 0, column 'photo'", "'photo'",
    ),
    "bytes": ({"photo": [png()]}, {"photo": datasets.Value("binary")}, "row 0, column 'photo'", "'photo'"),
    "base64": ({"photo": [text_of()]}, {"photo": TEXT}, "row 0, column 'photo'", "'photo'"),
    "a data URL": ({"photo": ["data:image/jpeg;base64,AAAA"]}, {"photo": TEXT}, "row 0, column 'photo'", "'photo'"),
    "lists of base64": (
        {"photo": [[text_of(), text_of()]]}, {"photo": List(TEXT)}, "row 0, column 'photo'", "'photo'",
    ),
    "an address": (
        {"link": ["https://example.org/a.jpg?size=2"]}, {"link": TEXT}, "row 0, column 'link'", "'link'",
    ),
    "a file's name": ({"file": ["cairo/001.jpeg"]}, {"file": TEXT}, "row 0, column 'file'", "'file'"),
    "deep in a dictionary": (
        {"more": [{"views": [{"front": text_of()}]}]}, {"more": {"views": [{"front": TEXT}]}}, "row 0, column 'more'",
        "'more'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", HELD)
def test_a_picture_that_no_field_names_is_refused_by_row_and_column_with_the_way_to_ask_with_it(form):
    columns, features, where, advice = HELD[form]
    dataset = made(columns, features)
    message = rf"dataset {where} holds a picture, .*that the question would be asked without: give columns="
    with pytest.raises(QuestionError, match=message + rf"\{{'image': {advice}\}}, or leave the column out"):
        vn.QuestionSet.from_dataset(dataset)
    with pytest.raises(QuestionError, match=rf"{where} holds a picture"):
        vn.QuestionSet.from_rows(list(dataset))


def test_remarks_that_look_a_little_like_pictures_are_metadata():
    remarks = {
        "note": "see a.png", "source": "https://example.org/page", "hash": "ab" * 64, "data": b"\x01\x02", "n": 3,
        "sizes": [1, 2, 3], "vector": np.zeros(3), "author": {"name": "A. Adams", "path": "x"}, "nothing": None,
    }  # fmt: skip
    (item,) = vn.QuestionSet.from_rows([row(**remarks)])
    assert item.metadata == {**remarks, "vector": [0, 0, 0]}
    beside = {"file": "cairo/001.jpeg", "link": "https://example.org/a.jpg"}  # of the picture that is shown
    (item,) = vn.QuestionSet.from_rows([row(image=P[0], **beside)])
    assert (item.n_images, item.metadata) == (1, beside)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ({"bytes": None, "path": None}, "a picture is empty: take it out of its list, or leave the whole cell empty"),
        ({"bytes": b"", "path": ""}, "a picture is empty"),
        ([P[0], None], "a picture is empty"),
        (["a.png", ""], "a picture is empty"),
        (b"", "a picture is empty"),
        (np.zeros((4, 4, 3), np.uint8), "(?s)got ndarray .* PIL.Image.fromarray makes a picture"),
        ([[0, 1], [2, 3]], "a picture is a path, bytes, base64 text, {'bytes', 'path'} or a PIL image; got int 0"),
        (3, "got int 3"),
        ({"array": [0]}, "got dict"),
        ("https://example.org/a.png", "is elsewhere, and nothing is fetched: save it, give its path"),
        ("nowhere.png", "the picture 'nowhere.png' is not there"),
        ("nowhere.png;elsewhere.png", "the picture 'nowhere.png;elsewhere.png' is not there"),
        ("/", "the picture '/' is no ordinary file"),
        ("[nowhere.png, 3", "a list of pictures must be a JSON list; got"),
        ("x" * 5000, "is no path: .*File name too long"),
    ],
    ids=range(15),
)
def test_a_cell_that_holds_no_picture_is_refused_when_the_set_is_made(cell, message):
    with pytest.raises(QuestionError, match=rf"(?s)row 1, column 'image': .*{message.removeprefix('(?s)')}"):
        vn.QuestionSet.from_rows([row(image=P[0]), row(image=cell)])


def test_a_dataset_of_pictures_without_content_is_refused_by_row():
    plain = made({"image": [{"bytes": png(), "path": None}, {"bytes": None, "path": None}]}, {"image": STRUCT})
    for dataset in (plain, plain.cast_column("image", IMAGE)):
        with pytest.raises(QuestionError, match="dataset row 1, column 'image': a picture is empty"):
            vn.QuestionSet.from_dataset(dataset)
    dataset = made({"image": [[{"bytes": png(), "path": None}, None]]}, {"image": MANY})
    with pytest.raises(QuestionError, match="dataset row 0, column 'image': a picture is empty"):
        vn.QuestionSet.from_dataset(dataset)


# -- folders -----------------------------------------------------------------------------------------------------------


def test_a_folders_table_takes_several_pictures_in_every_form(tmp_path):
    for seed in range(4):
        picture(seed).save(tmp_path / f"{seed}.png")
    rows = [
        row(image="0.png"), row(image=["0.png", "1.png"]), row(image=json.dumps(["2.png", "3.png"])),
        row(image=text_of(5)),
        row(image=[{"path": "1.png"}, {"bytes": text_of(6)}]), row(image=None), row(), row(image=[]),
    ]  # fmt: skip
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, (one | {"id": n} for n, one in enumerate(rows)))))
    expected = [[0], [0, 1], [2, 3], [5], [1, 6], [], [], []]
    assert seen(vn.QuestionSet.from_folder(tmp_path)) == expected
    table = "photo,more,question,A,B,answer,group\n0.png,,Q?,x,y,A,g\n,1.png,Q2?,x,y,A,g\n2.png,3.png,Q3?,x,y,A,g\n"
    (tmp_path / "t.csv").write_text(table)
    with pytest.raises(QuestionError, match=r"t\.csv, row 1, column 'photo' holds a picture, '0\.png'"):
        vn.QuestionSet.from_folder(tmp_path, "t.csv")
    questions = vn.QuestionSet.from_folder(tmp_path, "t.csv", columns={"image": ["photo", "more"]})
    assert seen(questions) == [[0], [1], [2, 3]]
    message = r"t\.csv, row 2, column 'more' holds a picture, '1\.png', .*columns=\{'image': \['photo', 'more'\]\}"
    with pytest.raises(QuestionError, match=message):
        vn.QuestionSet.from_folder(tmp_path, "t.csv", columns={"image": "photo"})


def test_rows_of_json_lines_that_name_their_picture_differently_are_refused(tmp_path):
    picture(0).save(tmp_path / "a.png")
    picture(1).save(tmp_path / "b", "PNG")
    rows = [row(image="a.png"), row(photo="a.png")]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(QuestionError, match=r"row 2, column 'photo' holds a picture, 'a\.png'"):
        vn.QuestionSet.from_folder(tmp_path)
    (tmp_path / "t.jsonl").write_text(json.dumps(row(image="a.png", other="b")))  # without an ending
    with pytest.raises(QuestionError, match=r"row 1, column 'other' holds a picture, 'b'.*\['image', 'other'\]"):
        vn.QuestionSet.from_folder(tmp_path)
    (tmp_path / "t.jsonl").write_text(json.dumps(row(image="a.png", file="a.png")))  # the same one
    assert vn.QuestionSet.from_folder(tmp_path)[0].metadata == {"file": "a.png"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "t.csv",
            "image,question,A,B,answer,group,image\n,Q?,x,y,A,g,a.png\n",
            "the column 'image' stands there twice",
        ),
        (
            "t.csv",
            "question,A,B,answer,group\nWho, and why?,x,y,A,g\n",
            "row 1 has more cells than .* such as 'g': put",
        ),
        ("t.jsonl", '{"question": "Q?", "question": "R?"}', "line 1: the column 'question' stands there twice"),
        ("t.parquet", "PAR1", "is no .csv, .tsv or .jsonl: read it with pandas or datasets, and give it to Question"),
        ("t.csv", "image\n" + "A" * 200_000, "field limit .*; a picture as text belongs into a .jsonl table"),
    ],
)
def test_a_table_that_cannot_be_read_without_losing_something_is_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(QuestionError, match=message):
        vn.QuestionSet.from_folder(tmp_path, name)


# -- answers, groups and options ---------------------------------------------------------------------------------------

NUMBERS = ["1", "2", "3", "4"]
SOURCES = ["csv", "jsonl", "dataset", "stream", "rows", "pandas", "numbers"]


def given_as(source: str, folder, **fields) -> vn.QuestionSet:
    one = {"question": "How many?", "group": "A", **fields}
    if source == "csv":
        pd.DataFrame([{**one, "options": json.dumps(one["options"])}]).to_csv(folder / "t.csv", index=False)
        return vn.QuestionSet.from_folder(folder, "t.csv")
    if source == "jsonl":
        (folder / "t.jsonl").write_text(json.dumps(one))
        return vn.QuestionSet.from_folder(folder, "t.jsonl")
    if source == "numbers":
        return vn.QuestionSet.from_rows([{**one, "options": [float(text) for text in one["options"]]}])
    if source == "pandas":
        return vn.QuestionSet.from_rows(pd.DataFrame([{**one, "answer": np.float64(one["answer"])}]))
    dataset = datasets.Dataset.from_list([one])
    if source == "rows":
        return vn.QuestionSet.from_rows(list(dataset))
    return vn.QuestionSet.from_dataset(dataset.to_iterable_dataset() if source == "stream" else dataset)


@pytest.mark.parametrize("options", [["Yes", "No"], ["true", "false"], ["Sí.", "No."], ["是", "否"]])
def test_zero_and_one_among_yes_and_no_are_refused_as_places_or_truth_values(options):
    row = {"question": "Is it hot?", "group": "warm", "options": options}
    first, second = options
    for answer in (1, "1", 1.0, np.int64(1)):
        text = f"may mean {second!r}, by its place, or {first!r}, where 1 stands for true: give the option's"
        with pytest.raises(QuestionError, match=re.escape(text)):
            vn.QuestionSet.from_rows([{**row, "answer": answer}])
    with pytest.raises(QuestionError, match=re.escape(f"answer 0 may mean {first!r}, by its place, or {second!r}")):
        vn.QuestionSet.from_rows([{**row, "answer": 0}])
    for answer in (second, "B", "b"):
        assert vn.QuestionSet.from_rows([{**row, "answer": answer}])[0].answer == 1
    turned = {**row, "options": [second, first]}  # here places and truth values agree
    assert [vn.QuestionSet.from_rows([{**turned, "answer": answer}])[0].right for answer in (0, 1)] == [second, first]
    assert vn.Question(None, "Is it hot?", options, 1, "warm").right == second  # an index by its name
    three = {**row, "options": [*options, "perhaps"], "answer": 1}
    assert vn.QuestionSet.from_rows([three])[0].right == second


@pytest.mark.parametrize("source", SOURCES)
def test_a_number_among_options_that_are_numbers_is_refused_in_every_source_alike(source, tmp_path):
    for answer in (1, 2, 3):
        with pytest.raises(
            QuestionError, match=rf"answer '?{answer}'? may mean the text of an option or its place; .* give"
        ):
            given_as(source, tmp_path, options=NUMBERS, answer=answer)
    (item,) = given_as(source, tmp_path, options=NUMBERS, answer=4)  # no place, so it is the text
    assert item.answer == 3
    (item,) = given_as(source, tmp_path, options=["0", "1", "2", "3"], answer=2)  # both
    assert item.answer == 2
    (item,) = given_as(source, tmp_path, options=["1990", "2000", "2010"], answer=1)  # the place only
    assert item.answer == 1


def test_labels_that_count_from_one_are_explained_as_such_and_not_as_secrets(tmp_path):
    for source in SOURCES[:-1]:
        with pytest.raises(
            QuestionError, match=r"answer 4 is outside the options \(0–3\)\. The labels may count from 1"
        ):
            given_as(source, tmp_path, options=FOUR, answer=4)
        with pytest.raises(QuestionError, match=r"answer -1 is outside .* keeps its answers secret: use a lab"):
            given_as(source, tmp_path, options=FOUR, answer=-1)
    with pytest.raises(QuestionError, match=r"answer 9 is outside the options \(0–3\)$"):
        vn.Question(None, "Q?", FOUR, 9, "A")


def test_classes_have_their_names_and_a_group_that_is_missing_is_refused():
    classes = datasets.ClassLabel(names=["Egypt", "Japan"])
    lettered = datasets.ClassLabel(names=list("ABCD"))
    columns = {"group": [1, 0], "answer": [2, 3], "kind": [0, 1]}
    for streaming in (False, True):
        dataset = made(columns, {"group": classes, "answer": lettered, "kind": classes})
        dataset = dataset.to_iterable_dataset() if streaming else dataset
        questions = vn.QuestionSet.from_dataset(dataset)
        assert [item.group for item in questions] == ["Japan", "Egypt"]
        assert [item.answer for item in questions] == [2, 3]
        assert [item.metadata for item in questions] == [{"kind": "Egypt"}, {"kind": "Japan"}]
    with pytest.raises(QuestionError, match="dataset row 1: no value for group; the row has"):
        vn.QuestionSet.from_dataset(made({"group": [0, -1]}, {"group": classes}))
    for missing in (float("nan"), np.nan, pd.NA, pd.NaT, None, ""):
        with pytest.raises(QuestionError, match="row 0: no value for group; the row has"):
            vn.QuestionSet.from_rows([row(group=missing)])
    with pytest.raises(QuestionError, match="row 1: no value for group"):
        vn.QuestionSet.from_rows(pd.DataFrame([row(), row(group=None), row(group="B")]))
    with pytest.raises(QuestionError, match=r"row 0: group is a text; got list \['A'\]"):
        vn.QuestionSet.from_rows([row(group=["A"])])


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"options": ["x", "y"]}, ("x", "y")),
        ({"options": ("x", "y")}, ("x", "y")),
        ({"options": np.array(["x", "y"])}, ("x", "y")),
        ({"options": "['x', \"y's\"]"}, ("x", "y's")),
        ({"options": '["x", "y"]'}, ("x", "y")),
        ({"A": "x", "B": "y", "C": None}, ("x", "y")),
        ({"a": "x", "b": "y", "c": "", "d": float("nan")}, ("x", "y")),
        ({"A": 1, "B": 2.5}, ("1", "2.5")),
        ({"options": [3, 4]}, ("3", "4")),
    ],
    ids=range(9),
)
def test_options_are_taken_in_every_plain_form(fields, options):
    one = {name: value for name, value in row(answer="A").items() if name != "options"}
    (item,) = vn.QuestionSet.from_rows([{**one, **fields}])
    assert (item.options, item.metadata) == (options, {})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"options": "['x' 'y' 'z', 'u']"}, "options must be a JSON list; got"),
        ({"options": "[__import__('os').getcwd(), 'x']"}, "options must be a JSON list; got"),
        ({"options": [["x"], "y"]}, "options are texts or numbers; got"),
        ({"options": ["x", float("nan")]}, "an option is missing"),
        ({"options": {"A": "x", "B": "y"}}, "no options; give a list in 'options', or columns A, B, C, D"),
        (
            {"A": "x", "B": "y", "c": "z"},
            "options A, B are there, and a column 'c': write the letters of options alike",
        ),
        ({"a": "x", "b": "", "c": "z"}, "options a, c are there, one before is empty"),
        (
            {"option_a": "x", "option_b": "y"},
            r"no options; .*Did you mean columns=\{'options': \['option_a', 'option_b'\]",
        ),
        ({"choices": ["x", "y"]}, r"no options; .*Did you mean columns=\{'options': 'choices'\}\?"),
        ({"Options": ["x", "y"]}, r"no options; .*Did you mean columns=\{'options': 'Options'\}\?"),
    ],
    ids=range(10),
)
def test_options_that_are_none_are_explained(fields, message):
    one = {name: value for name, value in row(answer="A").items() if name != "options"}
    with pytest.raises(QuestionError, match=f"row 0: {message}"):
        vn.QuestionSet.from_rows([{**one, **fields}])


def test_options_and_pictures_may_stand_in_columns_of_any_name():
    rows = [{"q": "Q?", "opt1": "x", "opt2": "y", "opt3": None, "gold": "y", "land": "A", "left": P[0], "right": P[1]}]
    names = {"question": "q", "options": ["opt1", "opt2", "opt3"], "answer": "gold", "group": "land"}
    (item,) = vn.QuestionSet.from_rows(rows, columns={**names, "image": ["left", "right"]})
    assert (item.options, item.right, item.n_images, item.metadata) == (("x", "y"), "y", 2, {})
    with pytest.raises(QuestionError, match="row 0: option 'opt2' is empty, one after it is not"):
        vn.QuestionSet.from_rows([{**rows[0], "opt2": "", "opt3": "z"}], columns={**names, "image": ["left", "right"]})


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"group": "contry"},
            r"no column 'contry' for 'group'; it has .*Did you mean columns=\{'group': 'country'\}\?",
        ),
        ({"group": "Country"}, r"Did you mean columns=\{'group': 'country'\}\?"),
        (
            {"answer": "solution"},
            r"no column 'solution' for 'answer'; it has .*Did you mean columns=\{'answer': 'label'\}\?",
        ),
        ({"image": ["photo", "foto"]}, r"no column 'foto' for 'image'; .*Did you mean columns=\{'image': 'photo'\}\?"),
        ({"imge": "photo"}, r"columns has no field 'imge'; a question has image, .*Did you mean 'image'\?"),
        ({"group": ["country", "label"]}, r"columns: 'group' is the name of a column; got \['country', 'label'\]"),
        ({"image": 3}, r"columns: 'image' is the name of a column, or a list of names; got 3"),
        ({"image": []}, r"columns: 'image' is the name of a column, or a list of names; got \[\]"),
        ({"image": ["photo", "photo"]}, r"columns: the column 'photo' stands there twice"),
        ("group", "columns is a dictionary {field: column}; got 'group'"),
    ],
    ids=range(10),
)
@pytest.mark.parametrize("source", ["dataset", "rows"])
def test_a_column_that_is_not_there_is_named_with_what_may_be_meant(source, columns, message, unchecked):
    rows = [{"question": "Q?", "options": FOUR, "label": 1, "country": "A", "photo": "x"}]
    make = vn.QuestionSet.from_rows if source == "rows" else vn.QuestionSet.from_dataset
    with pytest.raises(QuestionError, match=message):
        make(rows if source == "rows" else datasets.Dataset.from_list(rows), columns=columns)


def test_a_field_whose_column_has_another_name_is_found_by_it(tmp_path):
    (tmp_path / "t.csv").write_text("Question,A,B,label,country\nQ?,x,y,A,g\n")
    with pytest.raises(
        QuestionError, match=r"row 1: no value for question, answer, group; .*\{'question': 'Question'\}"
    ):
        vn.QuestionSet.from_folder(tmp_path)
    columns = {"question": "Question", "answer": "label", "group": "country"}
    assert vn.QuestionSet.from_folder(tmp_path, columns=columns)[0].right == "x"


@pytest.mark.parametrize("rows", [3, "rows", {"question": "Q?"}, [3], [["a"]], None])
def test_what_is_no_table_is_refused(rows, unchecked):
    with pytest.raises(
        QuestionError, match=r"from_rows takes a list of dictionaries or a pandas|row 0 is a dictionary"
    ):
        vn.QuestionSet.from_rows(rows)


def test_a_pandas_table_with_a_column_twice_is_refused():
    table = pd.DataFrame([["Q?", FOUR, 1, "A", P[0], P[1]]])
    table.columns = ["question", "options", "answer", "group", "image", "image"]
    with pytest.raises(QuestionError, match="the table: the column 'image' stands there twice"):
        vn.QuestionSet.from_rows(table)


# -- options that speak of each other ----------------------------------------------------------------------------------

KEPT = [
    ("A. Cairo", "B. Paris", "C. Rome", "D. Oslo"),
    ("(A) Cairo", "(B) Paris"),
    ("a) Cairo", "b) Paris", "c) Rome"),
    ("[A] Cairo", "[B] Paris"),
    ("A: Cairo", "B: Paris"),
    ("A - Cairo", "B - Paris"),
    ("A、开罗", "B、巴黎"),
    ("A. Cairo", "B. Paris", "None of the above"),
    ("Cairo", "Paris", "Both A and B", "None of the above"),
    ("Cairo", "Paris", "A and B"),
    ("Cairo", "Paris", "A & B", "Rome"),
    ("Cairo", "Paris", "Rome", "A, B and C"),
    ("Cairo", "Paris", "neither A nor B"),
    ("Cairo", "Paris", "Option A or B"),
    ("Cairo", "Only A", "Rome"),
    ("Cairo", "Paris", "All of the above"),
    ("Cairo", "Paris", "none of these"),
    ("Cairo", "Paris", "All the above."),
    ("Cairo", "Paris", "Both of them"),
    ("Cairo", "Paris", "The first two"),
    ("开罗", "巴黎", "以上都是"),
    ("开罗", "巴黎", "以上皆非"),
    ("El Cairo", "París", "Todas las anteriores"),
    ("El Cairo", "París", "Ninguna de las anteriores"),
    ("O Cairo", "Paris", "Nenhuma das anteriores"),
    ("Le Caire", "Paris", "Aucune de ces réponses"),
    ("Kairo", "Paris", "Alle oben genannten"),
    ("Kairo", "Paris", "Keine der genannten"),
    ("Каир", "Париж", "Все вышеперечисленное"),
    ("カイロ", "パリ", "上記のすべて"),
    ("القاهرة", "باريس", "جميع ما سبق"),
    ("काहिरा", "पेरिस", "उपरोक्त सभी"),
    ("Kairo", "Paris", "Semua di atas"),
    ("Kahire", "Paris", "Yukarıdakilerin hepsi"),
]  # fmt: skip
FREE = [
    ("Cairo", "Paris", "Rome", "Oslo"),
    ("A", "B", "AB", "0"),
    ("J. Smith", "B. King", "A. Lee", "C. Doe"),
    ("E. coli", "C. elegans", "D. melanogaster"),
    ("Vitamin A", "Vitamin B", "Vitamin C"),
    ("Team A", "Team B"),
    ("a cat and a dog", "a dog"),
    ("Both of the king's sons", "His wife"),
    ("on the table above the river", "below"),
    ("18岁以上", "18岁以下"),
    ("di atas meja", "di bawah meja"),
    ("책상 위의 컵", "의자"),
    ("A-level", "O-level"),
    ("U.S.A.", "U.K."),
    ("None", "One"),
    ("A.M.", "P.M."),
    ("All day", "All night"),
    ("only Americans", "only Egyptians"),
]  # fmt: skip


@pytest.mark.parametrize("options", KEPT, ids=lambda options: options[-1])
def test_options_that_speak_of_each_others_letters_or_places_are_shown_as_they_are_and_that_is_said(options, caplog):
    items = [vn.Question(None, "Which?", options, 0, "A", id=f"q{n}") for n in range(40)]
    with caplog.at_level(logging.WARNING):
        questions = vn.QuestionSet(items, shuffle=3)
    assert all(item.keeps_order and questions.order(item) == tuple(range(len(options))) for item in items)
    assert "40 of 40 questions have options that speak of each other's letters or places (q0, q1" in caplog.text
    assert "are shown as they are, not shuffled" in caplog.text
    caplog.clear()
    assert len(questions[:5].group_by(lambda item: "B")) == 5  # said once, when the set is made
    assert vn.QuestionSet(items, shuffle=None).shuffle is None
    assert not caplog.text


@pytest.mark.parametrize("options", FREE, ids=lambda options: options[0])
def test_other_options_are_shuffled_as_ever(options, caplog):
    items = [vn.Question(None, "Which?", options, 0, "A", id=f"q{n}") for n in range(40)]
    questions = vn.QuestionSet(items, shuffle=3)
    assert len({questions.order(item) for item in items}) > 1
    assert not caplog.text


def test_options_whose_own_letters_contradict_their_places_are_refused():
    for options in (("B. Paris", "A. Cairo"), ("(C) x", "(A) y", "(B) z")):
        with pytest.raises(
            QuestionError, match=r"its options bear letters of their own in another order \(.*take the lett"
        ):
            vn.Question(None, "Which?", options, 0, "A", id="q")


# -- metadata and texts that every file can hold -----------------------------------------------------------------------


def deep(n: int) -> list:
    inner: list = []
    for _ in range(n):
        inner = [inner]
    return inner


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (float("nan"), None), (np.float64("nan"), None), (pd.NA, None), (pd.NaT, None), (None, None),
        (np.datetime64("NaT", "s"), None), (np.int64(3), 3), (np.bool_(True), True), (np.float32(0.5), 0.5),
        (np.str_("x"), "x"),
        ([1, float("nan"), {"a": np.nan}], [1, None, {"a": None}]), ((1, np.int8(2)), (1, 2)), ({"b", "a"}, ["a", "b"]),
        ({1: {2: np.nan}}, {"1": {"2": None}}), (np.array([1.5, np.nan]), [1.5, None]), ("text", "text"), (True, True),
        (10**400, 10**400), (deep(40), deep(40)), ("", ""),
    ],
    ids=range(20),
)  # fmt: skip
def test_metadata_become_what_a_file_can_hold(given, kept):
    value = vn.Question(None, "Q?", FOUR, 0, "A", metadata={"m": given}).metadata["m"]
    assert value == kept
    assert type(value) is type(kept)
    json.loads(json.dumps(value, allow_nan=False))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"m": float("inf")}, "metadata 'm' is infinite, which no file can hold: leave it out, or give it as text"),
        ({"m": np.float64("-inf")}, "metadata 'm' is infinite"),
        ({"m": [1, {"n": float("inf")}]}, "metadata 'm': metadata 'n' is infinite"),
        ({"m": 10**5000}, "metadata 'm' has more than 1,000 digits, which no file can hold: give it as text"),
        ({"m": deep(150)}, "metadata 'm' is nested more than 50 deep: keep it outside, under the question's id"),
        ({None: 1}, "names of metadata are texts; got None"),
        ({(1, 2): 1}, r"names of metadata are texts; got \(1, 2\)"),
        ({1: "a", "1": "b"}, "two names of metadata read '1' as text: call one otherwise"),
    ],
    ids=range(8),
)
def test_metadata_that_no_file_can_hold_are_refused_when_the_question_is_made(metadata, message, unchecked):
    with pytest.raises(QuestionError, match=f"question 'q': {message}"):
        vn.Question(None, "Q?", FOUR, 0, "A", id="q", metadata=metadata)


def test_rows_of_pandas_with_holes_are_recorded_and_opened_again(model, tmp_path):
    table = pd.DataFrame({"question": ["Q0?", "Q1?"], "kind": ["x", None], "score": [1.0, np.nan]})
    table["when"] = [pd.Timestamp(0), pd.NaT]
    rows = [{**row(), **one} for one in table.to_dict("records")]
    made_from = [vn.QuestionSet.from_rows(rows), vn.QuestionSet.from_rows(pd.DataFrame(rows))]
    made_from.append(vn.QuestionSet(vn.Question(None, one["question"], FOUR, 0, "A", metadata=one) for one in rows))
    for n, questions in enumerate(made_from):
        assert [item.metadata["score"] for item in questions] == [1.0, None]
        items = vn.record_items(model, questions, tmp_path / str(n), progress=False)
        again = vn.ItemStatistics.load(tmp_path / str(n))
        assert [item.metadata["score"] for item in again.items] == [1.0, None]
        assert again.group_by("kind", condition="all").groups == ("x",)
        assert len(vn.record_items(model, questions, tmp_path / str(n), progress=False)) == len(items)


@pytest.mark.parametrize("field", ["question", "group", "id", "options"])
def test_half_a_character_is_refused_before_a_file_or_tokenizer_fails_on_it(field):
    fields = {"question": "Q?", "group": "A", "id": "q", "options": FOUR, "image": None, "answer": 0}
    fields[field] = ["\ud800x", "y"] if field == "options" else "\ud800x"
    with pytest.raises(QuestionError, match=r"holds half a character, '\\ud800', which no file can"):
        vn.Question(**fields)


# -- palettes ----------------------------------------------------------------------------------------------------------


def test_pictures_that_look_different_have_different_keys():
    def palette(colours, **info):
        image = Image.new("P", (2, 2))
        image.putdata([0, 1, 0, 1])
        image.putpalette(colours)
        image.info.update(info)
        return image

    warm, cold = [255, 0, 0, 255, 255, 0], [0, 0, 255, 0, 255, 255]
    turned = Image.new("RGB", (2, 2))
    turned.getexif()[0x0112] = 3
    different = [
        palette(warm), palette(cold), palette(warm, transparency=0), palette(warm, transparency=1),
        palette(warm, transparency=b"\0\x80"), palette(warm).convert("L"), palette(warm).convert("RGB"),
        Image.new("RGB", (2, 2)), turned,
    ]  # fmt: skip
    keys = [vn.Question(image, "Q?", FOUR, 0, "A").image_key for image in different]
    assert len(set(keys)) == len(keys)
    assert len({vn.Question(image, "Q?", FOUR, 0, "A").id for image in different}) == len(different)
    for image in different[:-1]:  # Pillow's copy forgets a turn that was only noted
        assert (
            vn.Question(image.copy(), "Q?", FOUR, 0, "A").image_key == vn.Question(image, "Q?", FOUR, 0, "A").image_key
        )
    questions = vn.QuestionSet(vn.Question(image, "Q?", FOUR, 0, "A", id=str(n)) for n, image in enumerate(different))
    assert len(set(questions.pictures())) == len(different)


# -- what unpacks to gigabytes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dictionary", [True, False])
def test_a_small_parquet_that_unpacks_to_gigabytes_is_refused_in_little_memory(tmp_path, dictionary):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    n, path = 40, tmp_path / "bomb.parquet"
    columns = {"ID": [str(i) for i in range(n)], "Translated Question": ["x" * 2_000_000] * n}
    with pq.ParquetWriter(path, pa.table(columns).schema, compression="zstd", use_dictionary=dictionary) as writer:
        for _ in range(30):
            writer.write_table(pa.table(columns))
    assert path.stat().st_size < 2**20
    with (
        limits(60, gibibytes=1.2),
        pytest.raises(QuestionError, match=r"MiB and unpacks to .* more than 50 times as much"),
    ):
        vn.load_cvqa(path)
