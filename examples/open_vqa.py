"""An open VQA study with graded answers: what is generated is scored, and the score is what effects are measured on.

    python examples/open_vqa.py

The demo's questions lose their options and keep the right one's text as the answer that is accepted. With ten people's
answers to a question, ``vn.vqa_accuracy`` scores as the VQA challenge does; any function ``(text, question) -> float``
will do.
"""

from dataclasses import replace

import pandas as pd
import torch

import vlmneurons as vn


def main(size: int = 8) -> pd.DataFrame:
    """Change of each culture's mean score (columns) without the neurons of each (rows), by CAS and by chance."""
    torch.set_num_threads(1)
    model, questions = vn.load_demo("organism")
    some = questions.filter(group={"Egypt", "Japan", "Mexico"}).balanced(2 * size, seed=0)
    items = [replace(item, options=(), answer=0, answers=[item.right]) for item in some]
    identify, evaluate = vn.QuestionSet(items, answer=vn.Generate(4, scorer=vn.anls)).split(0.5, seed=0)
    stats = vn.record(model, identify, condition="correct", progress=False)  # scores of at least 0.5
    culture = vn.CAS(count=12).select(stats)
    control = vn.LayerMatchedRandom(culture, seed=0).select(stats)
    result = vn.knockout(model, evaluate, {"CAS": culture, "random": control}, progress=False)
    print(result.summary()[["selector", "group", "clean", "self_effect", "cross_effect", "p"]].to_string(index=False))
    return pd.concat({name: result.matrix(name) for name in result.selectors})


if __name__ == "__main__":
    print(main().to_string(float_format="{:+.3f}".format))
