"""A process that asks in a folder until it is killed: ``python ask_in_folders.py items|knockout MODEL FOLDER``."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

import small

import vlmneurons as vn

if __name__ == "__main__":
    torch.set_num_threads(1)
    what, model_folder, folder = sys.argv[1:]
    model = vn.VLM.from_pretrained(model_folder, engine="vllm", **small.VLLM)
    questions = small.questions_for(Path(model_folder).name, 60)
    how = {"batch_size": 2, "progress": False}
    if what == "items":
        vn.record_items(model, questions, folder, **how)
    else:
        space, generator = model.space(), torch.Generator().manual_seed(0)
        size = len(space) // 50
        sets = [vn.NeuronSet(space, torch.randperm(len(space), generator=generator)[:size]) for _ in range(3)]
        vn.knockout(model, questions, {f"m{n}": one for n, one in enumerate(sets)}, folder=folder, **how)
