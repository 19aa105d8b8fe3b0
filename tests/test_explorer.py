"""The explorer's files: what is in them, what is refused, and what is left out. ``.ci/browser`` clicks it through."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vlmneurons as vn
from helpers import picture, some_questions
from vlmneurons.errors import MismatchError
from vlmneurons.look.explorer import thumbnail, write_explorer


@pytest.fixture(scope="module")
def study(load):
    """A small study of a model with random weights, which are scaled up so that answers change."""
    model, questions = load("qwen2_5_vl"), some_questions(12)
    stats = vn.record(model, questions, condition="all", batch_size=6)
    rule = vn.CAS(count=5)
    selection = rule.select(stats)
    return model, questions, stats, rule, selection, vn.knockout(model, questions, {"CAS": selection}, batch_size=6)


def data(page: Path, name: str):
    """What a file of data holds, read as JSON."""
    call = re.fullmatch(r'vn\("([^"]+)",(.*)\);\n', (page.parent / "data" / f"{name}.js").read_text("utf-8"), re.DOTALL)
    assert call is not None
    assert call[1] == name
    return json.loads(call[2])


@pytest.fixture(scope="module")
def page(study, tmp_path_factory):
    model, questions, stats, rule, selection, result = study
    how = {"model": model, "stats": stats, "selectors": {"CAS": rule}, "strongest": 3, "title": "A <study>"}
    return result.explore(tmp_path_factory.mktemp("explorer"), questions, {"CAS": selection}, **how)


def test_the_matrix_and_the_changed_answers_are_those_of_the_result(study, page):
    *_, selection, result = study
    told = data(page, "matrix/0")
    assert told["masks"] == list(selection)
    for value, name in (("correct", "delta"), ("margin", "margin")):
        matrix = result.matrix("CAS", value=name).loc[told["masks"], told["columns"]].to_numpy(dtype=float)
        np.testing.assert_allclose(np.array(told["cells"][f"{value} all"]["effect"], dtype=float), matrix, rtol=1e-4)
    for place, mask in enumerate(told["masks"]):
        changed = data(page, f"changed/0-{place}")
        (row,) = [n for n in result.rows_of("CAS") if result.masks[n - 1].group == mask]
        for number, group in enumerate(told["columns"]):
            questions = data(page, f"questions/{number}")
            found = {questions[at]["id"]: chosen for at, _, chosen, _ in changed.get(str(number), [])}
            own = [n for n, name in enumerate(result.groups) if name == group]
            assert [one["id"] for one in questions] == [result.ids[n] for n in own]
            expected = {
                result.ids[n]: int(result.chosen[row, n]) for n in own if result.chosen[row, n] != result.chosen[0, n]
            }
            assert found == expected


def test_rows_of_neurons_have_their_score_their_firing_and_how_many_groups_chose_them(study, page):
    _, _, stats, rule, selection, _ = study
    sites, scores = data(page, "study")["sites"], rule.score(stats)
    for place, group in enumerate(selection):
        rows = data(page, f"neurons/0-{place}")
        flat = [selection.space.flat(sites[one["site"]], one["number"]) for one in rows]
        assert sorted(flat) == selection[group].indices.tolist()
        own = scores[stats.index(group)]
        assert [one["score"] for one in rows] == pytest.approx([float(own[n]) for n in flat], rel=1e-4)
        assert [one["score"] for one in rows] == sorted((one["score"] for one in rows), reverse=True)
        for n, one in zip(flat, rows, strict=True):
            assert one["firing"] == pytest.approx((1000 * stats.probability[:, n]).round().tolist())
            assert one["groups"] == sum(n in neurons for neurons in selection.values())
        assert [one["shown"] for one in rows][:3] == [1, 1, 1]


def test_a_neurons_page_has_what_the_model_does_now(study, page):
    model, questions, _, _, selection, _ = study
    sites = data(page, "study")["sites"]
    first = data(page, "neurons/0-0")[0]
    site, number = sites[first["site"]], first["number"]
    view = vn.inspect_neuron(model, questions, (site, number), k=2)  # each of these questions has a picture of its own
    shown = data(page, f"shown/{first['site']}-{number}")["items"]
    expected = sorted(view.items, key=lambda one: -one.value)[:6]
    assert [one["id"] for one in shown] == [one.question.id for one in expected]
    for one, item in zip(shown, expected, strict=True):
        assert one["value"] == pytest.approx(item.value, rel=1e-4)
        assert "".join(text for text, _ in one["words"]) == "".join(text for text, _, _ in item.words())
        (drawn,) = one["maps"]
        heat = item.heat(size=(drawn["columns"], drawn["rows"]))
        steps = np.clip(heat / max(expected[0].value, 1e-9), 0, 1) * 63
        np.testing.assert_allclose(np.array(drawn["values"]).reshape(heat.shape), steps, atol=0.51)
    written = vn.neuron_writes(model, vn.NeuronSet(selection.space, [selection.space.flat(site, number)]))
    known = data(page, f"sites/{first['site']}")
    for direction, places in zip(("promotes", "suppresses"), known["neurons"][str(number)]["tokens"], strict=True):
        assert [known["tokens"][n] for n in places] == written.loc[written["direction"] == direction, "token"].tolist()


def test_the_page_loads_only_what_lies_beside_it(page):
    for name in ("index.html", "explorer.js", "style.css"):
        text = (page.parent / name).read_text("utf-8")
        assert "http" not in text.replace("http-equiv", "")
        assert "innerHTML" not in text
    linked = re.findall(r'(?:src|href)="([^"#]+)"', (page.parent / "index.html").read_text("utf-8"))
    assert set(linked) == {"data:,", "style.css", "explorer.js"}


def test_without_images_no_picture_is_in_the_folder(study, tmp_path):
    _, questions, stats, _, selection, result = study
    page = result.explore(tmp_path / "new", questions, {"CAS": selection}, stats=stats, images=False)
    assert not list((tmp_path / "new" / "thumbs").iterdir())
    assert all(one["pictures"] == [] for one in data(page, "questions/0"))
    assert data(page, "study")["images"] is False


def test_writing_again_leaves_nothing_of_before_and_other_folders_are_refused(study, tmp_path):
    _, questions, _, _, selection, result = study
    page = result.explore(tmp_path, questions, {"CAS": selection})
    (page.parent / "data" / "old.js").write_text("")
    result.explore(tmp_path, questions, {"CAS": selection})
    assert not (page.parent / "data" / "old.js").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(MismatchError, match="mine holds something else than an explorer: give a folder of its own"):
        result.explore(tmp_path / "mine", questions, {"CAS": selection})
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_what_does_not_belong_together_is_refused(study, load, tmp_path):
    model, questions, _, _, selection, result = study
    with pytest.raises(MismatchError, match="6 questions of the result are not among those given, such as"):
        result.explore(tmp_path, questions.filter(group="A"), {"CAS": selection})
    with pytest.raises(MismatchError, match="there is no selector 'MAD' here; there are CAS"):
        result.explore(tmp_path, questions, {"MAD": selection})
    with pytest.raises(MismatchError, match="showed options in the order of shuffle=0, and these questions have"):
        result.explore(tmp_path, questions.asked(shuffle=3), {"CAS": selection})
    with pytest.raises(MismatchError, match=r"is not shown beside answers given otherwise: .*prompt"):
        result.explore(tmp_path, questions.asked(prompt=another_prompt), {"CAS": selection}, model=model)
    other = vn.VLM.from_pretrained(model.name)
    with torch.no_grad():
        next(other.hf.parameters()).mul_(1.5)
    with pytest.raises(MismatchError, match=r"is not shown beside answers given otherwise: .*weights"):
        result.explore(tmp_path, questions, {"CAS": selection}, model=other)
    assert not (tmp_path / "index.html").exists()


def another_prompt(question, options):
    return f"Say: {question.question} {options}"


@pytest.mark.parametrize("size", [(2000, 1500), (40, 3000), (8, 8)])
def test_thumbnails_are_small_and_have_the_shape_of_their_picture(size):
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    packed = thumbnail(Image.fromarray(noise))
    assert len(packed) <= 2560
    with Image.open(io.BytesIO(packed)) as small:
        assert max(small.size) <= 192
        assert small.width / small.height == pytest.approx(size[0] / size[1], rel=0.35)
    assert thumbnail(picture().convert("RGBA"))[:4] == b"RIFF"


def test_questions_that_share_a_picture_share_its_thumbnail(tmp_path, study):
    _, questions, _, _, selection, result = study
    page = write_explorer(result, tmp_path, questions, {"CAS": selection})
    numbers = {n for group in range(2) for one in data(page, f"questions/{group}") for n in one["pictures"]}
    assert len(numbers) == len(list((tmp_path / "thumbs").iterdir())) == len({one.image_key for one in questions})
