"""Language against culture: the same items in two wordings, so that one can vary while the other stays.

    python examples/language_against_culture.py [--questions 10]

CVQA asks every question in English and in the local language. Neurons that are found with English wording, and with the
local one, and that agree, follow the culture (or its pictures); neurons that are found with one wording only follow the
words. Here a stand-in makes the second wording: each culture's questions begin with words of its own.
"""

import argparse
from dataclasses import replace

import torch

import vlmneurons as vn

WORDS = {  # a stand-in for a translation: the demo's model was trained in English only
    "Brazil": "Por favor:", "China": "请问", "Egypt": "من فضلك", "France": "S'il vous plaît :", "India": "कृपया",
    "Japan": "すみません", "Mexico": "Por favor, amigo:", "Russia": "Пожалуйста:",
}  # fmt: skip


def main() -> None:
    """Command line: see the head of this file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--questions", type=int, default=10, help="questions of each culture")
    size = parser.parse_args().questions
    torch.set_num_threads(1)
    model, questions = vn.load_demo()
    english = questions.split(0.5, seed=0)[0].balanced(size, seed=0)
    # The same ids, pictures, options and answers: only the wording differs.
    local = vn.QuestionSet(
        [replace(item, question=f"{WORDS.get(item.group, item.group)} {item.question}") for item in english],
        prompt="open",
        answer="text",
    )
    assert [item.id for item in english] == [item.id for item in local]

    how = {"condition": "all", "batch_size": 64, "progress": False}
    selections = {}
    for name, asked, tokens in [
        ("English", english, "content"),
        ("local", local, "content"),
        ("local, picture only", local, "image"),
        ("local, words only", local, "text"),
    ]:
        selections[name] = vn.CAS(0.02).select(vn.record(model, asked, tokens=tokens, **how))
    print("overlap (Jaccard) with the neurons found in English, mean over cultures; chance in brackets")
    for name, selection in selections.items():
        pairs = [(selections["English"][group], neurons) for group, neurons in selection.items()]
        overlap = sum(one.jaccard(other) for one, other in pairs) / len(pairs)
        chance = sum(one.expected_jaccard(other) for one, other in pairs) / len(pairs)
        print(f"  {name:<20} {overlap:.3f} ({chance:.3f})")


if __name__ == "__main__":
    main()
