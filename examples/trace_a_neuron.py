"""One neuron in a trace: read it at every token, change it, and see what the model then says.

    python examples/trace_a_neuron.py

Everything is nnsight; the library adds the names. Needs no network and no GPU.
"""

import torch

import vlmneurons as vn


def main() -> None:
    """Read and write one planted neuron of the organism."""
    torch.set_num_threads(1)
    model, questions = vn.load_demo("organism")
    truth = vn.demo_truth()["Egypt"]
    site, number = truth.space.locate(int(truth.indices[0]))
    asked = questions.filter(group="Egypt")[:1]  # a set, which knows how it is asked
    question, inputs = asked[0], model.prepare(asked)
    print(f"{site}, neuron {number}\n{question.question} {question.options}, right: {question.right}")

    with torch.no_grad(), model.trace(**inputs):
        gate = model.site(site)[0, :, number].save()
        clean = model.lm_head.output[0, -1].log_softmax(-1).save()
    for token, value in zip(inputs["input_ids"][0], gate.tolist()):
        print(f"  {value:+.3f}  {model.tokenizer.decode(token)!r}")

    with torch.no_grad(), model.trace(**inputs):
        for layer, numbers in truth.by_layer().items():
            model.language.layers[layer].mlp.gate[..., numbers] = 0  # in this run only
        off = model.lm_head.output[0, -1].log_softmax(-1).save()
    answers = [model.tokenizer(f" {option}", add_special_tokens=False)["input_ids"][0] for option in question.options]
    for option, answer in zip(question.options, answers):
        print(f"log-probability of {option!r}: {clean[answer]:.2f}, and {off[answer]:.2f} without the neurons")


if __name__ == "__main__":
    main()
