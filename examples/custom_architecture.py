"""A model whose MLPs the library cannot find by itself: what it says, what is registered, and the check afterwards.

    python examples/custom_architecture.py

A released model class is given an MLP that looks at its values while it computes, which nothing that follows the code
with symbols can do.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

import vlmneurons as vn
from vlmneurons.model.architectures.find import Architecture, register_architecture
from vlmneurons.model.architectures.layout import MLPLayout
from vlmneurons.testing import check_architecture, tiny_inputs, tiny_model


class CarefulMLP(nn.Module):
    """A gated MLP that computes twice where its input is large: a branch that depends on values."""

    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        self.w1, self.w3, self.w2 = like.gate_proj, like.up_proj, like.down_proj

    def forward(self, x: Tensor) -> Tensor:
        """``w2(silu(w1(x)) * w3(x))``."""
        gate = self.w1(x)
        if float(gate.abs().max()) > 1e4:  # what a symbol has no answer to
            gate = gate.clamp(-1e4, 1e4)
        return self.w2(silu(gate) * self.w3(x))


class CarefulVLM(LlavaNextForConditionalGeneration):
    """LLaVA-NeXT with such MLPs."""

    def __init__(self, config: LlavaNextConfig) -> None:
        super().__init__(config)
        for block in self.model.language_model.layers:
            block.mlp = CarefulMLP(block.mlp)


def main() -> None:
    """Wrap, read the error, register, check."""
    torch.set_num_threads(1)
    small, processor = tiny_model("llava_next_mistral")
    hf = CarefulVLM(small.config).eval()
    try:
        vn.VLM(hf, processor)
    except vn.errors.ArchitectureError as error:
        print(f"Without registration: {error}\n")
    else:
        print("Without registration: found all the same\n")

    register_architecture(
        "CarefulVLM",
        Architecture(
            towers={"language": "model.language_model.layers", "vision": "model.vision_tower.encoder.layers"},
            mlps={"language": {"mlp": MLPLayout(gate="w1", up="w3", down="w2", function=silu)}},
        ),
    )
    model = vn.VLM(hf, processor)
    print(model)
    print(check_architecture(hf, inputs=tiny_inputs("llava_next_mistral")))


if __name__ == "__main__":
    main()
