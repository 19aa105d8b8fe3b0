"""Named sites in nnsight's traces of a model in vLLM: the values and edits are those of a trace of the model here."""

import gc
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import vlmneurons as vn
from vlmneurons.errors import MismatchError

pytestmark = [
    pytest.mark.skipif(find_spec("vllm.entrypoints") is None, reason="vLLM is not installed; see .ci/vllm"),
    pytest.mark.filterwarnings("default"),  # vLLM's own
]
if find_spec("vllm.entrypoints") is not None:
    import small

    from vlmneurons.run.vllm.sites import named_in_vllm

COLUMNS = torch.arange(0, 250, 3)  # on both ranks


@pytest.fixture(scope="module", params=[("llava_next_mistral", 1), ("qwen2_5_vl", 2)], ids=["one rank", "two ranks"])
def pair(request, tmp_path_factory):
    """A model here, nnsight's of it in vLLM, named; a question here and there; and the number of ranks."""
    name, ranks = request.param
    with pytest.MonkeyPatch.context() as patch:
        before = os.environ.get("PYTHONPATH", "")
        patch.setenv("PYTHONPATH", f"{Path(__file__).parent}{os.pathsep}{before}")  # vLLM imports the worker's class
        where = small.save_model(name, tmp_path_factory.mktemp("models"))
        here, questions = vn.VLM.from_pretrained(where, dtype=torch.float32), small.questions_for(name, 3)[2:]
        from nnsight_cpu import CPUVLLM  # which warns

        how = {**small.VLLM, "tensor_parallel_size": ranks, "limit_mm_per_prompt": {"video": 0}}
        held = CPUVLLM(str(where), dispatch=True, **how)
        named = named_in_vllm(vn.VLM.from_pretrained(where, weights=False), held)
        ids = here.encoder.token_ids(here.encoder.prompt_of(questions, questions[0]))
        prompt = {"prompt_token_ids": ids, "multi_modal_data": {"image": list(questions[0].load_images())}}
        yield here, held, named, dict(here.prepare(questions)), prompt, ranks
        del held, named
        gc.collect()


def close(there, here):
    torch.testing.assert_close(there, here, atol=2e-5, rtol=1e-4)


def test_copies_of_every_kind_are_in_the_order_of_the_model_here(pair):
    here, held, language, inputs, prompt, _ = pair
    ours, theirs = {}, {}
    for layer in (0, 3):
        with torch.no_grad(), here.trace(**inputs):
            pre = here.language.layers[layer].mlp.pre.clone().save()
            gate = here.language.layers[layer].mlp.gate.clone().save()
            up = here.language.layers[layer].mlp.up.clone().save()
            post = here.language.layers[layer].mlp.post.clone().save()
        ours[layer] = pre, gate, up, post
        with held.trace(prompt, temperature=0.0, max_tokens=1):
            pre = language.layers[layer].mlp.read("pre").save()
            gate = language.layers[layer].mlp.read("gate").save()
            up = language.layers[layer].mlp.read("up").save()
            post = language.layers[layer].mlp.read("post").save()
        theirs[layer] = pre, gate, up, post
    for layer, values in ours.items():
        for there, value in zip(theirs[layer], values, strict=True):
            close(there, value[0])
    assert float((ours[0][0] - ours[3][0]).abs().max()) > 0.1


def test_what_is_assigned_reaches_the_answer_as_it_does_here(pair):
    here, held, language, inputs, prompt, _ = pair
    with torch.no_grad(), here.trace(**inputs):
        clean = here.output.logits[:, -1].log_softmax(-1).save()
    found = []
    for kind in ("pre", "up", "post"):
        with torch.no_grad(), here.trace(**inputs):
            value = here.site(f"language.layers.1.mlp.{kind}").clone()
            value[..., COLUMNS] = 0.7
            here.set_site(f"language.layers.1.mlp.{kind}", value)
            ours = here.output.logits[:, -1].log_softmax(-1).save()
        with held.trace(prompt, temperature=0.0, max_tokens=1):
            value = language.layers[1].mlp.read(kind)
            value[..., COLUMNS] = 0.7
            setattr(language.layers[1].mlp, kind, value)
            theirs = held.logits.log_softmax(-1).clone().save()
        close(theirs, ours)
        found.append(ours)
        assert float((ours - clean).abs().max()) > 0.1
    assert float((found[0] - found[1]).abs().max()) > 0.1


def test_what_is_edited_in_place_reaches_the_answer_or_raises(pair):
    here, held, language, inputs, prompt, ranks = pair
    for kind in ("post", "pre", "up"):
        with torch.no_grad(), here.trace(**inputs):
            value = here.site(f"language.layers.2.mlp.{kind}").clone()
            value[..., COLUMNS] = -0.4
            here.set_site(f"language.layers.2.mlp.{kind}", value)
            ours = here.output.logits[:, -1].log_softmax(-1).save()
        if kind != "post" and ranks > 1:
            with (
                pytest.raises(
                    RuntimeError, match=rf"'{kind}' lies in pieces on 2 ranks, .*read\('{kind}'\) gives a copy"
                ),
                held.trace(prompt, temperature=0.0, max_tokens=1),
            ):
                getattr(language.layers[2].mlp, kind)[..., COLUMNS] = -0.4
            continue
        with held.trace(prompt, temperature=0.0, max_tokens=1):
            getattr(language.layers[2].mlp, kind)[..., COLUMNS] = -0.4
            theirs = held.logits.log_softmax(-1).clone().save()
        close(theirs, ours)


def test_what_cannot_be_had_raises(pair):
    here, held, language, _, prompt, _ = pair
    with (
        pytest.raises(RuntimeError, match=r"vLLM has 'gate' nowhere by itself: read\('gate'\) computes it"),
        held.trace(prompt, temperature=0.0, max_tokens=1),
    ):
        language.layers[1].mlp.gate.save()
    with (
        pytest.raises(RuntimeError, match="vLLM has 'gate' nowhere by itself, so that it cannot be set"),
        held.trace(prompt, temperature=0.0, max_tokens=1),
    ):
        language.layers[1].mlp.gate = 0.0
    with (
        pytest.raises(RuntimeError, match="site kind 'down' does not exist; the kinds are pre, gate, up, post"),
        held.trace(prompt, temperature=0.0, max_tokens=1),
    ):
        language.layers[1].mlp.read("down").save()
    with pytest.raises(MismatchError, match=r"held is nnsight's VLLM, started: VLLM\(name, dispatch=True\)"):
        named_in_vllm(here, here.nnsight)
    other, processor = vn.testing.tiny_model("qwen2_5_vl")
    with pytest.raises(MismatchError, match=r"layer 0 has mlp of \d+ neurons here, and 256 in vLLM: another model"):
        named_in_vllm(vn.VLM(other, processor), held)
    experts = vn.VLM(*vn.testing.tiny_model("qwen3_vl_moe"))
    with pytest.raises(
        MismatchError, match=r"layer 0 has mlp\.experts\.0 here, and in vLLM .*: no site of it can be named there"
    ):
        named_in_vllm(experts, held)


def test_several_prompts_are_requests_of_their_own(pair):
    here, held, language, inputs, prompt, _ = pair
    with torch.no_grad(), here.trace(**inputs):
        wanted = here.language.layers[2].mlp.post.clone().save()
    with held.trace(temperature=0.0, max_tokens=1) as tracer:
        with tracer.invoke(prompt):
            language.layers[1].mlp.post[:] = 0
            edited = language.layers[2].mlp.read("post").save()
        with tracer.invoke(prompt):
            plain = language.layers[2].mlp.read("post").save()
    close(plain, wanted[0])
    assert float((edited - plain).abs().max()) > 0.1
