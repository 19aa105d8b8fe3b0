"""Steering while generating: the neurons of one culture made stronger or weaker, at every step of every answer.

    python examples/steer_generation.py [--questions 6]

Scaling by ``1 + alpha`` is the steering of arXiv 2601.03115; ``alpha = -1`` switches the neurons off.
"""

import argparse

import torch

import vlmneurons as vn


def main() -> None:
    """Command line: see the head of this file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--questions", type=int, default=6, help="questions of each of two cultures")
    size = parser.parse_args().questions
    torch.set_num_threads(1)
    model, questions = vn.load_demo("organism")
    neurons = vn.demo_truth()["Egypt"]
    asked = {group: questions.filter(group=group).balanced(size, seed=0) for group in ("Egypt", "Japan")}

    for alpha in (-1.0, -0.5, 0.0, 0.5):
        shares = []
        with vn.Ablation(model, neurons, "scale", factor=1 + alpha):
            for group, part in asked.items():
                inputs = model.prepare(part)
                told = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
                texts = model.tokenizer.batch_decode(told, skip_special_tokens=True)
                right = sum(text.strip().startswith(item.right) for text, item in zip(texts, part))
                shares.append(f"{group} {right} of {len(part)}")
        print(f"alpha {alpha:+.1f}: answered right: {', '.join(shares)}; such as {texts[0].strip()!r}")


if __name__ == "__main__":
    main()
