"""vLLM as an engine, in an environment that has it: `.ci/vllm` makes one and runs this file; elsewhere it is skipped.

Everything is compared with the library's own hooks in plain transformers, in float32: counts of every question, answers
under masks, generated texts, exported folders. What vLLM would do silently wrong is provoked.
"""

import gc
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

import vlmneurons as vn
from vlmneurons import testing
from vlmneurons.errors import AblationError, MismatchError, QuestionError
from vlmneurons.run.readers import Generate

HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.skipif(find_spec("vllm.entrypoints") is None, reason="vLLM is not installed; see .ci/vllm"),
    pytest.mark.filterwarnings("default"),  # vLLM's own
]
if find_spec("vllm.entrypoints") is not None:
    import small

HOW = {"batch_size": 32, "progress": False}


@pytest.fixture(scope="module", autouse=True)
def _in_this_process():
    """vLLM's engine and its one worker run here, where they start sooner; two ranks are processes of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A function from a small model's name to its folder."""
    made, root = {}, tmp_path_factory.mktemp("models")

    def of(name):
        if name not in made:
            made[name] = small.save_model(name, root)
        return made[name]

    return of


@pytest.fixture(scope="module", params=["demo", "llava_next_mistral", "qwen2_5_vl"])
def pair(request, folder):
    """A model's name, the model by hooks, and the same model held by vLLM."""
    here, there = both(folder(request.param))
    yield request.param, here, there
    del there
    gc.collect()  # its processes end


def both(where, **more):
    """A model here, and held by vLLM."""
    return vn.VLM.from_pretrained(where, dtype=torch.float32), vn.VLM.from_pretrained(
        where, engine="vllm", **{**small.VLLM, **more}
    )


def server(model):
    from vlmneurons.run.vllm.server import server_of

    return server_of(model)


def sets_of(model, number):
    """So many random sets of neurons, by name."""
    space, generator = model.space(), torch.Generator().manual_seed(0)
    size = len(space) // 50
    return {f"m{n}": vn.NeuronSet(space, torch.randperm(len(space), generator=generator)[:size]) for n in range(number)}


def assert_same_answers(there, here, atol=1e-4):
    assert there.ids == here.ids
    assert there.chosen.shape == here.chosen.shape
    assert int((there.chosen != here.chosen).sum()) == 0
    np.testing.assert_allclose(there.margins, here.margins, atol=atol)


def assert_same_counts(there, here, n_cells):
    """Equal but for at most 1 in 20,000 counts, which rounding at zero tips by one token."""
    off = np.abs(np.asarray(there, dtype=np.int64) - np.asarray(here, dtype=np.int64))
    print(f"{int((off > 0).sum())} of {n_cells} counts differ, by at most {int(off.max())}")
    assert off.max() <= 1
    assert (off > 0).sum() <= max(1, n_cells / 20_000)


# -- the same numbers --------------------------------------------------------------------------------------------------


def test_counts_of_200_questions_are_those_of_the_hooks(pair, tmp_path):
    name, here, there = pair
    questions = small.questions_for(name, 200)
    how = {"magnitudes": True, "maxima": True, **HOW}
    ours = vn.record_items(here, questions, tmp_path / "here", **how)
    theirs = vn.record_items(there, questions, tmp_path / "there", **how)
    assert theirs.complete
    table = ours._files.table("positive")
    assert table.shape[0] == 200
    assert int(table.sum()) > 0
    assert_same_counts(theirs._files.table("positive"), table, table.size)
    assert np.array_equal(theirs._files.records["chosen"], ours._files.records["chosen"])
    assert np.array_equal(theirs._files.records["tokens"], ours._files.records["tokens"])
    for kept in ("total", "maximum"):
        np.testing.assert_allclose(theirs._files.table(kept), ours._files.table(kept), rtol=1e-3, atol=1e-3)


def test_25_masks_give_200_questions_the_same_answers(pair):
    name, here, there = pair
    questions, masks = small.questions_for(name, 200), sets_of(here, 25)
    ours = vn.knockout(here, questions, masks, **HOW)
    theirs = vn.knockout(there, questions, masks, **HOW)
    assert_same_answers(theirs, ours)
    worst = np.nanmax(np.abs(theirs.margins - ours.margins))
    print(f"{name}: 0 of {ours.chosen.size} choices differ, margins by at most {worst:.1e} nats")
    assert np.nanmax(np.abs(ours.margins[1:] - ours.margins[0])) > 0.01
    assert theirs.provenance["engine"].startswith("vllm ")


def test_options_of_several_tokens_are_read_alike(pair):
    name, here, there = pair
    questions, masks = small.questions_for(name, 24), sets_of(here, 3)
    ours = vn.knockout(here, questions, masks, answer="text", **HOW)
    assert_same_answers(vn.knockout(there, questions, masks, answer="text", **HOW), ours)
    counts = questions.counts()
    questions = questions.filter(group=set(sorted(counts, key=lambda group: counts[group])[-3:]))
    own = {"own": small.some_masks(here, questions.groups, 3)}
    how = {"answer": "text", "others": 1, **HOW, "batch_size": 5}  # most masks meet some of a batch
    ours = vn.knockout(here, questions, own, **how)
    assert (ours.chosen == -2).any()  # a question does not meet every mask
    assert_same_answers(vn.knockout(there, questions, own, **how), ours)
    counted = {"condition": "correct", "answer": "text", **HOW}
    ours, theirs = (vn.record(model, questions, **counted) for model in (here, there))
    assert torch.equal(ours.items, theirs.items)
    assert_same_counts(theirs.positive, ours.positive, len(questions) * len(here.space()))


def test_generated_texts_are_the_same_under_every_mask(pair):
    name, here, there = pair
    questions, space = small.questions_for(name, 24), here.space()
    masks = {**sets_of(here, 2), "all": vn.NeuronSet(space, range(len(space)))}  # which changes any text
    ours = vn.knockout(here, questions, masks, answer=Generate(6), **HOW)
    theirs = vn.knockout(there, questions, masks, answer=Generate(6), **HOW)
    assert (theirs.texts == ours.texts).all()
    assert np.array_equal(theirs.chosen, ours.chosen)
    assert (ours.texts[1:] != ours.texts[0]).any()
    counted = {"condition": "all", "answer": Generate(6), **HOW}
    ours, theirs = (vn.record(model, questions, **counted) for model in (here, there))
    assert torch.equal(ours.tokens, theirs.tokens)
    assert_same_counts(theirs.positive, ours.positive, 24 * len(here.space()))


@pytest.mark.parametrize("kind", ["pre", "up", "post"])
@pytest.mark.parametrize("tokens", ["content", "last"])
def test_every_kind_of_site_is_counted(pair, kind, tokens):
    name, here, there = pair
    questions, space = small.questions_for(name, 8), here.space("language", kind)
    how = {"condition": "all", "tokens": tokens, "magnitudes": True, **HOW}
    ours, theirs = (vn.record(model, questions, space, **how) for model in (here, there))
    assert_same_counts(theirs.positive, ours.positive, 8 * len(space))
    torch.testing.assert_close(theirs.total, ours.total, rtol=1e-3, atol=1e-3)


def test_every_intervention_at_post_acts_as_it_does_here(pair):
    name, here, there = pair
    some = sets_of(here, 1)["m0"]
    masks = {
        "zero": some,
        "more": vn.Intervention(some, "scale", factor=1.3),
        "plus": vn.Intervention(some, "add", factor=2.0, values=0.3, at="post"),
        "set": vn.Intervention(some, "replace", values=0.5, at="post"),
        "gate": vn.Intervention(some, "zero", at="gate"),
        "none": vn.NeuronSet.empty(here.space()),
    }
    questions = small.questions_for(name, 16)
    ours = vn.knockout(here, questions, masks, **HOW)
    assert_same_answers(vn.knockout(there, questions, masks, **HOW), ours)


def test_questions_without_pictures_are_asked_too(pair):
    _, here, there = pair
    blind = [vn.Question(None, f"word {n}?", ("tea", "rice"), 0, "AB"[n % 2], id=f"b{n}") for n in range(6)]
    questions = vn.QuestionSet(blind)
    ours = vn.knockout(here, questions, sets_of(here, 2), **HOW)
    assert_same_answers(vn.knockout(there, questions, sets_of(here, 2), **HOW), ours)


def test_any_number_and_kind_of_pictures_shares_a_batch(pair, tmp_path):
    name, here, there = pair
    one = testing.tiny_image(1, 40, 72)
    exif = one.getexif()
    exif[0x0112] = 6  # to be turned
    one.save(tmp_path / "turned.jpg", exif=exif)
    shown = [None, one, [one, one], one, one.convert("RGBA"), one.convert("L"), one.convert("P")]  # one thrice alike
    shown += [str(tmp_path / "turned.jpg"), testing.tiny_image(2, 20, 300), [one, testing.tiny_image(3), one]]
    asked = [
        vn.Question(pictures, "word name?", ("tea", "rice"), 0, "AB"[n % 2], id=f"p{n}")
        for n, pictures in enumerate(shown)
        if name != "demo" or not isinstance(pictures, list)  # which was made for one picture
    ]
    questions, how = vn.QuestionSet(asked), {"batch_size": 4, "progress": False}
    masks = sets_of(here, 2)
    assert_same_answers(vn.knockout(there, questions, masks, **how), vn.knockout(here, questions, masks, **how))
    for tokens in ("content", "image", "text"):
        ours, theirs = (vn.record(model, questions, condition="all", tokens=tokens, **how) for model in (here, there))
        assert torch.equal(ours.tokens, theirs.tokens)
        assert_same_counts(theirs.positive, ours.positive, len(questions) * len(here.space()))


def test_masks_of_nothing_of_a_layer_of_everything_and_alike_are_those_of_the_hooks(pair):
    name, here, there = pair
    questions, space = small.questions_for(name, 12), here.space()
    layer = vn.NeuronSet.from_indices(space, {1: range(space.widths[1])})
    masks = {"none": vn.NeuronSet.empty(space), "layer": layer, "all": vn.NeuronSet(space, range(len(space)))}
    masks |= {"one": vn.NeuronSet(space, [0]), "again": layer}
    ours, theirs = (vn.knockout(model, questions, masks, **HOW) for model in (here, there))
    assert_same_answers(theirs, ours)
    assert np.array_equal(theirs.margins[1], theirs.margins[0])  # bit for bit
    assert np.array_equal(theirs.margins[2], theirs.margins[5])
    part = vn.NeuronSpace(space.sites[1:3], space.widths[1:3])  # of some layers alone
    ours, theirs = (vn.record(model, questions, part, condition="all", **HOW) for model in (here, there))
    assert_same_counts(theirs.positive, ours.positive, 12 * len(part))


def test_several_selectors_with_two_others_each_meet_the_same_questions(pair):
    name, here, there = pair
    asked = list(small.questions_for(name, 60))
    asked = [
        vn.Question(one.image, one.question, one.options, one.answer, "ABCD"[n % 4], id=one.id)
        for n, one in enumerate(asked)
    ]
    questions = vn.QuestionSet(asked)
    masks = {kind: small.some_masks(here, "ABCD", 4, share) for kind, share in (("few", 0.01), ("many", 0.1))}
    how = {"others": 2, "batch_size": 7, "progress": False}
    ours, theirs = (vn.knockout(model, questions, masks, **how) for model in (here, there))
    assert (ours.chosen == -2).any()
    assert_same_answers(theirs, ours)


def test_a_whole_study_is_the_same(pair, tmp_path):
    name, here, there = pair
    settings = {
        "fraction": 0.02,
        "repeats": 1,
        "permutations": 0,
        "minimum": 1,
        "batch_size": 16,
        "selectors": ("CAS",),
    }
    protocol = vn.Protocol(**settings, sizes=(), alphas=(0.5,), fractions=(0.05,), conditions=("all",))
    questions = small.questions_for(name, 90)
    counts = questions.counts()
    questions = questions.filter(group={group for group, n in counts.items() if n >= 12})
    done = [
        vn.run_study(model, questions, tmp_path / what, protocol, progress=False).knockout
        for what, model in (("here", here), ("there", there))
    ]
    assert_same_answers(done[1], done[0])
    assert done[1].selectors == done[0].selectors


def test_two_models_in_one_process_keep_apart(folder):
    names = ("qwen2_5_vl", "llava_next_mistral")
    models = {name: both(folder(name)) for name in names}
    wanted = {}
    for name in (*names, *names):  # in turns
        here, there = models[name]
        questions, masks = small.questions_for(name, 8), sets_of(here, 2)
        wanted.setdefault(name, vn.knockout(here, questions, masks, **HOW))
        assert_same_answers(vn.knockout(there, questions, masks, **HOW), wanted[name])
    del models, there
    gc.collect()


def test_two_ranks_and_prompts_in_pieces_change_nothing(folder, monkeypatch):
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING")
    here, there = both(folder("qwen2_5_vl"), tensor_parallel_size=2, max_num_batched_tokens=64, max_num_seqs=16)
    questions, masks = small.questions_for("qwen2_5_vl", 48), sets_of(here, 4)
    how = {"condition": "all", **HOW}
    ours, theirs = (vn.record(model, questions, **how) for model in (here, there))
    assert theirs.provenance["tensor_parallel_size"] == 2
    assert torch.equal(ours.tokens, theirs.tokens)
    # A merged projection read as a whole would be gate 0, up 0, gate 1, up 1: half of all counts would differ.
    assert_same_counts(theirs.positive, ours.positive, 48 * len(here.space()))
    assert_same_answers(vn.knockout(there, questions, masks, **HOW), vn.knockout(here, questions, masks, **HOW))
    texts = {"answer": Generate(4), **HOW}
    ours, theirs = (vn.knockout(model, questions[:8], masks, **texts) for model in (here, there))
    assert (theirs.texts == ours.texts).all()
    del there
    gc.collect()


@pytest.mark.parametrize("name", ["demo", "llava_next_mistral", "qwen2_5_vl"])
def test_an_exported_folder_in_vllm_answers_as_the_ablation(name, folder, tmp_path):
    here = vn.VLM.from_pretrained(folder(name), dtype=torch.float32)
    mask = sets_of(here, 1)["m0"]
    out = vn.export(vn.VLM.from_pretrained(folder(name), weights=False), mask, tmp_path / "out")
    there = vn.VLM.from_pretrained(out, engine="vllm", **small.VLLM)
    questions = small.questions_for(name, 48)
    ablated = vn.knockout(here, questions, {"m": mask}, **HOW)
    exported = vn.knockout(there, questions, {"none": vn.NeuronSet.empty(here.space())}, **HOW)
    assert np.array_equal(exported.chosen[0], ablated.chosen[1])
    np.testing.assert_allclose(exported.margins[0], ablated.margins[1], atol=1e-4)
    assert np.nanmax(np.abs(exported.margins[0] - ablated.margins[0])) > 0.01
    del there
    gc.collect()


# -- identity, folders, interrupts -------------------------------------------------------------------------------------


def test_tables_of_two_engines_are_not_added_unless_asked(pair, tmp_path):
    name, here, there = pair
    first, second = small.questions_for(name, 8)[:4], small.questions_for(name, 8)[4:]
    ours, theirs = vn.record(here, first, condition="all", **HOW), vn.record(there, second, condition="all", **HOW)
    with pytest.raises(MismatchError, match=r"of the second.*its engine is 'vllm [0-9.]+', not 'transformers'"):
        ours + theirs
    asked = theirs.with_provenance({**theirs.provenance, "setting": ours.provenance["setting"]})
    assert int((ours + asked).items.sum()) == 8
    vn.record_items(there, first, tmp_path / "run", **HOW)
    with pytest.raises(MismatchError, match=r"its engine is 'vllm"):
        vn.record_items(here, first, tmp_path / "run", **HOW)


def test_what_is_killed_is_gone_on_with(pair, folder, tmp_path):
    name, here, there = pair
    if name != "qwen2_5_vl":
        return  # one start of vLLM more for each model
    questions, masks = small.questions_for(name, 60), sets_of(here, 3)
    code = HERE / "ask_in_folders.py"
    for what in ("items", "knockout"):
        where = tmp_path / what
        run = subprocess.Popen([sys.executable, str(code), what, str(folder("qwen2_5_vl")), str(where)])
        until = time.monotonic() + 500
        while time.monotonic() < until and not begun(what, where):
            assert run.poll() is None, "it ended before it was killed"
            time.sleep(0.02)
        run.send_signal(signal.SIGKILL)
        run.wait()
        how = {"batch_size": 2, "progress": False}
        if what == "items":
            assert not vn.ItemStatistics.load(where).complete
            again = vn.record_items(there, questions, where, **how)
            whole = vn.record_items(there, questions, tmp_path / "whole", **how)
            assert again.complete
            assert np.array_equal(again._files.table("positive"), whole._files.table("positive"))
            assert np.array_equal(again._files.records["chosen"], whole._files.records["chosen"])
        else:
            assert not (where / "knockout.json").exists()
            again = vn.knockout(there, questions, masks, folder=where, **how)
            assert_same_answers(again, vn.knockout(there, questions, masks, **how), atol=1e-5)


def begun(what, where):
    """Whether some batches are finished."""
    if what == "items":
        try:
            return int(vn.ItemStatistics.load(where).done.sum()) >= 6
        except (OSError, vn.errors.VLMNeuronsError):
            return False
    return where.exists() and sum(path.suffix == ".parquet" for path in where.rglob("*")) >= 3


def test_what_an_interrupt_left_is_not_the_answer_to_the_next(pair, monkeypatch):
    name, here, there = pair
    questions, masks = small.questions_for(name, 16), sets_of(here, 2)
    vn.knockout(there, questions[:2], masks, **HOW)
    engine, steps = server(there).llm.llm_engine, []
    step = engine.step

    def interrupted():
        steps.append(1)
        if len(steps) == 1:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        vn.knockout(there, questions, masks, **HOW)
    assert_same_answers(vn.knockout(there, questions, masks, **HOW), vn.knockout(here, questions, masks, **HOW))


# -- what would be silently wrong --------------------------------------------------------------------------------------


def test_a_prefix_cache_that_is_read_is_noticed(pair, monkeypatch):
    name, _, there = pair
    import vllm

    questions = small.questions_for(name, 8)
    vn.record(there, questions, condition="all", **HOW)
    plain = vllm.SamplingParams
    monkeypatch.setattr(
        vllm, "SamplingParams", lambda **how: plain(**{**how, "skip_reading_prefix_cache": False, "max_tokens": 2})
    )
    with pytest.raises(MismatchError, match=r"vLLM ran \d+ of the \d+ tokens that count .*a prefix cache"):
        vn.record(there, questions, condition="all", **HOW)


def test_answers_that_are_stale_are_noticed(pair, monkeypatch):
    name, _, there = pair
    vn.record(there, small.questions_for(name, 2), condition="all", **HOW)
    held = server(there)
    held._proved.clear()
    generate = held.llm.generate

    def without_salt(prompts, *args, **how):
        return generate([{**one, "cache_salt": "the same"} for one in prompts], *args, **how)

    monkeypatch.setattr(held.llm, "generate", without_salt)
    with pytest.raises(MismatchError, match=r"cannot be trusted with .*: of \d+ tokens under a mask, layers edited"):
        vn.record(there, small.questions_for(name, 2), condition="all", **HOW)


def test_pictures_that_are_prepared_otherwise_are_noticed(pair, monkeypatch):
    name, _, there = pair
    questions = small.questions_for(name, 4)
    vn.record(there, questions, condition="all", **HOW)
    monkeypatch.setattr(there.processor.image_processor, "image_mean", [0.1, 0.9, 0.2])  # so all is proved anew
    with pytest.raises(MismatchError, match="it prepares a question's pictures otherwise than the VLM's processor"):
        vn.record(there, questions[2:], condition="all", **HOW)


def test_tokens_that_are_made_otherwise_are_noticed(pair, monkeypatch):
    name, _, there = pair
    questions = small.questions_for(name, 4)
    vn.record(there, questions, condition="all", **HOW)
    ids = there.encoder.token_ids
    monkeypatch.setattr(there.encoder, "token_ids", lambda text: [*ids(text), 5])
    with pytest.raises(MismatchError, match=r"vLLM makes \d+ tokens of a question and the VLM's processor \d+"):
        vn.record(there, questions, condition="all", **HOW)


def test_another_layout_of_the_mlps_is_refused(pair):
    name, _, there = pair
    vn.record(there, small.questions_for(name, 2), condition="all", **HOW)
    ((fault, *_),) = server(there).llm.collective_rpc("vn_begin", args=([7, 7],))
    assert fault.startswith("its MLPs have [")
    assert fault.endswith("neurons by layer, where the model has [7, 7]")


def test_a_question_that_is_too_long_is_named_and_can_be_skipped(pair):
    _, _, there = pair
    long = vn.Question(None, "word " * 600, ("tea", "rice"), 0, "A", id="long")
    short = [vn.Question(None, f"word {n}?", ("tea", "rice"), 0, "A", id=f"s{n}") for n in range(3)]
    questions = vn.QuestionSet([*short, long])
    with pytest.raises(QuestionError, match=r"needs \d+ tokens, and vLLM was started for 512: give max_model_len="):
        vn.record(there, questions, condition="all", **HOW)
    assert vn.record(there, questions, condition="all", on_error="skip", **HOW).provenance["skipped"] == ["long"]


def test_a_step_is_counted_once_also_where_a_prompt_is_computed_again():
    from vlmneurons.run.vllm.worker import _Counting

    counting = _Counting(1, [[0, "gate"]], False, False, "cpu")
    places = [1, 2, 5, 7]
    assert counting.new_places(0, places, 0, 3) == [1, 2]
    assert counting.new_places(0, places, 0, 6) == [5]  # preempted, and begun anew
    assert counting.new_places(0, places, 6, 4) == [7]
    assert counting.seen == [4]


def test_compiled_graphs_that_pass_over_hooks_are_noticed(folder, monkeypatch):
    import vllm

    start = vllm.LLM
    monkeypatch.delenv("VLLM_CPU_CI_ENV", raising=False)  # graphs are compiled at the start, before there are hooks
    vllm.envs.disable_envs_cache()  # where vLLM was started before, it would not look again
    monkeypatch.setattr(vllm, "LLM", lambda **how: start(**{**how, "enforce_eager": False}))
    there = vn.VLM.from_pretrained(folder("demo"), engine="vllm", **small.VLLM)
    with pytest.raises(MismatchError, match=r"vLLM ran 0 of the|does not change its answer"):
        vn.record(there, small.questions_for("demo", 2), condition="all", **HOW)
    del there
    gc.collect()


def test_a_folder_that_vllm_cannot_load_is_said_to_be_one(folder, tmp_path):
    hf, processor = testing.tiny_model("llava_next_mistral")  # heads too narrow, and new names of the tower
    hf.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    there = vn.VLM.from_pretrained(tmp_path, engine="vllm", **small.VLLM)
    with pytest.raises(MismatchError, match=r"vLLM does not start with .*its own messages"):
        vn.record(there, small.questions_for("llava_next_mistral", 2), condition="all", **HOW)


def test_what_vllm_cannot_do_is_refused_before_anything_is_asked(pair):
    name, here, there = pair
    questions, some = small.questions_for(name, 4), sets_of(here, 1)["m0"]
    at_gate = vn.Intervention(some, "add", factor=1.0, values=1.0, at="gate")
    with pytest.raises(AblationError, match="mode 'add' acts at 'post' only"):
        vn.knockout(there, questions, {"m": at_gate}, **HOW)
    with pytest.raises(MismatchError, match=r"vision\.layers\.0\.\w+\.\w+ is not of a decoder's own MLPs"):
        vn.record(there, questions, here.space("vision", "post"), condition="all", **HOW)
