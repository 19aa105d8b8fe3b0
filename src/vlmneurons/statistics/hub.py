"""Neurons and counts on the Hugging Face Hub: one file and a card that says where they come from.

A repository holds one object: ``<kind>.safetensors``, the very file that `save` writes, and ``README.md``, written from
the object and its provenance. What is fetched is checked like any other file; nothing in it is run.
`huggingface_hub` is imported when it is needed.
"""

import json
import tempfile
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from string import Template

from vlmneurons._version import __version__
from vlmneurons.checks import check_kind
from vlmneurons.errors import FileFormatError, VLMNeuronsError
from vlmneurons.neurons.selection import Selection
from vlmneurons.neurons.sets import NeuronSet
from vlmneurons.statistics.counts import ActivationStatistics

Shared = NeuronSet | Selection | ActivationStatistics

_REPOSITORY = "a repository's name, such as 'someone/culture-neurons'"

KINDS: Mapping[str, type] = {kind.__name__: kind for kind in (NeuronSet, Selection, ActivationStatistics)}
"""What can be shared, by the name of its class."""


def push_to_hub(
    thing: Shared,
    repo_id: str,
    *,
    private: bool = True,
    license: str | None = None,
    notes: str = "",
    message: str | None = None,
    token: str | None = None,
) -> str:
    """Put a `NeuronSet`, `Selection` or `ActivationStatistics` into a repository of the Hub, with a card.

    The repository is made if it does not exist. A private one stays private, and a new one is private unless said
    otherwise. An object of the same kind that is there is replaced (the Hub keeps the old revision).

    Args:
        thing: what to share.
        repo_id: ``"name/repository"``.
        private: whether a new repository is private.
        license: the licence of the counts or neurons, such as ``"cc-by-4.0"``; none is claimed if it is left out.
        notes: text for the card: data, questions, caveats.
        message: message of the commit.
        token: a token of the Hub; by default the one of ``hf auth login``.

    Returns:
        The address of the commit.

    Raises:
        VLMNeuronsError: another kind of object.
        huggingface_hub.errors.HfHubHTTPError: the Hub refuses.

    Examples:
        >>> push_to_hub(selection, "someone/culture-neurons", license="cc-by-4.0")  # doctest: +SKIP
    """
    kind = _kind_of(thing)
    check_kind("repo_id", repo_id, str, VLMNeuronsError, _REPOSITORY)
    import huggingface_hub

    api = huggingface_hub.HfApi(token=token, library_name="vlmneurons", library_version=__version__)
    api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        thing.save(Path(folder) / f"{kind}.safetensors")
        (Path(folder) / "README.md").write_text(card(thing, repo_id, license=license, notes=notes), encoding="utf-8")
        commit = api.upload_folder(
            repo_id=repo_id,
            repo_type="dataset",
            folder_path=folder,
            commit_message=message or f"{kind} by vlmneurons {__version__}",
        )
    return str(getattr(commit, "commit_url", commit))


def from_hub(repo_id: str, *, revision: str | None = None, kind: str | None = None, token: str | None = None) -> Shared:
    """What `push_to_hub` put into a repository.

    Args:
        repo_id: ``"name/repository"``.
        revision: branch, tag or commit. Give a commit in a paper: a branch moves.
        kind: ``"NeuronSet"``, ``"Selection"`` or ``"ActivationStatistics"``, if the repository holds several.
        token: a token of the Hub, for private repositories.

    Raises:
        FileFormatError: the repository holds none, or several and none was named; or the file is damaged.
        huggingface_hub.errors.HfHubHTTPError: the Hub refuses, or there is no such repository.
        VLMNeuronsError: no such kind.

    Examples:
        >>> selection = from_hub("someone/culture-neurons", revision="4c1f…")  # doctest: +SKIP
    """
    check_kind("repo_id", repo_id, str, VLMNeuronsError, _REPOSITORY)
    if kind is not None and kind not in KINDS:
        raise VLMNeuronsError(f"kind={kind!r} cannot be shared; choose from {', '.join(KINDS)}")
    import huggingface_hub

    api = huggingface_hub.HfApi(token=token, library_name="vlmneurons", library_version=__version__)
    files = api.list_repo_files(repo_id, repo_type="dataset", revision=revision)
    there = [name for name in KINDS if f"{name}.safetensors" in files]
    wanted = [name for name in there if kind in (None, name)]
    if len(wanted) != 1:
        has = ", ".join(there) or "none of the library's files"
        raise FileFormatError(f"{repo_id} holds {has}; {'say which: kind=…' if wanted else 'nothing fits'}")
    path = api.hf_hub_download(repo_id, f"{wanted[0]}.safetensors", repo_type="dataset", revision=revision)
    return KINDS[wanted[0]].load(path)


def card(thing: Shared, repo_id: str, *, license: str | None = None, notes: str = "") -> str:
    """The card of a repository, as Markdown: what is in it, where it comes from, how to load it.

    Args:
        thing: what is shared.
        repo_id: where.
        license: its licence, if any is claimed.
        notes: further text.

    Raises:
        VLMNeuronsError: another kind of object.
    """
    kind = _kind_of(thing)
    provenance = getattr(thing, "provenance", {})
    head = ["library_name: vlmneurons", "tags: [vlmneurons, interpretability, neurons]"]
    if license:
        head.insert(0, f"license: {json.dumps(license)}")
    rows = [f"| {_text(key)} | {_text(value)} |" for key, value in provenance.items()]
    return Template(
        resources.files("vlmneurons.statistics").joinpath("card.md").read_text(encoding="utf-8")
    ).substitute(
        head="\n".join(head),
        title=repo_id.rsplit("/", 1)[-1],
        kind=kind,
        shown="\n".join(f"    {line}" for line in repr(thing).splitlines()),
        notes=f"\n{notes}\n" if notes else "",
        provenance="\n".join(["| | |", "|---|---|", *rows]) if rows else "Nothing is known: it carries no provenance.",
        fingerprint=thing.space.fingerprint,
        space=_text(repr(thing.space)),
        repo=json.dumps(repo_id),
    )


def _kind_of(thing: object) -> str:
    kind = next((name for name, own in KINDS.items() if isinstance(thing, own)), None)
    if kind is None:
        raise VLMNeuronsError(f"a {type(thing).__name__} cannot be shared; choose from {', '.join(KINDS)}")
    return kind


def _text(value: object) -> str:
    """A value for a cell of a table: one line, nothing that Markdown or HTML would take for markup."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    for bad, good in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("\n", " "), ("\r", " ")):
        text = text.replace(bad, good)
    return text
