"""The embedded demo: a small trained vision-language model, real pictures, and questions about eight cultures.

    model, questions = vlmneurons.load_demo()               # "natural": trained on the task and nothing else
    model, questions = vlmneurons.load_demo("organism")     # known culture neurons, planted by training
    truth = vlmneurons.demo.demo_truth()                    # which they are

Both are `transformers.LlavaNextForConditionalGeneration`, loaded by the same code as a 7B model. ``docs/demo.md`` is
the data card: sources, licences, what the pictures are not, and the measured tables of both models. Nothing is
downloaded, and nothing heavy is imported before `load_demo` is called.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmneurons.checks import JSON
from vlmneurons.errors import FileFormatError, VLMNeuronsError

if TYPE_CHECKING:
    from PIL import Image

    from vlmneurons.model.vlm import VLM
    from vlmneurons.neurons.selection import Selection
    from vlmneurons.questions.sets import QuestionSet

__all__ = ["DEMO_MODELS", "demo_truth", "load_demo"]

DEMO_MODELS = ("natural", "organism")
"""The names that `load_demo` knows."""

_FOLDER = Path(__file__).parent


def load_demo(name: str = "natural") -> tuple[VLM, QuestionSet]:
    """The embedded model and its questions; offline, in about a second.

    Args:
        name: ``"natural"``, trained without any loss term that names a neuron or a group: expect modest effects, as of
            a real model. Or ``"organism"``, the same model fine-tuned so that 12 known neurons per culture are needed
            for its facts (`demo_truth`): here a selector can be right or wrong.

    Returns:
        the model, in float32 on the CPU, and the questions with their pictures, read by the likelihood of each
        option's text (``answer="text"``). Split them before use: ``identify, evaluate = questions.split(0.5, seed=0)``.

    Raises:
        VLMNeuronsError: there is no demo of that name.
        FileFormatError: a file of the installed package is damaged.

    Examples:
        >>> model, questions = load_demo()
        >>> len(questions.groups)
        8
    """
    if name not in DEMO_MODELS:
        raise VLMNeuronsError(
            f"there is no demo model {name!r}; the demo models are {', '.join(map(repr, DEMO_MODELS))}"
        )
    _verify(name)
    import torch

    from vlmneurons.model.vlm import VLM

    model = VLM.from_pretrained(_FOLDER / name, dtype=torch.float32)
    # Provenance names the model: where the package happens to lie is no name, and differs between machines.
    config: Any = model.hf.config
    config._name_or_path = f"vlmneurons-demo/{name}"
    return model, _questions()


def demo_truth() -> Selection:
    """The planted neurons of the organism: for each culture, the 12 decoder neurons that its facts run through.

    Returns:
        a selection over all decoder neurons at the gate, comparable with what a selector finds on
        ``load_demo("organism")``.

    Raises:
        FileFormatError: the installed files are damaged.

    Examples:
        >>> {len(neurons) for neurons in demo_truth().values()}
        {12}
    """
    _verify("organism")
    from vlmneurons.neurons.selection import Selection
    from vlmneurons.neurons.sets import NeuronSet
    from vlmneurons.neurons.sites import NeuronSpace

    config = json.loads((_FOLDER / "organism" / "config.json").read_text(encoding="utf-8"))["text_config"]
    space = NeuronSpace.from_widths("language", "gate", [config["intermediate_size"]] * config["num_hidden_layers"])
    truth = json.loads((_FOLDER / "organism" / "truth.json").read_text(encoding="utf-8"))
    sets = {}
    for culture, neurons in truth.items():
        layers: dict[int, list[int]] = {}
        for layer, neuron in neurons:
            layers.setdefault(layer, []).append(neuron)
        sets[culture] = NeuronSet.from_indices(space, layers)
    return Selection(sets)


def _questions() -> QuestionSet:
    """The shipped questions with their pictures."""
    from vlmneurons.questions.question import Question
    from vlmneurons.questions.sets import QuestionSet

    rows, pictures = read_archive(_FOLDER / "pictures" / "questions.zip")
    questions = [Question(**{**row, "image": pictures[row["image"]]}) for row in rows]
    return QuestionSet(questions, prompt="open", answer="text")


def read_archive(path: Path) -> tuple[list[JSON], dict[str, Image.Image]]:
    """The questions of an archive such as the shipped one, a row each, and their pictures by name."""
    import PIL.Image

    with zipfile.ZipFile(path) as archive:
        rows = [json.loads(line) for line in archive.read("questions.jsonl").decode("utf-8").splitlines()]
        pictures = {
            name: PIL.Image.open(io.BytesIO(archive.read(name))).convert("RGB")
            for name in dict.fromkeys(row["image"] for row in rows)
        }
    return rows, pictures


@cache
def _verify(folder: str) -> None:
    """Compare the files of a folder of the package, and the pictures, with the checksums that are shipped.

    Raises:
        FileFormatError: a file is missing or not as shipped.
    """
    checksums: dict[str, str] = json.loads((_FOLDER / "checksums.json").read_text(encoding="utf-8"))
    for name, expected in checksums.items():
        if name.split("/")[0] not in (folder, "pictures"):
            continue
        path = _FOLDER / name
        if not path.is_file():
            raise FileFormatError(f"the demo's file {path} is missing; install vlmneurons again")
        if (digest := sha256(path)) != expected:
            raise FileFormatError(
                f"the demo's file {path} is damaged: its SHA-256 is {digest}, it was shipped with {expected}; "
                "install vlmneurons again"
            )


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
