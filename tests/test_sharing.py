"""Sharing: what goes to the Hub comes back equal, with a card from its provenance; the Hub is a folder here."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open

import vlmneurons as vn
from vlmneurons.errors import FileFormatError, VLMNeuronsError
from vlmneurons.statistics import hub as sharing

SPACE = vn.NeuronSpace.from_widths("language", "gate", [12, 12])
PROVENANCE = {"model": "some/model", "revision": "4c1f", "tokens": "content", "versions": {"torch": "2"}}
NEURONS = vn.NeuronSet(SPACE, [1, 5])
SELECTION = vn.Selection({"EGY": NEURONS, "SGP": vn.NeuronSet(SPACE, [2])}, selector="CAS(2)", provenance=PROVENANCE)
STATISTICS = vn.ActivationStatistics.from_counts(
    SPACE, groups=["EGY", "SGP"], positive=np.arange(48).reshape(2, 24) % 7, tokens=[7, 9], provenance=PROVENANCE
)
THINGS = {"NeuronSet": NEURONS, "Selection": SELECTION, "ActivationStatistics": STATISTICS}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that is a folder: the calls that the library makes, and nothing else."""
    import huggingface_hub

    calls = []

    class Api:
        def __init__(self, token=None, library_name=None, library_version=None):
            assert library_name == "vlmneurons"
            calls.append(("token", token))

        def create_repo(self, repo_id, *, repo_type, private, exist_ok):
            assert repo_type == "dataset"
            assert exist_ok
            calls.append(("create", repo_id, private))
            (tmp_path / repo_id).mkdir(parents=True, exist_ok=True)

        def upload_folder(self, *, repo_id, repo_type, folder_path, commit_message):
            assert repo_type == "dataset"
            calls.append(("upload", repo_id, commit_message))
            shutil.copytree(folder_path, tmp_path / repo_id, dirs_exist_ok=True)
            return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

        def list_repo_files(self, repo_id, *, repo_type, revision):
            calls.append(("list", repo_id, revision))
            return [path.name for path in (tmp_path / repo_id).iterdir()]

        def hf_hub_download(self, repo_id, filename, *, repo_type, revision):
            calls.append(("download", repo_id, filename, revision))
            return str(tmp_path / repo_id / filename)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return SimpleNamespace(folder=tmp_path, calls=calls)


@pytest.mark.parametrize("kind", THINGS)
def test_what_is_pushed_comes_back_equal(kind, hub):
    thing = THINGS[kind]
    assert thing.push_to_hub("me/neurons", message="first") == "https://hub/me/neurons/commit/1"
    assert {path.name for path in (hub.folder / "me/neurons").iterdir()} == {"README.md", f"{kind}.safetensors"}
    assert type(thing).from_hub("me/neurons") == thing
    back = vn.from_hub("me/neurons", revision="abc", token="secret")
    assert back == thing
    assert getattr(back, "provenance", None) == getattr(thing, "provenance", None)
    assert ("create", "me/neurons", True) in hub.calls  # private unless said otherwise
    assert ("upload", "me/neurons", "first") in hub.calls
    assert ("list", "me/neurons", "abc") in hub.calls
    assert ("download", "me/neurons", f"{kind}.safetensors", "abc") in hub.calls
    assert ("token", "secret") in hub.calls


def test_the_card_says_what_it_is_where_it_comes_from_and_how_to_load_it(hub):
    vn.push_to_hub(SELECTION, "me/neurons", license="cc-by-4.0", notes="From 40 questions a group.", private=False)
    text = (hub.folder / "me/neurons/README.md").read_text(encoding="utf-8")
    assert text.startswith('---\nlicense: "cc-by-4.0"\nlibrary_name: vlmneurons\n')
    for part in (
        "# neurons",
        "A `Selection` of",
        "    Selection CAS(2): 2 groups",
        "      EGY  2 neurons",
        "From 40 questions a group.",
        "| model | some/model |",
        "| revision | 4c1f |",
        '| versions | {"torch": "2"} |',
        SPACE.fingerprint,
        'vn.from_hub("me/neurons")',
    ):
        assert part in text
    assert "license" not in sharing.card(SELECTION, "me/neurons")
    assert "it carries no provenance" in sharing.card(NEURONS, "me/neurons")
    assert ("create", "me/neurons", False) in hub.calls


def test_a_hostile_provenance_cannot_break_the_card():
    bad = {"model": "x | y\n---\n<script>alert(1)</script>\n# head", "a|b": ["\n", "&"]}
    selection = vn.Selection({"A": NEURONS}, selector="by hand", provenance=bad)
    text = sharing.card(selection, "me/neurons")
    assert "<script" not in text
    assert "\n# head" not in text
    assert text.count("\n---\n") == 1
    (row,) = [line for line in text.splitlines() if line.startswith("| model |")]
    assert row == r"| model | x \| y --- &lt;script>alert(1)&lt;/script> # head |"


def test_repositories_of_other_things_are_refused(hub):
    SELECTION.push_to_hub("me/both")
    NEURONS.push_to_hub("me/both")
    with pytest.raises(FileFormatError, match="me/both holds NeuronSet, Selection; say which: kind="):
        vn.from_hub("me/both")
    assert vn.from_hub("me/both", kind="Selection") == SELECTION
    with pytest.raises(FileFormatError, match="me/both holds NeuronSet, Selection; nothing fits"):
        vn.ActivationStatistics.from_hub("me/both")
    (hub.folder / "me/other").mkdir()
    (hub.folder / "me/other/model.safetensors").write_bytes(b"x")
    with pytest.raises(FileFormatError, match="me/other holds none of the library's files"):
        vn.from_hub("me/other")
    (hub.folder / "me/both/Selection.safetensors").write_bytes(b"damaged")
    with pytest.raises(FileFormatError, match="not a readable Selection file"):
        vn.Selection.from_hub("me/both")


def test_what_cannot_be_shared_is_refused_before_the_hub_is_asked(hub, unchecked):
    with pytest.raises(VLMNeuronsError, match="a Tensor cannot be shared; choose from NeuronSet, Selection"):
        vn.push_to_hub(torch.zeros(1), "me/x")
    with pytest.raises(VLMNeuronsError, match="kind='Model' cannot be shared"):
        vn.from_hub("me/x", kind="Model")
    assert hub.calls == []


def test_the_file_that_is_shared_is_the_one_that_save_writes(hub, tmp_path):
    SELECTION.save(tmp_path / "saved")
    SELECTION.push_to_hub("me/same")
    shared = Path(hub.folder / "me/same/Selection.safetensors")
    with safe_open(shared, "pt") as ours, safe_open(tmp_path / "saved", "pt") as theirs:
        assert ours.metadata() == theirs.metadata()  # the checksum over all content among it
        assert list(ours.keys()) == list(theirs.keys())
