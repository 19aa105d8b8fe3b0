"""The same study of sounds: which neurons of an audio-language model answer for which kind of sound?

    python examples/sounds.py [--out out/sounds]

Needs no network, no decoder of audio files and no GPU, and takes seconds. The model is a small Qwen2-Audio that answers
through five planted neurons for each of three pitches, so there is a right answer. The questions are WAV files with a
table, as yours may be; with ``vn.VLM.from_pretrained("Qwen/Qwen2-Audio-7B-Instruct")`` and a folder of your own, the
rest stays as it is.
"""

import argparse
import csv
import wave
from pathlib import Path

import torch

import vlmneurons as vn
from vlmneurons.testing import plant_neurons

PITCHES = ("Cello", "Violin", "Flute")


def save(questions: vn.QuestionSet, folder: Path) -> None:
    """A folder of sounds, and a table of what is asked about them."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "questions.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["id", "audio", "question", "A", "B", "C", "answer", "group"])
        for item in questions:
            (sound,) = item.load_audio(16_000)  # one channel of floats, at the rate that is asked for
            with wave.open(str(folder / f"{item.id}.wav"), "wb") as out:
                out.setparams((1, 2, 16_000, len(sound), "NONE", ""))
                out.writeframes((sound * 2**15).astype("<i2").tobytes())
            table.writerow([item.id, f"{item.id}.wav", item.question, *item.options, item.right, item.group])


def main() -> None:
    """Command line: see the head of this file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/sounds"), help="folder for the sounds and their table")
    folder = parser.parse_args().out
    torch.set_num_threads(1)

    planted = plant_neurons(medium="sound", groups=PITCHES, n_questions=16)
    model, truth = planted.model, planted.truth
    save(planted.questions, folder)

    # Answers are read as the likelihood of the options' texts, and no sound is on both sides.
    questions = vn.QuestionSet.from_folder(folder, answer="text")
    identify, evaluate = questions.split(0.5, seed=0)
    print(f"{model!r}\n{identify!r}\n{evaluate!r}")

    # "content" is the words and the sound; tokens="audio" would be the sound alone.
    how = {"batch_size": 16, "progress": False}
    for tokens in ("content", "audio", "text"):  # words and sound, the sound alone, the words that follow it
        stats = vn.record(model, identify, condition="correct", tokens=tokens, **how)
        cas = vn.CAS(count=5).select(stats)
        found = sum(len(cas[group] & truth[group]) for group in truth)
        print(f"tokens={tokens!r}: CAS found {found} of {sum(map(len, truth.values()))} planted neurons")

    random = [vn.LayerMatchedRandom(cas, seed=seed).select(stats) for seed in range(3)]
    result = vn.knockout(model, evaluate, {"CAS": cas, "random": random}, **how)
    summary = result.summary()
    shown = ["selector", "group", "n", "clean", "self_effect", "cross_effect"]
    print(summary[shown].to_string(index=False, float_format="{:+.2f}".format))


if __name__ == "__main__":
    main()
