"""nnterp counting in a process of its own, for `overhead.py`: it needs another nnsight than vlmneurons.

Prints its version, then for every line that it reads the CPU seconds of one count over all layers, in a trace.
"""

import importlib.metadata
import sys
import time

import nnsight
import torch
from nnterp import StandardizedTransformer
from transformers import AutoModelForImageTextToText


def main() -> None:
    """Answer lines until there are no more."""
    torch.set_num_threads(1)
    hf = AutoModelForImageTextToText.from_pretrained(sys.argv[1]).eval()
    inputs = torch.load(f"{sys.argv[1]}/inputs.pt", weights_only=False)
    model = StandardizedTransformer(hf)
    versions = (importlib.metadata.version(name) for name in ("nnterp", "nnsight"))
    print("nnterp {} on nnsight {}".format(*versions), flush=True)
    for _ in sys.stdin:
        start = time.process_time()
        with torch.inference_mode(), model.trace(**inputs):
            counts = nnsight.save([])
            for number in range(model.num_layers):
                counts.append((model.layers[number].mlp.act_fn.output > 0).sum((0, 1)))
        taken = time.process_time() - start
        assert len(counts) == model.num_layers
        print(taken, flush=True)


if __name__ == "__main__":
    main()
