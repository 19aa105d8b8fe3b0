"""Questions, their pictures, and sets of them: what they hold, how they divide, and where they come from."""

import csv
import gc
import io
import json
import random
from collections import Counter
from dataclasses import replace

import datasets
import numpy as np
import pandas as pd
import pytest
from PIL import Image

import vlmneurons as vn
from helpers import picture, save_questions, some_questions
from vlmneurons.errors import GroupError, QuestionError
from vlmneurons.questions.question import normalize
from vlmneurons.questions.sets import open_prompt

FOUR = ("Tea", "Rice", "Bread", "Soup")


def ask(number: int = 0, group: str = "A", image=None, **more) -> vn.Question:
    fields = {"image": image, "question": f"What is {number}?", "options": FOUR, "answer": number % 4, "group": group}
    return vn.Question(**{**fields, "id": f"q{number}", **more})


def saved(image: Image.Image, form: str, **how) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **how)
    return file.getvalue()


# -- one question ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": 4}, r"question 'q0': answer 4 is outside the options \(0–3\)"),
        ({"answer": -1}, r"answer -1 is outside the options \(0–3\). A label of -1 usually means .* labelled copy"),
        ({"answer": "B"}, r"answer is the index of the right option; got 'B'"),
        ({"answer": True}, r"answer is the index of the right option; got True"),
        ({"answer": 1.0}, r"answer is the index of the right option; got 1.0"),
        ({"options": ("Tea",)}, r"a question has 2 to 26 options; got 1"),
        ({"options": [str(i) for i in range(27)]}, r"a question has 2 to 26 options; got 27"),
        ({"options": "Tea"}, r"options are a sequence of strings; got 'Tea'"),
        ({"options": ("Tea", 3)}, r"options are a sequence of strings; got \('Tea', 3\)"),
        ({"options": None}, r"options are a sequence of strings; got None"),
        ({"options": ("Tea", "Rice", " TEA!")}, r"the right answer 'Tea' stands among the options twice"),
        ({"question": 5}, r"the question is a string; got int"),
        ({"group": ""}, r"the group is a non-empty string; got ''"),
        ({"group": None}, r"the group is a non-empty string; got None"),
    ],
)
def test_a_question_that_cannot_be_asked_is_refused_by_name(changes, message, unchecked):
    with pytest.raises(QuestionError, match=message):
        ask(**changes)


def test_options_may_come_from_a_generator_and_the_answer_from_numpy(unchecked):
    item = ask(options=(text for text in FOUR), answer=np.int64(2))
    assert item.options == FOUR
    assert item.right == "Bread"
    assert type(item.answer) is int


def test_ids_derive_from_all_that_is_asked_pictures_in_memory_included():
    def derived(**changes):
        return ask(id="", **changes).id

    one, other = picture(1), picture(2)
    ids = [derived(), derived(number=1), derived(image=one), derived(image=other), derived(image=saved(one, "PNG"))]
    ids += [derived(group="B"), derived(image="a.png"), derived(image_id="x")]
    assert len(set(ids)) == len(ids)
    assert derived(image=one) == derived(image=one.copy())


def test_equal_questions_are_equal_and_hash_alike():
    assert ask() == ask()
    assert hash(ask()) == hash(ask())
    assert ask() != ask(1)
    assert ask(image=picture(1)) == ask(image=picture(1))
    assert ask(image=picture(1)) != ask(image=picture(2))
    assert ask(image="a.png") != ask(image=picture(1))
    assert ask() != "q0"


# -- pictures ----------------------------------------------------------------------------------------------------------

RED, HALF_RED = (255, 0, 0), (255, 127, 127)


def rotated() -> bytes:
    image = Image.new("RGB", (4, 2), "blue")
    image.putpixel((0, 0), RED)
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    return saved(image, "PNG", exif=exif)


def animated() -> bytes:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    return saved(frames[0], "GIF", save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    ("source", "corner", "size"),
    [
        (Image.new("RGB", (3, 2), RED), RED, (3, 2)),
        (Image.new("RGB", (1, 1), RED), RED, (1, 1)),
        (Image.new("L", (3, 2), 7), (7, 7, 7), (3, 2)),
        (Image.new("1", (3, 2), 1), (255, 255, 255), (3, 2)),
        (Image.new("RGBA", (3, 2), (255, 0, 0, 0)), (255, 255, 255), (3, 2)),
        (Image.new("RGBA", (3, 2), (255, 0, 0, 128)), HALF_RED, (3, 2)),
        (Image.new("LA", (3, 2), (0, 0)), (255, 255, 255), (3, 2)),
        (Image.new("CMYK", (3, 2), (0, 255, 255, 0)), RED, (3, 2)),
        (Image.new("RGB", (3, 2), RED).convert("P"), RED, (3, 2)),
        (saved(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG"), (255, 255, 255), (8, 8)),
        (rotated(), (0, 0, 255), (2, 4)),
        (animated(), RED, (4, 4)),
        (lambda: lambda: Image.new("RGB", (3, 2), RED), RED, (3, 2)),
        (lambda: {"bytes": saved(Image.new("RGB", (3, 2), RED), "PNG"), "path": None}, RED, (3, 2)),
    ],
    ids=[
        *("rgb", "1x1", "grey", "bits", "transparent", "half", "grey-transparent", "cmyk", "palette", "cmyk-jpeg"),
        *("exif", "gif", "function", "datasets"),
    ],
)
def test_pictures_of_every_kind_open_as_upright_opaque_rgb(source, corner, size):
    (image,) = ask(image=source).load_images()
    assert image.mode == "RGB"
    assert image.size == size
    assert image.getpixel((0, 0)) == corner


def test_transparent_palettes_and_sixteen_bit_pictures_open():
    palette = Image.new("P", (2, 2), 0)
    palette.info["transparency"] = 0
    assert ask(image=saved(palette, "PNG", transparency=0)).load_images()[0].getpixel((0, 0)) == (255, 255, 255)
    for depth, form in ((np.uint16, "PNG"), (np.uint16, "TIFF"), (np.int32, "TIFF")):
        values = np.array([[0, 257, 32768, 65535]]).astype(depth)
        opened = ask(image=saved(Image.fromarray(values), form)).load_images()[0]
        assert np.asarray(opened)[0].tolist() == [[grey] * 3 for grey in (0, 1, 127, 255)]


def test_an_animation_on_disk_is_closed_again(tmp_path):
    (tmp_path / "moving.gif").write_bytes(animated())
    image = ask(image=tmp_path / "moving.gif").load_images()[0]
    gc.collect()  # an open file would warn here
    assert image.size == (4, 4)


def explode():
    raise RuntimeError("no disk")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.png", r"question 'q0': the picture 'missing.png' cannot be opened \(FileNotFoundError"),
        (b"no picture", r"question 'q0': the picture 'bytes' cannot be opened \(UnidentifiedImageError"),
        (b"", r"question 'q0': the picture 'bytes' cannot be opened"),
        (saved(picture(0, 64, 64), "PNG")[:1000], r"question 'q0': the picture 'bytes' cannot be opened \(OSError"),
        (saved(picture(0, 64, 64), "JPEG")[:900], r"question 'q0': the picture 'bytes' cannot be opened \(OSError"),
        (explode, r"question 'q0': the picture 'function' cannot be opened \(RuntimeError: no disk\)"),
        (
            lambda: None,
            r"cannot be opened \(TypeError: a picture is a PIL image, a path, bytes or a function; got None",
        ),
    ],
    ids=["missing", "garbage", "empty", "truncated-png", "truncated-jpeg", "raising", "none"],
)
def test_a_picture_that_cannot_be_opened_names_its_question(source, message):
    with pytest.raises(QuestionError, match=message):
        ask(image=source).load_images()


def test_splitting_names_the_question_whose_picture_cannot_be_identified():
    questions = vn.QuestionSet([ask(0), ask(1, image=explode)])
    with pytest.raises(QuestionError, match=r"question 'q1': a picture cannot be opened \(RuntimeError: no disk\)"):
        questions.split()


def test_pictures_are_not_opened_before_they_are_needed():
    question = ask(image=explode)
    questions = vn.QuestionSet([question])
    assert questions.counts() == {"A": 1}
    assert question.n_images == 1


# -- sets --------------------------------------------------------------------------------------------------------------


def test_a_set_is_an_immutable_sequence_that_keeps_how_it_is_asked():
    questions = vn.QuestionSet((ask(i) for i in range(5)), answer="text", shuffle=None, prompt=open_prompt)
    assert len(questions) == 5
    assert questions[1] == ask(1)
    assert [item.id for item in questions[1:3]] == ["q1", "q2"]
    assert questions[-1].id == "q4"
    assert ask(3) in questions
    for derived in (questions[:2], questions.filter(id="q1"), questions.by_group()["A"], questions + [ask(9)]):
        assert isinstance(derived, vn.QuestionSet)
        assert (derived.answer, derived.shuffle, derived.prompt) == ("text", None, open_prompt)
    assert questions == vn.QuestionSet(ask(i) for i in range(5))
    assert len(questions + [ask(9)]) == 6
    assert repr(vn.QuestionSet()) == "QuestionSet(empty)"
    assert repr(questions) == "QuestionSet(5 questions; A: 5)"
    with pytest.raises(IndexError):
        questions[9]


def test_ids_that_stand_twice_are_refused():
    with pytest.raises(QuestionError, match=r"ids must be unique; more than once there are q1. Give each question an"):
        vn.QuestionSet([ask(1), ask(2), ask(1)])
    with pytest.raises(QuestionError, match="ids must be unique"):
        vn.QuestionSet([ask(1)]) + vn.QuestionSet([ask(1)])


def test_what_is_no_question_and_settings_that_do_not_exist_are_refused(unchecked):
    with pytest.raises(QuestionError, match="a QuestionSet holds Question objects; got str"):
        vn.QuestionSet(["What?"])
    with pytest.raises(
        QuestionError, match="answer='letter' is not a way of reading answers; choose from letters, gen"
    ):
        vn.QuestionSet([], answer="letter")
    with pytest.raises(
        QuestionError, match="prompt='cvqa' is not a built-in prompt; choose from multiple choice, open"
    ):
        vn.QuestionSet([], prompt="cvqa")
    with pytest.raises(QuestionError, match="answer='x' is not a way"):
        vn.QuestionSet([]).asked(answer="x")


def test_the_prompt_follows_the_way_of_reading_unless_it_is_given():
    questions = vn.QuestionSet([ask()])
    item = questions[0]
    shown = questions.prompt(item, ("Tea", "Rice"))
    assert shown == (
        "Question: What is 0?\n\nOptions: A. Tea\nB. Rice\n\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert questions.asked(answer="text").prompt(item, FOUR) == "What is 0?"
    assert questions.asked(answer=vn.TextLikelihood()).prompt(item, FOUR) == "What is 0?"
    assert questions.asked(answer="text", prompt="multiple choice").prompt(item, ("Tea", "Rice")) == shown
    assert questions.asked(prompt=lambda q, options: q.id + options[1]).prompt(item, FOUR) == "q0Rice"


def test_counts_groups_and_by_group_are_sorted():
    questions = vn.QuestionSet([ask(0, "B"), ask(1, "A"), ask(2, "B")])
    assert questions.groups == ("A", "B")
    assert list(questions.counts().items()) == [("A", 1), ("B", 2)]
    assert {name: [item.id for item in part] for name, part in questions.by_group().items()} == {
        "A": ["q1"],
        "B": ["q0", "q2"],
    }


def test_filter_takes_a_function_fields_and_metadata():
    questions = vn.QuestionSet(ask(i, "AB"[i % 2], metadata={"kind": "xyz"[i % 3], "group": "other"}) for i in range(6))

    def ids(part):
        return [item.id for item in part]

    assert ids(questions.filter(kind="x")) == ["q0", "q3"]
    assert ids(questions.filter(kind={"x", "y"}, group="A")) == ["q0", "q4"]
    assert ids(questions.filter(group="A")) == ["q0", "q2", "q4"]  # the field, not the metadata of that name
    assert ids(questions.filter(lambda item: item.answer == 1)) == ["q1", "q5"]
    assert ids(questions.filter(right="Soup")) == ["q3"]
    with pytest.raises(QuestionError, match="question 'q0' has no column 'colour'; it has kind, group"):
        questions.filter(colour="red")


def test_pictures_under_another_name_are_refused_where_questions_would_be_asked_without_them(tmp_path):
    picture(0).save(tmp_path / "a.PNG")
    (tmp_path / "q.csv").write_text("photo,question,A,B,answer,group\n,Q?,x,y,A,g\na.PNG,Q?,x,y,A,g\n")
    with pytest.raises(
        QuestionError,
        match=r"q\.csv, row 2, column 'photo' holds a picture, 'a\.PNG', that the question would be asked without: "
        r"give columns=\{'image': 'photo'\}, or leave the column out to ask without it",
    ):
        vn.QuestionSet.from_folder(tmp_path)
    assert [q.n_images for q in vn.QuestionSet.from_folder(tmp_path, columns={"image": "photo"})] == [0, 1]
    names = ["b of c.png", "x\0.pn", "y" * 5000 + ".png", "nothing"]
    rows = [{"file": f, "question": f"Q{f[:9]}?", "options": ["x", "y"], "answer": 0, "group": "g"} for f in names]
    (tmp_path / "q.csv").unlink()
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [item.n_images for item in vn.QuestionSet.from_folder(tmp_path)] == [0] * 4
    photos = datasets.Features({"photo": datasets.Image(), "question": datasets.Value("string")})
    made = datasets.Dataset.from_list([{"photo": picture(0), "question": "Q?"}], features=photos)
    made = made.add_column("options", [["x", "y"]]).add_column("answer", [0]).add_column("group", ["g"])
    with pytest.raises(
        QuestionError, match=r"row 0, column 'photo' holds a picture.* give columns=\{'image': 'photo'\}"
    ):
        vn.QuestionSet.from_dataset(made)
    assert vn.QuestionSet.from_dataset(made, columns={"image": "photo"})[0].n_images == 1
    assert vn.QuestionSet.from_dataset(made.remove_columns("photo"))[0].n_images == 0


def test_a_misspelt_group_is_refused_by_filter_where_it_would_be_missing_without_a_word():
    questions = vn.QuestionSet([ask(0), ask(1, "B")])
    for groups in ("Egipt", {"A", "Egipt"}, ["A", "B", "Egipt"]):
        with pytest.raises(
            GroupError, match=r"no question is of group 'Egipt'; the groups are A, B\. For those of a list"
        ):
            questions.filter(group=groups)
    with pytest.raises(GroupError, match="no question is of group 1; the groups are A, B"):
        questions.filter(group=1)
    with pytest.raises(GroupError, match="the groups are none"):
        questions.filter(lambda item: False).filter(group="A")
    assert len(questions.filter(lambda item: item.group in {"A", "Egipt"})) == 1
    assert len(questions.filter(group=())) == 0


def test_group_by_takes_a_column_or_a_function():
    questions = vn.QuestionSet(ask(i, metadata={"year": 2000 + i % 2}) for i in range(4))
    assert questions.group_by("year").counts() == {"2000": 2, "2001": 2}
    assert questions.group_by(lambda item: item.right).groups == tuple(sorted(FOUR))
    assert questions.counts() == {"A": 4}
    with pytest.raises(QuestionError, match="has no column 'decade'"):
        questions.group_by("decade")


def test_balanced_takes_the_same_number_of_every_group_whatever_the_order():
    items = [ask(i, "AAAB"[i % 4]) for i in range(20)]
    questions = vn.QuestionSet(items)
    assert questions.balanced().counts() == {"A": 5, "B": 5}
    assert questions.balanced(3).counts() == {"A": 3, "B": 3}
    shuffled = vn.QuestionSet(items[::-1])
    assert {item.id for item in questions.balanced(3)} == {item.id for item in shuffled.balanced(3)}
    assert {item.id for item in questions.balanced(3)} != {item.id for item in questions.balanced(3, seed=1)}
    with pytest.raises(QuestionError, match=r"6 questions per group were asked for; fewer are in B \(5\)"):
        questions.balanced(6)
    with pytest.raises(QuestionError, match="0 questions per group were asked for; the least is 1"):
        questions.balanced(0)


# -- splitting ---------------------------------------------------------------------------------------------------------


def pictured(n: int, per_image: int = 3, groups: str = "ABC") -> list[vn.Question]:
    return [ask(i, groups[i % len(groups)], image_id=f"image {i // per_image}") for i in range(n)]


@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.8])
def test_a_split_is_disjoint_by_picture_complete_and_proportionate(fraction):
    questions = vn.QuestionSet(pictured(300))
    first, second = questions.split(fraction, seed=3)
    assert {item.id for item in first} | {item.id for item in second} == {item.id for item in questions}
    assert not {item.image_key for item in first} & {item.image_key for item in second}
    for group, n in questions.counts().items():
        assert abs(first.counts()[group] - fraction * n) <= 2


def test_a_split_depends_on_ids_and_seed_not_on_order():
    items = pictured(90)
    sides = {item.id for item in vn.QuestionSet(items).split(seed=0)[0]}
    random.Random(0).shuffle(items)
    assert {item.id for item in vn.QuestionSet(items).split(seed=0)[0]} == sides
    assert {item.id for item in vn.QuestionSet(items).split(seed=1)[0]} != sides


def test_questions_that_share_one_of_several_pictures_stay_together_also_through_others():
    a, b, c, d = (f"{name}.png" for name in "abcd")
    chain = [ask(0, image=(a, b)), ask(1, image=(b, c)), ask(2, image=[c, d]), ask(3, image=d), ask(4, image="./a.png")]
    for seed in range(8):
        questions = vn.QuestionSet([*chain, *(ask(10 + i, image=f"{i}.jpg") for i in range(20))])
        first, second = questions.split(seed=seed)
        assert len({item.id for item in first} & {f"q{i}" for i in range(5)}) in (0, 5)
        assert abs(len(first) - len(second)) <= 2


def test_the_same_picture_in_memory_and_as_bytes_is_recognised():
    image = picture(5)
    assert ask(0, image=image).image_key == ask(1, image=image.copy()).image_key
    data = saved(image, "PNG")
    assert ask(0, image=data).image_key == ask(1, image=lambda: data).image_key
    wide, high = Image.new("RGB", (2, 3)), Image.new("RGB", (3, 2))
    assert ask(0, image=wide).image_key != ask(0, image=high).image_key


def test_questions_without_a_picture_are_split_one_by_one():
    first, second = vn.QuestionSet(ask(i) for i in range(11)).split()
    assert {len(first), len(second)} == {5, 6}


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_fraction_outside_0_to_1_is_refused(fraction):
    with pytest.raises(QuestionError, match=r"fraction .* is outside \(0, 1\)"):
        vn.QuestionSet([ask()]).split(fraction)


def test_a_split_of_a_thin_group_favours_neither_side():
    sides = Counter(bool(len(vn.QuestionSet([ask(0)]).split(seed=seed)[0])) for seed in range(60))
    assert 15 < sides[True] < 45


# -- the order of options ----------------------------------------------------------------------------------------------


def test_options_are_shuffled_by_seed_and_id_and_evenly():
    questions = vn.QuestionSet(ask(i) for i in range(400))
    places = Counter(questions.order(item).index(item.answer) for item in questions)
    assert all(70 < places[place] < 130 for place in range(4))
    assert all(sorted(questions.order(item)) == [0, 1, 2, 3] for item in questions)
    other = questions.asked(shuffle=1)
    assert sum(questions.order(item) != other.order(item) for item in questions) > 300
    assert all(questions[:9].order(item) == questions.order(item) for item in questions)
    assert questions.asked(shuffle=None).order(questions[7]) == (0, 1, 2, 3)


# -- from a folder -----------------------------------------------------------------------------------------------------

HEADER = ["id", "image", "question", "options", "answer", "group", "category"]


def write_table(folder, rows, name="data.csv", delimiter=",", encoding="utf-8"):
    with open(folder / name, "w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, HEADER, delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def row(number=0, **changes):
    fields = {"id": f"r{number}", "image": "one.png", "question": "Was ist das,\n“Tee”?", "options": json.dumps(FOUR)}
    return {**fields, "answer": "2", "group": "Ägypten", "category": "food", **changes}


@pytest.mark.parametrize(("name", "delimiter", "encoding"), [("d.csv", ",", "utf-8-sig"), ("d.tsv", "\t", "utf-8")])
def test_a_csv_or_tsv_folder_is_read_with_bom_quotes_and_line_breaks(tmp_path, name, delimiter, encoding):
    picture(1).save(tmp_path / "one.png")
    write_table(tmp_path, [row(0), row(1, image="", answer="D"), row(2, answer="Rice")], name, delimiter, encoding)
    questions = vn.QuestionSet.from_folder(tmp_path, shuffle=5)
    assert [item.id for item in questions] == ["r0", "r1", "r2"]
    assert [item.answer for item in questions] == [2, 3, 1]
    assert [item.n_images for item in questions] == [1, 0, 1]
    assert questions[0].question == "Was ist das,\n“Tee”?"
    assert questions[0].metadata == {"category": "food"}
    assert questions.groups == ("Ägypten",)
    assert questions.shuffle == 5
    assert questions[0].load_images()[0] == picture(1)


def test_a_json_lines_folder_is_read(tmp_path):
    rows = [
        {"question": "One\u2028line\x85?", "A": "x", "B": "y", "answer": 1, "group": "g", "image": None, "year": 1990},
        {"question": "Two?", "options": ["x", "y"], "answer": "A", "group": "h", "image": ["a.png", "b.png"]},
    ]
    for name in ("a.png", "b.png"):
        picture().save(tmp_path / name)
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "q.jsonl").write_bytes(text.replace("\n\n", "\r\n\r\n").encode())
    questions = vn.QuestionSet.from_folder(str(tmp_path), "q.jsonl")
    assert questions[0].question == "One\u2028line\x85?"
    assert questions[0].options == ("x", "y")
    assert questions[0].metadata == {"year": 1990}
    assert [item.answer for item in questions] == [1, 0]
    assert questions[1].image == (tmp_path / "a.png", tmp_path / "b.png")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"image": "../secret.png"},
            r"row 1, column 'image': the picture's path '../secret.png' leads out of the folder",
        ),
        ({"image": "/etc/hosts"}, r"row 1, column 'image': the picture's path '/etc/hosts' leads out of the folder"),
        ({"image": "a\0b.png"}, r"row 1, column 'image': 'a\\x00b.png' is no path of a picture"),
        ({"options": "[1"}, r"row 1: options must be a JSON list; got '\[1'"),
        ({"options": "5"}, r"row 1: no options; give a list in 'options', or columns A, B, C, D"),
        ({"options": "[" * 100_000}, r"row 1: options must be a JSON list"),
        ({"options": '["one"]'}, r"row 1: question 'r0': a question has 2 to 26 options; got 1"),
        ({"answer": ""}, r"row 1: no value for answer; the row has"),
        ({"answer": "", "group": ""}, r"row 1: no value for answer, group"),
        ({"answer": "-1"}, r"row 1: question 'r0': answer -1 is outside the options \(0–3\)"),
        ({"answer": "E"}, r"row 1: question 'r0': answer 4 is outside the options"),
        ({"answer": "Coffee"}, r"row 1: answer 'Coffee' is neither an index, a letter nor one of the options"),
        ({"answer": "2.5"}, r"row 1: answer '2.5' is neither an index"),
        ({"options": '["2", "3", "4", "5"]', "answer": "3"}, r"row 1: answer '3' may mean the text .* its letter"),
        ({"options": '["C", "B", "A"]', "answer": "C"}, r"row 1: answer 'C' may mean the text .* its index"),
    ],
)
def test_a_bad_row_says_which_and_why(tmp_path, changes, message):
    rows = [row(0, **changes)]
    if "\0" in changes.get("image", ""):
        (tmp_path / "data.jsonl").write_text(json.dumps(rows[0]))
    else:
        write_table(tmp_path, rows)
    with pytest.raises(QuestionError, match=message):
        vn.QuestionSet.from_folder(tmp_path)


def test_numbers_among_the_options_are_read_where_only_one_reading_is_possible(tmp_path):
    picture().save(tmp_path / "one.png")
    years = '["1990", "2000", "2010"]'
    rows = [row(0, options=years, answer="2000"), row(1, options=years, answer="0"), row(2, options=years, answer="C")]
    write_table(tmp_path, [*rows, row(3, options='["0", "1", "2"]', answer="1")])
    assert [item.answer for item in vn.QuestionSet.from_folder(tmp_path)] == [1, 0, 2, 1]


def test_lettered_columns_with_a_gap_are_refused(tmp_path):
    (tmp_path / "q.csv").write_text("question,A,B,C,answer,group\nWhat?,,x,y,B,g\n")
    with pytest.raises(QuestionError, match=r"row 1: options B, C are there, one before is empty"):
        vn.QuestionSet.from_folder(tmp_path)


def test_a_folder_without_a_readable_table_is_refused(tmp_path):
    with pytest.raises(QuestionError, match=r"must hold one .csv, .tsv or .jsonl table; it has none. Name one: table="):
        vn.QuestionSet.from_folder(tmp_path)
    with pytest.raises(QuestionError, match=r"the table .*missing.csv cannot be read"):
        vn.QuestionSet.from_folder(tmp_path, "missing.csv")
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(QuestionError, match=r"the table .*a.csv cannot be read: 'utf-8' codec"):
        vn.QuestionSet.from_folder(tmp_path)
    (tmp_path / "b.jsonl").write_text('{"question": \n')
    with pytest.raises(QuestionError, match=r"it has 2: a.csv, b.jsonl"):
        vn.QuestionSet.from_folder(tmp_path)
    with pytest.raises(QuestionError, match=r"b.jsonl, line 1 is not JSON"):
        vn.QuestionSet.from_folder(tmp_path, "b.jsonl")
    (tmp_path / "b.jsonl").write_text("\n[1, 2]\n")
    with pytest.raises(QuestionError, match=r"b.jsonl, line 2 is not a JSON object"):
        vn.QuestionSet.from_folder(tmp_path, "b.jsonl")
    (tmp_path / "c.csv").write_text("question,answer\n" + "x" * 200_000 + ",1\n")
    with pytest.raises(QuestionError, match=r"c.csv, after line 1, cannot be read: field larger than field limit"):
        vn.QuestionSet.from_folder(tmp_path, "c.csv")
    (tmp_path / "d.csv").write_text("question,A,B,answer\nWhat?,x,y,1\n")
    with pytest.raises(QuestionError, match=r"d.csv, row 1: no value for group; the row has question, answer"):
        vn.QuestionSet.from_folder(tmp_path, "d.csv")


def test_a_link_that_leads_out_of_the_folder_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "out.png").write_bytes(saved(picture(), "PNG"))
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "out.png")
    write_table(tmp_path / "in", [row(0, image="link.png")])
    with pytest.raises(QuestionError, match="leads out of the folder"):
        vn.QuestionSet.from_folder(tmp_path / "in")


# -- from a dataset ----------------------------------------------------------------------------------------------------


def dataset(**changes) -> datasets.Dataset:
    pictures = [saved(picture(0), "PNG"), b"broken", None, saved(picture(3), "PNG")]
    columns = {
        "photo": [None if data is None else {"bytes": data, "path": None} for data in pictures],
        "question": ["What?"] * 4,
        "options": [list(FOUR)] * 4,
        "answer": [0, 1, 2, 3],
        "group": ["not this"] * 4,
        "country": ["Egypt", "Japan", "Egypt", "Japan"],
        "id": ["a", "b", "c", "d"],
        "category": ["food"] * 4,
    }
    made = datasets.Dataset.from_dict({**columns, **changes})
    return made.cast_column("photo", datasets.Image()) if "photo" in made.column_names else made


def test_a_dataset_is_read_lazily_with_its_own_column_names():
    questions = vn.QuestionSet.from_dataset(dataset(), columns={"image": "photo", "group": "country"}, shuffle=None)
    assert questions.counts() == {"Egypt": 2, "Japan": 2}
    assert questions.shuffle is None
    assert [item.n_images for item in questions] == [1, 1, 0, 1]  # row 1 is broken, and nobody has looked yet
    assert questions[0].load_images()[0] == picture(0)
    assert questions[3].load_images()[0] == picture(3)
    assert questions[0].metadata == {"group": "not this", "category": "food"}
    with pytest.raises(QuestionError, match="question 'b': the picture 'DatasetPicture' cannot be opened"):
        questions[1].load_images()


def test_a_dataset_that_was_filtered_and_shuffled_keeps_pictures_with_their_rows():
    shuffled = dataset().select([3, 2, 0])
    questions = vn.QuestionSet.from_dataset(shuffled, columns={"image": "photo", "group": "country"})
    assert [item.id for item in questions] == ["d", "c", "a"]
    assert questions[0].load_images()[0] == picture(3)
    assert questions[1].n_images == 0
    assert questions[2].load_images()[0] == picture(0)


def test_a_dataset_with_lettered_options_and_no_pictures_is_read():
    made = datasets.Dataset.from_dict(
        {"question": ["Q?"], "A": ["x"], "B": ["y"], "C": [None], "answer": ["B"], "group": ["g"], "year": [1990]}
    )
    (item,) = vn.QuestionSet.from_dataset(made)
    assert (item.options, item.answer, item.image, item.metadata) == (("x", "y"), 1, None, {"year": 1990})


def test_a_column_that_a_dataset_lacks_is_named():
    with pytest.raises(QuestionError, match=r"the dataset has no column 'culture' for 'group'; it has photo, question"):
        vn.QuestionSet.from_dataset(dataset(), columns={"group": "culture"})
    with pytest.raises(QuestionError, match=r"the dataset has no column 'answer' for 'answer'"):
        vn.QuestionSet.from_dataset(datasets.Dataset.from_dict({"question": ["Q?"], "group": ["g"]}))
    with pytest.raises(QuestionError, match=r"dataset row 1: question 'b': answer -1 is outside the options"):
        vn.QuestionSet.from_dataset(dataset(answer=[0, -1, 0, 0]), columns={"image": "photo"})


# -- comparing texts ---------------------------------------------------------------------------------------------------


def test_normalized_text_ignores_case_form_spaces_and_outer_punctuation():
    assert normalize("  The\u00a0ＢＩＧ\n cat. ") == "the big cat"
    assert normalize("C#") == "c#"
    assert normalize("Straße") == normalize("STRASSE")
    assert normalize("?!") == "?!"
    assert normalize("e\u0301") == normalize("é")


def test_replacing_a_field_checks_again():
    with pytest.raises(QuestionError, match="answer 7 is outside the options"):
        replace(ask(), answer=7)


@pytest.mark.parametrize("ids", [True, False])
def test_ids_and_division_do_not_depend_on_where_the_folder_lies(tmp_path, ids):
    divisions = []
    for place in (tmp_path / "here", tmp_path / "elsewhere" / "deep"):
        place.mkdir(parents=True)
        save_questions(place, 20)
        if not ids:
            table = pd.read_csv(place / "questions.csv")
            table.drop(columns="id").to_csv(place / "questions.csv", index=False)
        parts = vn.QuestionSet.from_folder(place).split(0.5, seed=3)
        divisions.append([[item.id for item in part] for part in parts])
    assert divisions[0] == divisions[1]
    assert len(divisions[0][0]) == 10


def test_sets_that_are_asked_otherwise_are_not_silently_asked_as_the_first_is():
    def curt(item, options):
        return item.question

    first, other = (
        some_questions(2),
        vn.QuestionSet(vn.Question(None, "?", ("a", "b"), 0, "C", id=f"c{i}") for i in "12"),
    )
    assert len(first + other) == len(first + list(other)) == 4
    assert (first.asked(answer="text", prompt=curt) + other.asked(prompt=curt)).answer == "text"
    for how, told in (
        ({"answer": "text"}, "the first with answer='letters', the second with 'text'"),
        ({"prompt": curt}, "the first with prompt=None, the second with <function"),
        ({"shuffle": None}, "the first with shuffle=0, the second with None"),
    ):
        with pytest.raises(QuestionError, match=f"one set is asked in one way: {told}"):
            first + other.asked(**how)
