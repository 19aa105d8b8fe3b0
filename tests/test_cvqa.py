"""CVQA in every form it is found in, made here with all of its columns, its 39 subsets and its traps."""

import base64
import io
import json
import logging

import datasets
import pandas as pd
import pytest

import vlmneurons as vn
from helpers import picture
from vlmneurons.errors import QuestionError
from vlmneurons.questions.cvqa import parse_subset

# Language, country as the dataset writes it, ISO 3166 alpha-3 by hand.
SUBSETS = [
    ("Amharic", "Ethiopia", "ETH"),
    ("Bengali", "India", "IND"),
    ("Breton", "France", "FRA"),
    ("Bulgarian", "Bulgaria", "BGR"),
    ("Chinese", "China", "CHN"),
    ("Chinese", "Singapore", "SGP"),
    ("Egyptian_Arabic", "Egypt", "EGY"),
    ("Filipino", "Philippines", "PHL"),
    ("Hindi", "India", "IND"),
    ("Igbo", "Nigeria", "NGA"),
    ("Indonesian", "Indonesia", "IDN"),
    ("Irish", "Ireland", "IRL"),
    ("Japanese", "Japan", "JPN"),
    ("Javanese", "Indonesia", "IDN"),
    ("Kinyarwanda", "Rwanda", "RWA"),
    ("Korean", "South Korea", "KOR"),
    ("Malay", "Malaysia", "MYS"),
    ("Marathi", "India", "IND"),
    ("Minangkabau", "Indonesia", "IDN"),
    ("Mongolian", "Mongolia", "MNG"),
    ("Norwegian", "Norway", "NOR"),
    ("Oromo", "Ethiopia", "ETH"),
    ("Portuguese", "Brazil", "BRA"),
    ("Romanian", "Romania", "ROU"),
    ("Russian", "Russia", "RUS"),
    ("Sinhala", "Sri_Lanka", "LKA"),
    ("Spanish", "Argentina", "ARG"),
    ("Spanish", "Chile", "CHL"),
    ("Spanish", "Colombia", "COL"),
    ("Spanish", "Ecuador", "ECU"),
    ("Spanish", "Mexico", "MEX"),
    ("Spanish", "Spain", "ESP"),
    ("Spanish", "Uruguay", "URY"),
    ("Sundanese", "Indonesia", "IDN"),
    ("Swahili", "Kenya", "KEN"),
    ("Tamil", "India", "IND"),
    ("Telugu", "India", "IND"),
    ("Urdu", "India", "IND"),
    ("Urdu", "Pakistan", "PAK"),
]
CATEGORIES = ("Cooking and food", "Traditions, art, and history")


def encoded(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


def rows(secret: bool = False, text_options: bool = False) -> dict[str, list]:
    """Two questions about one picture and one about another, for each subset; one picture is corrupt."""
    columns: dict[str, list] = {
        name: []
        for name in (
            "image",
            "ID",
            "Subset",
            "Question",
            "Translated Question",
            "Options",
            "Translated Options",
            "Label",
            "Category",
            "Image Type",
            "Image Source",
            "License",
        )
    }
    for n, (language, country, _) in enumerate(SUBSETS):
        for k in range(3):
            options = [f"option {letter} of {n} {k}" for letter in "abcd"]
            local = [f"lokal {option}" for option in options]
            row = {
                "image": {"bytes": b"no picture" if (n, k) == (3, 2) else encoded(2 * n + (k == 2)), "path": None},
                "ID": f"{7000 + n}{'b' if k == 2 else 'a'}_{k}",
                "Subset": str((language, country)),
                "Question": f"lokal {n} {k}?",
                "Translated Question": f"question {n} {k}?",
                "Options": str(local) if text_options else local,
                "Translated Options": json.dumps(options) if text_options else options,
                "Label": -1 if secret else (n + k) % 4,
                "Category": CATEGORIES[k % 2],
                "Image Type": "Self",
                "Image Source": "self",
                "License": "CC BY-SA 4.0",
            }
            for name, value in row.items():
                columns[name].append(value)
    return columns


def made(**how) -> datasets.Dataset:
    return datasets.Dataset.from_dict(rows(**how)).cast_column("image", datasets.Image())


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """The same rows as parquet (labelled, secret, old revision), arrow, a saved dataset and a TSV."""
    folder = tmp_path_factory.mktemp("cvqa")
    cache, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, folder / "cache"
    whole = made()
    whole.to_parquet(folder / "labelled.parquet")
    made(secret=True).to_parquet(folder / "secret.parquet")
    made(text_options=True).to_parquet(folder / "old.parquet")
    (folder / "repository" / "data").mkdir(parents=True)
    whole.select(range(60)).to_parquet(folder / "repository" / "data" / "test-00000-of-00002.parquet")
    whole.select(range(60, 117)).to_parquet(folder / "repository" / "data" / "test-00001-of-00002.parquet")
    made(secret=True).to_parquet(folder / "repository" / "data" / "train-00000-of-00001.parquet")
    whole.save_to_disk(folder / "saved")
    columns = rows()
    table = pd.DataFrame(
        {
            "index": columns["ID"],
            "image": [base64.b64encode(image["bytes"]).decode() for image in columns["image"]],
            "question": columns["Translated Question"],
            **{letter: [row[n] for row in columns["Translated Options"]] for n, letter in enumerate("ABCD")},
            "answer": ["ABCD"[label] for label in columns["Label"]],
            "category": columns["Category"],
            "Subset": columns["Subset"],
        }
    )
    table.loc[1, "image"] = table.loc[0, "index"]  # VLMEvalKit: a short cell names the row whose picture it shares
    table.to_csv(folder / "labelled.tsv", sep="\t", index=False)
    yield folder
    datasets.config.HF_DATASETS_CACHE = cache


def plain(questions):
    return [(q.id, q.question, q.options, q.answer, q.group) for q in questions]


def test_every_row_is_read_with_its_country_as_an_iso_code(copies):
    questions = vn.load_cvqa(copies / "labelled.parquet")
    assert len(questions) == 117
    assert questions.groups == tuple(sorted({code for *_, code in SUBSETS}))
    assert len(questions.groups) == 30
    for n, (language, country, code) in enumerate(SUBSETS):
        for k in range(3):
            item = questions[3 * n + k]
            assert item.question == f"question {n} {k}?"
            assert item.options == tuple(f"option {letter} of {n} {k}" for letter in "abcd")
            assert item.answer == (n + k) % 4
            assert item.group == code == item.metadata["country"]
            assert item.metadata["country_name"] == country.replace("_", " ")
            assert item.metadata["language"] == language.replace("_", " ")
            assert item.metadata["category"] == CATEGORIES[k % 2]
            assert item.metadata["license"] == "CC BY-SA 4.0"


def test_the_local_language_has_its_own_questions_and_the_same_answers(copies):
    english = vn.load_cvqa(copies / "labelled.parquet")
    local = vn.load_cvqa(copies / "labelled.parquet", language="local")
    assert local[4].question == "lokal 1 1?"
    assert local[4].options[0] == "lokal option a of 1 1"
    assert [(q.id, q.answer, q.group) for q in local] == [(q.id, q.answer, q.group) for q in english]


@pytest.mark.parametrize("form", ["old.parquet", "repository", "saved", "labelled.tsv", "dataset"])
def test_every_form_gives_the_same_questions(copies, form):
    expected = vn.load_cvqa(copies / "labelled.parquet")
    found = vn.load_cvqa(made() if form == "dataset" else str(copies / form))
    assert plain(found) == plain(expected)
    for n in (0, 1, 2, 50):
        assert found[n].load_images()[0].tobytes() == picture(2 * (n // 3) + (n % 3 == 2)).convert("RGB").tobytes()


def test_arrow_files_are_read(copies):
    file = next((copies / "saved").glob("*.arrow"))
    assert plain(vn.load_cvqa(file)) == plain(vn.load_cvqa(copies / "labelled.parquet"))


def test_groups_by_subset_category_column_and_function(copies):
    source = copies / "labelled.parquet"
    subsets = vn.load_cvqa(source, group_by="subset")
    assert len(subsets.groups) == 39
    assert {"Telugu (IND)", "Egyptian Arabic (EGY)", "Sinhala (LKA)"} <= set(subsets.groups)
    assert vn.load_cvqa(source, group_by="category").groups == CATEGORIES
    assert "Spanish" in vn.load_cvqa(source, group_by="language").groups
    by_function = vn.load_cvqa(source, group_by=lambda q: q.metadata["image_type"])
    assert by_function.groups == ("Self",)
    with pytest.raises(QuestionError, match="has no column 'continent'; it has category, image_type"):
        vn.load_cvqa(source, group_by="continent")


def test_thin_groups_are_left_out_and_sampling_is_balanced_and_seeded(copies, caplog):
    source = copies / "labelled.parquet"
    with caplog.at_level(logging.WARNING):
        questions = vn.load_cvqa(source, min_items=6, per_group=6, seed=1)
    assert questions.counts() == {"ETH": 6, "IDN": 6, "IND": 6}
    assert "left out, with fewer than 6 questions: ARG (3), BGR (3)" in caplog.text
    assert plain(questions) == plain(vn.load_cvqa(source, min_items=6, per_group=6, seed=1))
    assert plain(questions) != plain(vn.load_cvqa(source, min_items=6, per_group=6, seed=2))
    with pytest.raises(QuestionError, match=r"6 questions per group were asked for; fewer are in ARG \(3\)"):
        vn.load_cvqa(source, per_group=6)
    with pytest.raises(QuestionError, match=r"no group has 100 questions; the largest is IND \(18\)"):
        vn.load_cvqa(source, min_items=100)


def test_secret_labels_are_refused_by_name_not_scored(copies):
    with pytest.raises(QuestionError, match="Label is -1 in all 117 rows") as caught:
        vn.load_cvqa(copies / "secret.parquet")
    assert "keeps its answers secret" in str(caught.value)
    assert "labels={ID: answer}" in str(caught.value)
    with pytest.raises(QuestionError, match="Label is -1 in all 117 rows"):
        vn.load_cvqa(copies / "secret.parquet", on_error="skip")
    for label in (4, 7):
        some = made().map(lambda row, label=label: {"Label": label if row["ID"] == "7002a_1" else row["Label"]})
        with pytest.raises(QuestionError, match=rf"Label is {label} in 1 of 117 rows \(first: row 7 \(ID '7002a_1'\)"):
            vn.load_cvqa(some)


def test_labels_of_ones_own_open_the_secret_copy(copies):
    expected = vn.load_cvqa(copies / "labelled.parquet")
    for form in (lambda q: q.answer, lambda q: "ABCD"[q.answer], lambda q: q.right):
        labels = {q.id: form(q) for q in expected}
        assert plain(vn.load_cvqa(copies / "secret.parquet", labels=labels)) == plain(expected)
    del labels["7001a_0"]
    with pytest.raises(QuestionError, match=r"row 3 \(ID '7001a_0'\): labels has no entry"):
        vn.load_cvqa(copies / "secret.parquet", labels=labels)


def test_a_corrupt_picture_spoils_only_its_own_question_and_only_when_it_is_opened(copies):
    questions = vn.load_cvqa(copies / "labelled.parquet")
    bad = next(q for q in questions if q.id == "7003b_2")
    with pytest.raises(QuestionError, match=r"question '7003b_2': the picture .* cannot be opened"):
        bad.load_images()
    first, second = questions.split(0.5, seed=0)  # by content, without decoding
    for item in questions:
        shares = f"{item.id[:-2]}_{1 - int(item.id[-1])}"
        if item.id.endswith(("_0", "_1")):
            assert (item in list(first)) == (shares in {q.id for q in first})
    assert len(first) + len(second) == 117


def test_nothing_of_a_picture_is_decoded_while_loading(copies, monkeypatch):
    import PIL.Image

    opened = []
    original = PIL.Image.open
    monkeypatch.setattr(PIL.Image, "open", lambda *args, **how: opened.append(1) or original(*args, **how))
    questions = vn.load_cvqa(copies / "labelled.parquet", per_group=2)
    questions.split(0.5)
    assert not opened
    questions[0].load_images()
    assert opened


@pytest.mark.parametrize(
    "hostile",
    [
        "__import__('os').system('touch /tmp/hacked')",
        "('Telugu', __import__('os').getcwd())",
        "('Telugu',)",
        "('Telugu', 'India', 'x')",
        "Telugu, India",
        "('Telugu', 5)",
        "('Telugu', '')",
        "(" * 5000,
        "('" + "a" * 10**6 + "', 'India')",
        "{'Telugu', 'India'}",
        "",
    ],
    ids=range(11),
)
def test_hostile_subset_texts_are_refused_not_run(hostile):
    with pytest.raises(QuestionError, match="Subset must be a pair such as") as caught:
        parse_subset(hostile)
    assert len(str(caught.value)) < 300


def test_rows_that_are_no_questions_are_named_or_skipped(copies, caplog):
    def spoiled(**changes) -> datasets.Dataset:
        columns = rows()
        for name, value in changes.items():
            columns[name.replace("_", " ")][5] = value
        return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())

    same = ["x", "y", "x", "z"]
    cases = [
        (
            spoiled(Translated_Options=["a", "b", "c"]),
            r"row 5 \(ID '7001b_2'\), column 'Translated Options': options mu",
        ),
        (spoiled(Subset="('Klingon', 'Kronos')"), "'Kronos' is no country name that pycountry knows for certain"),
        (spoiled(Subset="('Korean', 'Korea')"), "'Korea' is no country name that pycountry knows for certain"),
        (spoiled(image=None), r"row 5 \(ID '7001b_2'\): the row has no picture"),
        (spoiled(ID="7000a_0"), "ids must be unique; more than once there are 7000a_0"),
    ]
    for dataset, message in cases:
        with pytest.raises(QuestionError, match=message):
            vn.load_cvqa(dataset)
    columns = rows()
    columns["Translated Options"][5], columns["Label"][5] = same, 2
    twice = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    with pytest.raises(QuestionError, match="the right answer 'x' stands among the options twice"):
        vn.load_cvqa(twice)
    with caplog.at_level(logging.WARNING):
        assert len(vn.load_cvqa(twice, on_error="skip")) == 116
    assert "1 of 117 rows of the dataset are no questions and were skipped" in caplog.text
    columns = rows(text_options=True)
    columns["Translated Options"][5] = "['a' 'b' 'c' 'd']"  # as NumPy prints it: Python would read one option
    with pytest.raises(QuestionError, match="options must be a list of 4 texts"):
        vn.load_cvqa(datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()))
    assert vn.load_cvqa(spoiled(Subset="('Klingon', 'Kronos')"), countries={"kronos": "QKR"}).groups[-6:] == (
        "QKR",
        "ROU",
        "RUS",
        "RWA",
        "SGP",
        "URY",
    )


def test_sources_that_are_not_there_or_not_cvqa_are_refused(tmp_path, unchecked):
    cases = [
        ("missing.parquet", "there is no file or folder 'missing.parquet'"),
        ("nowhere", "there is no file or folder 'nowhere'"),
        (tmp_path, "holds no .parquet or .arrow file"),
        (datasets.Dataset.from_dict({"question": ["?"]}), "the dataset has no column 'image', 'ID', 'Subset'"),
        (made().select([]), "the dataset has no rows"),
    ]
    for source, message in cases:
        with pytest.raises(QuestionError, match=message):
            vn.load_cvqa(source)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(QuestionError, match="cannot be read as a dataset"):
        vn.load_cvqa(tmp_path / "broken.parquet")
    with pytest.raises(QuestionError, match="language='French' does not exist; choose from english, local"):
        vn.load_cvqa(tmp_path, language="French")
    with pytest.raises(QuestionError, match=r"on_error='\?' does not exist"):
        vn.load_cvqa(tmp_path, on_error="?")


def test_the_hub_without_network_says_what_to_do():
    with pytest.raises(QuestionError, match=r"cannot be loaded from the Hub .* Give the path of a local copy"):
        vn.load_cvqa("nobody/no-such-cvqa")


def test_a_table_keeps_options_that_look_like_missing_values_or_numbers(tmp_path):
    header = "index\timage\tquestion\tA\tB\tC\tD\tanswer\tcountry\tlanguage"
    cell = base64.b64encode(encoded(0)).decode()
    (tmp_path / "t.tsv").write_text(f"{header}\n1\t{cell}\tHow many?\tNone\tNA\t1.0\t10\tB\tNamibia\tAfrikaans\n")
    (item,) = vn.load_cvqa(tmp_path / "t.tsv")
    assert item.options == ("None", "NA", "1.0", "10")
    assert (item.right, item.group, item.metadata["subset"]) == ("NA", "NAM", "Afrikaans (NAM)")
    (tmp_path / "p.tsv").write_text("index\timage_path\tquestion\tA\tB\tC\tD\tanswer\n1\t../x.png\t?\ta\tb\tc\td\tA\n")
    with pytest.raises(QuestionError, match=r"the picture's path '../x.png' leads out of the folder"):
        vn.load_cvqa(tmp_path / "p.tsv")
    (tmp_path / "b.tsv").write_text(
        "index\timage\tquestion\tA\tB\tC\tD\tanswer\tcountry\n1\t!!\t?\ta\tb\tc\td\tA\tPeru\n"
    )
    with pytest.raises(QuestionError, match=r"the picture 'Base64Picture' cannot be opened .* no base64 text"):
        vn.load_cvqa(tmp_path / "b.tsv")[0].load_images()
    (tmp_path / "n.tsv").write_text("index\tquestion\n1\t?\n")
    with pytest.raises(QuestionError, match="has no column 'a', 'b', 'c', 'd', 'answer'; it has index, question"):
        vn.load_cvqa(tmp_path / "n.tsv")
    secret = (tmp_path / "t.tsv").read_text().replace("\tB\tNamibia", "\t-1\tNamibia")
    (tmp_path / "s.tsv").write_text(secret)
    with pytest.raises(QuestionError, match="Label is '-1' in all 1 rows"):
        vn.load_cvqa(tmp_path / "s.tsv")


def test_a_dataset_on_the_hub_is_asked_for_by_name_split_and_revision(copies, monkeypatch):
    asked = []

    def load_dataset(name, **how):
        asked.append((name, how))
        return made(secret=how["revision"] == "secret", text_options=how["revision"] == "old")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    expected = plain(vn.load_cvqa(copies / "labelled.parquet"))
    assert plain(vn.load_cvqa()) == expected
    assert plain(vn.load_cvqa("someone/cvqa-labelled", revision="old", split="validation")) == expected
    assert asked == [
        ("afaji/cvqa", {"split": "test", "revision": None}),
        ("someone/cvqa-labelled", {"split": "validation", "revision": "old"}),
    ]
    with pytest.raises(QuestionError, match=r"afaji/cvqa.*Label is -1 in all 117 rows"):
        vn.load_cvqa("afaji/cvqa", revision="secret")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: (_ for _ in ()).throw(ValueError("Unknown split")))
    with pytest.raises(QuestionError, match=r"cannot be loaded from the Hub \(ValueError: Unknown split\)"):
        vn.load_cvqa("afaji/cvqa", split="train")


def test_the_command_line_passes_a_hub_dataset_on(monkeypatch):
    from vlmneurons.cli import open_questions

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **how: asked.append((name, how)) or made())
    questions = open_questions(
        "afaji/cvqa", language="local", revision="abc", group_by="subset", min_items=2, per_group=2, seed=3
    )
    assert asked == [("afaji/cvqa", {"split": "test", "revision": "abc"})]
    assert len(questions.groups) == 39
    assert set(questions.counts().values()) == {2}
    assert questions[0].question.startswith("lokal")
