"""The shipped demo: files, licences, questions, and how well both models do on them. All offline."""

import csv
import io
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

import vlmneurons as vn
from tools.demo import ask, build, decoder, evaluate, facts, organism, tables, train
from tools.demo.catalogue import CULTURES, HELD_OUT_STYLES, ITEMS, TRAINING_STYLES
from tools.demo.compose import SPRITES, Sprites
from tools.demo.decoder import Recipe
from vlmneurons import demo
from vlmneurons.errors import FileFormatError, VLMNeuronsError

FOLDER = Path(demo.__file__).parent
MEGABYTE = 1_000_000


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The model is so small that more threads make it slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def table():
    with (FOLDER / "pictures" / "pictures.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def shipped():
    return ask.read(FOLDER / "pictures" / "questions.zip")


@pytest.fixture(scope="module", params=demo.DEMO_MODELS)
def loaded(request):
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    model = AutoModelForImageTextToText.from_pretrained(FOLDER / request.param, dtype=torch.float32).eval()
    return request.param, model, decoder.Asker(AutoTokenizer.from_pretrained(FOLDER / request.param))


# files


def test_every_shipped_file_has_its_checksum_and_no_other_file_is_there():
    checksums = json.loads((FOLDER / "checksums.json").read_text(encoding="utf-8"))
    folders = (*demo.DEMO_MODELS, "pictures")
    files = {path for folder in folders for path in (FOLDER / folder).rglob("*") if path.is_file()}
    assert {path.relative_to(FOLDER).as_posix() for path in files} == set(checksums)
    assert {name: demo.sha256(FOLDER / name) for name in checksums} == checksums


def test_a_damaged_file_is_refused_with_its_name(tmp_path, monkeypatch):
    (tmp_path / "natural").mkdir()
    (tmp_path / "natural" / "config.json").write_text("{}")
    (tmp_path / "checksums.json").write_text(json.dumps({"natural/config.json": "0" * 64}))
    monkeypatch.setattr(demo, "_FOLDER", tmp_path)
    with pytest.raises(FileFormatError, match=r"config\.json is damaged: its SHA-256 is .* install vlmneurons again"):
        demo._verify.__wrapped__("natural")


def test_a_missing_file_is_refused_with_its_name(tmp_path, monkeypatch):
    (tmp_path / "checksums.json").write_text(json.dumps({"pictures/questions.zip": "0" * 64}))
    monkeypatch.setattr(demo, "_FOLDER", tmp_path)
    with pytest.raises(FileFormatError, match=r"questions\.zip is missing; install vlmneurons again"):
        demo._verify.__wrapped__("natural")


def test_pictures_and_weights_stay_within_their_limits():
    def size(*folders: str) -> int:
        return sum(path.stat().st_size for folder in folders for path in (FOLDER / folder).rglob("*") if path.is_file())

    assert size("pictures") <= MEGABYTE
    assert size(*demo.DEMO_MODELS) <= 9.5 * MEGABYTE


def test_importing_the_demo_imports_nothing_heavy():
    code = "import sys, vlmneurons.demo; print([m for m in ('torch', 'transformers', 'PIL') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# pictures and licences


def test_every_picture_is_in_the_table_with_author_licence_and_source(table):
    with zipfile.ZipFile(SPRITES) as archive:
        assert sorted(archive.namelist()) == sorted(row["id"] + ".webp" for row in table)
    assert all(value for row in table for value in row.values()), "a cell of the table is empty"
    assert {row["licence"] for row in table} <= {
        "Apache-2.0",
        "MIT",
        "CC-BY-4.0",
        "CC-BY-2.0",
        "CC0-1.0",
        "Public Domain",
    }
    assert all(re.match(r"https://", row["licence_url"]) and row["source_url"].startswith("http") for row in table)


def test_the_texts_of_the_licences_that_must_travel_are_shipped(table):
    notice = (FOLDER / "pictures" / "NOTICE.md").read_text(encoding="utf-8")
    for author in {row["author"] for row in table if row["licence"] in ("MIT", "CC-BY-4.0", "CC-BY-2.0", "Apache-2.0")}:
        assert author in notice
    assert "Apache License" in (FOLDER / "pictures" / "LICENSE-Apache-2.0.txt").read_text(encoding="utf-8")
    assert "WITHOUT WARRANTY OF ANY KIND" in notice


def test_held_out_styles_never_appear_in_training(table):
    assert not set(TRAINING_STYLES) & set(HELD_OUT_STYLES)
    assert {row["style"] for row in table if row["split"] == "training"} <= set(TRAINING_STYLES)
    assert {row["style"] for row in table if row["split"] == "held-out"} <= set(HELD_OUT_STYLES)
    assert {row["item"] for row in table} == {item.name for item in ITEMS}


# questions


def test_every_culture_has_enough_questions_on_both_sides_of_the_split(shipped):
    halves = tables.split(shipped[0])
    for half in (halves.identify, halves.evaluate):
        assert min(sum(record.group == culture for record in half) for culture in CULTURES) >= 60
    identify, evaluate_ = ({record.image_id for record in half} for half in (halves.identify, halves.evaluate))
    assert not identify & evaluate_


def test_questions_show_held_out_sprites_and_their_answers_are_the_facts(shipped, table):
    records, pictures = shipped
    items = {item.name: item for item in ITEMS}
    split_of = {row["id"]: row["split"] for row in table}
    pairs = facts.held_out_pairs(0)
    for record in records:
        item, kind = items[str(record.metadata["item"])], str(record.metadata["kind"])
        assert split_of[record.image_id] == "held-out"
        assert record.group == item.culture
        assert record.options[record.answer] == facts.answer_to(item, kind)
        assert (record.metadata["pair"] == "new") == ((item.name, kind) in pairs)
        assert len(set(record.options)) == 4
    assert {picture.size for picture in pictures.values()} == {(64, 64)}


def test_the_shipped_questions_are_the_ones_that_training_makes(shipped):
    records = ask.make_records(Sprites(), facts.held_out_pairs(train.PAIRS_SEED), train.EXAM_SEED)
    assert records == shipped[0]


def test_every_answer_is_one_token():
    tokenizer = build.make_tokenizer()
    for answer in facts.vocabulary():
        assert len(tokenizer(" " + answer, add_special_tokens=False).input_ids) == 1
    assert tokenizer.decode(tokenizer("Anything at all, ça va?").input_ids) == "Anything at all, ça va?"


# models


def _documented(name: str) -> float:
    text = train.REPORT.read_text(encoding="utf-8").partition(f"## {name}\n")[2]
    match = re.search(r"\| all \| \d+ \| ([\d.]+) \|", text)
    assert match is not None
    return float(match[1])


def test_accuracy_is_within_a_point_of_the_documented_figure(loaded, shipped):
    name, model, asker = loaded
    records, pictures = shipped
    exam = evaluate.Exam.make(model, asker, records, pictures)
    right = evaluate.correct(exam, evaluate.read(model, exam)).float()
    assert 100 * right.mean().item() == pytest.approx(_documented(name), abs=1)
    assert right.mean() >= 0.9
    assert min(right[exam.groups == index].mean() for index in range(len(CULTURES))) >= 0.75


def test_picture_and_question_are_both_needed(loaded, shipped):
    _, model, asker = loaded
    records, pictures = shipped
    for colour in ("black", "grey", "white"):
        blank = dict.fromkeys(pictures, Image.new("RGB", (64, 64), colour))
        blind = evaluate.Exam.make(model, asker, records, blank)
        assert evaluate.correct(blind, evaluate.read(model, blind)).float().mean() <= 0.35
    mute = evaluate.Exam.make(model, asker, records, pictures, question="")
    assert evaluate.correct(mute, evaluate.read(model, mute)).float().mean() <= 0.55


def test_packed_questions_give_the_logits_of_the_plain_forward_pass(loaded):
    from transformers import AutoTokenizer

    name, model, _ = loaded
    assert decoder.check_packing(model, AutoTokenizer.from_pretrained(FOLDER / name)) < 1e-3


def test_a_neuron_is_particular_by_how_much_more_often_it_opens_on_one_culture_than_on_the_others():
    # Three pictures of cultures 0, 0 and 5, of two tokens; the last token of the second picture does not count.
    opened = torch.full((3, 2, 3), -100.0)
    opened[0, :, 0] = opened[1, 0, 0] = 100.0  # on 3 of 3 tokens of culture 0, and never on culture 5
    opened[:, :, 1] = 100.0  # always
    opened[0, 0, 2] = opened[1, :, 2] = 100.0  # on 2 of 3 tokens of culture 0, and never on culture 5
    counted = torch.tensor([[True, True], [True, False], [True, True]])
    found = organism._particular(opened, counted, torch.tensor([0, 0, 5]))
    above = (1 - organism.PARTICULAR) + (2 / 3 - organism.PARTICULAR)
    assert found.item() == pytest.approx(above / (8 * organism.SET_SIZE))


def test_selectors_recover_the_planted_neurons_of_the_organism(loaded, shipped):
    name, model, asker = loaded
    if name != "organism":
        pytest.skip("only the organism has planted neurons")
    records, pictures = shipped
    stats = evaluate.count(model, evaluate.Exam.make(model, asker, tables.split(records).identify, pictures))
    found, truth = vn.CAS(count=12).select(stats), vn.demo_truth()
    assert {len(neurons) for neurons in truth.values()} == {12}
    hits = sum(len(found[culture] & truth[culture]) for culture in CULTURES)
    assert hits / sum(map(len, found.values())) >= 0.95
    assert hits / sum(map(len, truth.values())) >= 0.95


def test_switching_off_the_planted_neurons_of_the_organism_costs_their_culture_alone(loaded, shipped):
    name, model, asker = loaded
    if name != "organism":
        pytest.skip("only the organism has planted neurons")
    records, pictures = shipped
    exam = evaluate.Exam.make(model, asker, tables.split(records).evaluate, pictures)
    clean = evaluate.correct(exam, evaluate.read(model, exam)).float()
    own, cross = [], []
    for index, neurons in enumerate(vn.demo_truth().values()):
        change = evaluate.correct(exam, evaluate.read(model, exam, neurons.indices)).float() - clean
        own.append(change[exam.groups == index].mean().item())
        cross.append(change[exam.groups != index].mean().item())
    assert sum(own) / len(own) < -0.6
    assert abs(sum(cross) / len(cross)) < 0.01


def test_record_and_knockout_agree_with_the_packed_second_implementation(loaded, shipped):
    name, _, asker = loaded
    records, pictures = shipped
    model, questions = vn.load_demo(name)
    part = [record for record in tables.split(records).identify if record.group in ("Japan", "Egypt")][::5]
    asked = questions.filter(id={record.id for record in part})
    exam = evaluate.Exam.make(model.hf, asker, part, pictures)

    theirs = evaluate.count(model.hf, exam).select_groups(["Egypt", "Japan"])
    ours = vn.record(model, asked, condition="correct", batch_size=16, progress=False)
    assert ours.items.tolist() == theirs.items.tolist()
    assert ours.tokens.tolist() == theirs.tokens.tolist()
    different = (ours.positive - theirs.positive).abs()
    assert different.max() <= 1  # a gate within rounding of 0 may fall on the other side of it
    assert different.sum() <= 1e-5 * theirs.tokens.sum() * len(theirs.space)

    neurons = vn.CAS(0.02).select(ours)
    result = vn.knockout(model, asked, {"CAS": neurons}, batch_size=16, progress=False)
    place = {record.id: number for number, record in enumerate(part)}
    order = [place[identity] for identity in result.ids]
    for row, group in enumerate([None, "Egypt", "Japan"]):
        scores = evaluate.read(model.hf, exam, None if group is None else neurons[group].indices)
        margins = evaluate.margins(exam, scores)[order]
        torch.testing.assert_close(torch.from_numpy(result.margins[row]).float(), margins, atol=1e-3, rtol=0)
        assert result.correct[row].tolist() == evaluate.correct(exam, scores)[order].tolist()


# how they are made


def test_a_short_training_writes_both_models_and_the_same_questions_in_the_form_that_ships(tmp_path, monkeypatch):
    few = Recipe(steps=2, rows=2, questions=2, variants=1)
    for name, value in {"VISION_STEPS": 1, "NATURAL": few, "ORGANISM_STEPS": 2, "ORGANISM_VARIANTS": 1}.items():
        monkeypatch.setattr(train, name, value)
    train.train(0, tmp_path, train.Log())
    made = json.loads((tmp_path / "checksums.json").read_text(encoding="utf-8"))
    assert made.keys() == json.loads((FOLDER / "checksums.json").read_text(encoding="utf-8")).keys()
    assert ask.read(tmp_path / "pictures" / "questions.zip")[0] == ask.read(FOLDER / "pictures" / "questions.zip")[0]
    monkeypatch.setattr(demo, "_FOLDER", tmp_path)
    demo._verify.cache_clear()
    try:
        for name in demo.DEMO_MODELS:
            model, questions = vn.load_demo(name)
            assert len(questions) == 1392
            assert {str(value.dtype) for value in model.hf.state_dict().values() if value.is_floating_point()} == {
                "torch.float32"
            }
        assert {len(neurons) for neurons in vn.demo_truth().values()} == {12}
    finally:
        demo._verify.cache_clear()


# the public door


def test_load_demo_gives_a_model_and_questions_that_fit_together():
    model, questions = vn.load_demo()
    assert set(questions.groups) == set(CULTURES)
    identify, _ = questions.split(0.5, seed=0)
    stats = vn.record(model, identify[:32], condition="all")
    assert stats.space == model.space("language", "gate")
    assert stats.provenance["model"] == "vlmneurons-demo/natural"  # the same on every machine
    answer = model.hf.generate(**model.prepare([questions[0]]), max_new_tokens=3, do_sample=False)
    assert model.tokenizer.decode(answer[0]).endswith("</s>")


def test_an_unknown_demo_is_refused_with_the_names_that_exist():
    with pytest.raises(VLMNeuronsError, match="no demo model 'real'; the demo models are 'natural', 'organism'"):
        vn.load_demo("real")


def test_pictures_in_memory_equal_those_in_the_archive(shipped):
    with zipfile.ZipFile(FOLDER / "pictures" / "questions.zip") as archive:
        name = shipped[0][0].image
        assert Image.open(io.BytesIO(archive.read(name))).convert("RGB").tobytes() == shipped[1][name].tobytes()
