"""The LAPE experiment on running text: whose neurons make whose texts harder to predict?

    python examples/language_perplexity.py

Neurons of each language are found on half of its texts, switched off, and the other half's perplexity is measured: the
matrix of Tang et al. 2024 (arXiv 2402.16438), rows the language whose neurons are off. A base model of your own:
``vn.VLM(AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name))``; no chat template is needed.
The demo's model stands in for it, which knows no language but English, and that badly.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import torch

import vlmneurons as vn


def main(folder: Path = Path(__file__).parent / "texts") -> pd.DataFrame:
    """Perplexity of each language's texts (columns) without the neurons of each (rows)."""
    torch.set_num_threads(1)
    model, _ = vn.load_demo()
    files = sorted(folder.glob("*.txt"))
    texts = vn.QuestionSet.from_texts({file.stem: file.read_text("utf-8").splitlines() for file in files})
    identify, evaluate = texts.split(0.5, seed=0)
    stats = vn.record(model, identify, condition="all", progress=False)
    selection = vn.LAPE(0.05).select(stats)
    result = vn.knockout(model, evaluate, {"LAPE": selection}, progress=False)
    clean = result.table().groupby("group")["clean_score"].first()
    perplexity = np.exp(-(clean + result.matrix("LAPE")))
    perplexity.loc["no mask"] = np.exp(-clean)
    return perplexity


if __name__ == "__main__":
    print(main().to_string(float_format="{:.1f}".format))
