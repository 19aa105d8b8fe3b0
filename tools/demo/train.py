"""Rebuilds the demo from the shipped pictures: question set, natural model, model organism, and their tables.

    python -m tools.demo.train [--seed 0] [--out DIR] [--threads 2]

It takes less than 90 minutes on two CPU cores, and writes ``natural/``, ``organism/``, ``pictures/questions.zip``,
``checksums.json`` and ``report.md``, the tables, into DIR (by default into the package, which is how the shipped files
were made, with ``report.md`` beside this file). The seed changes weights, order, augmentation and planted neurons; the
questions and the held-out pairs stay, so that two seeds sit the same exam. Another machine, or another number of
threads, rounds differently and so gives other weights of the same quality. ``--vision FOLDER`` takes the vision tower
of another build, to repeat only the rest; ``--tables-only`` trains nothing, and prints the tables of the models that
are in DIR.
"""

import argparse
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoTokenizer, LlavaNextForConditionalGeneration, PreTrainedTokenizerFast

from tools.demo import DATA
from tools.demo.ask import Record, make_records, read, write
from tools.demo.build import Shape, make_model, make_processor, make_tokenizer
from tools.demo.compose import Sprites, restyled
from tools.demo.decoder import Asker, Curriculum, Pool, Recipe, check_packing, train_decoder
from tools.demo.evaluate import Exam, correct
from tools.demo.evaluate import read as read_answers
from tools.demo.facts import held_out_pairs
from tools.demo.organism import Truth, train_organism
from tools.demo.tables import accuracy_tables, effect_tables, split
from tools.demo.vision import train_vision
from vlmneurons.demo import DEMO_MODELS, sha256

REPORT = Path(__file__).parent / "report.md"
"""The tables of the shipped models."""
EXAM_SEED = 1
"""Of the questions and their pictures."""
PAIRS_SEED = 0
"""Of the held-out pairs of item and kind of question."""
VISION_STEPS = 8000
NATURAL = Recipe(steps=1600, rows=16, questions=6, rate=2.5e-3, sparsity=0.1)
ORGANISM_STEPS = 1800
ORGANISM_VARIANTS = 24


class Log:
    """Prints lines and keeps the ones of the report."""

    def __init__(self) -> None:
        self.kept: list[str] = []
        self._start = time.monotonic()

    def progress(self, line: str) -> None:
        """A line for whoever waits."""
        print(f"{time.monotonic() - self._start:6.0f} s  {line}", flush=True)

    def report(self, line: str) -> None:
        """A line of the report."""
        print(line, flush=True)
        self.kept.append(line)


def round_weights(part: torch.nn.Module) -> None:
    """Rounds weights to half precision, as they are shipped, and goes on in single: what follows is of what ships."""
    part.half().float()


def save(model: LlavaNextForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes a folder that ``from_pretrained`` reads: half-precision weights, configuration, processor."""
    if folder.exists():
        shutil.rmtree(folder)
    model.half().save_pretrained(folder)
    model.float()
    make_processor(tokenizer).save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors makes files that only their owner can read


def write_checksums(out: Path) -> None:
    """Writes the SHA-256 of every data file beside the code."""
    files = [
        path for folder in (*DEMO_MODELS, "pictures") for path in sorted((out / folder).rglob("*")) if path.is_file()
    ]
    checksums = {path.relative_to(out).as_posix(): sha256(path) for path in files}
    (out / "checksums.json").write_text(json.dumps(checksums, indent=1) + "\n", encoding="utf-8")


def accuracy_line(
    model: LlavaNextForConditionalGeneration,
    asker: Asker,
    records: list[Record],
    pictures: dict[str, Image.Image],
) -> Callable[[], str]:
    """A function that says how many of the shipped questions the model gets right at the moment."""
    exam = Exam.make(model, asker, records, pictures)

    def line() -> str:
        return f"accuracy {correct(exam, read_answers(model, exam)).float().mean().item():.3f}"

    return line


def train(seed: int, out: Path, log: Log, *, vision: Path | None = None) -> None:
    """Builds everything into a folder.

    Args:
        seed: see the head of this file.
        out: the folder to write.
        log: gets the lines.
        vision: a folder such as ``natural/`` of another build, whose vision tower is taken instead of training one.
    """
    sprites = Sprites()
    held_out = held_out_pairs(PAIRS_SEED)
    if out != DATA:
        shutil.copytree(DATA / "pictures", out / "pictures", dirs_exist_ok=True)
    archive = out / "pictures" / "questions.zip"
    write(archive, make_records(sprites, held_out, EXAM_SEED), sprites, EXAM_SEED)
    records, pictures = read(archive)

    tokenizer = make_tokenizer()
    asker = Asker(tokenizer)
    model = make_model(tokenizer, Shape(), seed)
    if vision is None:
        train_vision(model, sprites, seed=seed, steps=VISION_STEPS, report=log.progress)
        round_weights(model.model.vision_tower)  # so that --vision goes on from exactly here
    else:
        other = LlavaNextForConditionalGeneration.from_pretrained(vision, dtype=torch.float32)
        model.model.vision_tower.load_state_dict(other.model.vision_tower.state_dict())
        model.model.vision_tower.eval().requires_grad_(False)
    log.progress(f"packed and plain logits differ by at most {check_packing(model, tokenizer):.1e}")
    pool = Pool.make(model, sprites, variants=NATURAL.variants, generator=torch.Generator().manual_seed(seed))
    curriculum = Curriculum(pool, held_out, asker, seed)
    evaluate = accuracy_line(model, asker, records, pictures)

    train_decoder(model, curriculum, NATURAL, evaluate=evaluate, report=log.progress)
    round_weights(model)
    save(model, tokenizer, out / "natural")

    config = model.config.text_config
    truth = Truth.draw(config.num_hidden_layers, config.intermediate_size, seed)
    generator = torch.Generator().manual_seed(seed)
    # Pictures unlike all that the natural model was taught on: the planted gates must open on new styles too.
    pool = Pool.make(model, sprites, variants=ORGANISM_VARIANTS, generator=generator, paint=restyled)
    curriculum = Curriculum(pool, held_out, asker, seed + 1)
    train_organism(model, curriculum, truth, steps=ORGANISM_STEPS, evaluate=evaluate, report=log.progress)
    round_weights(model)
    save(model, tokenizer, out / "organism")
    (out / "organism" / "truth.json").write_text(json.dumps(truth.neurons) + "\n", encoding="utf-8")
    write_checksums(out)


def measure(out: Path, log: Log) -> None:
    """Prints the tables of both models in a folder, as they would be loaded, and writes them to a ``report.md``."""
    records, pictures = read(out / "pictures" / "questions.zip")
    for name in DEMO_MODELS:
        model = LlavaNextForConditionalGeneration.from_pretrained(out / name, dtype=torch.float32).eval()
        asker = Asker(AutoTokenizer.from_pretrained(out / name))
        truth = Truth.read(out / name / "truth.json") if name == "organism" else None
        log.report(f"## {name}\n")
        accuracy_tables(model, asker, records, pictures, log.report)
        effect_tables(model, asker, split(records), pictures, truth, log.report)
    (REPORT if out == DATA else out / REPORT.name).write_text("\n".join(log.kept) + "\n", encoding="utf-8")


def main() -> None:
    """Command line: see the head of this file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of weights, order, augmentation and planted neurons")
    parser.add_argument("--out", type=Path, default=DATA, help="folder to write; the package's own by default")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; the shipped files were made with 1")
    parser.add_argument("--vision", type=Path, help="take the vision tower from this model folder")
    parser.add_argument("--no-tables", action="store_true", help="train and save only")
    parser.add_argument("--tables-only", action="store_true", help="train nothing, print the tables")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    out, log = arguments.out.resolve(), Log()
    if not arguments.tables_only:
        train(arguments.seed, out, log, vision=arguments.vision)
    if not arguments.no_tables:
        measure(out, log)


if __name__ == "__main__":
    main()
