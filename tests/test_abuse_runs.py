"""Runs that are disturbed, by interrupts, NaN, threads, asyncio or forks: the model is as before, counts are kept.

`docs/abuse.md` has the table of these cases.
"""

import asyncio
import errno
import gc
import os
import random
import signal
import time
import warnings

import pytest
import torch

import vlmneurons as vn
from helpers import logits_of, some_questions
from vlmneurons.errors import AblationError, ActivationError


def neurons_of(model) -> vn.NeuronSet:
    return vn.NeuronSet(model.space(), range(0, len(model.space()), 3))


# -- interrupts --------------------------------------------------------------------------------------------------------


def test_an_interrupt_at_any_moment_keeps_whole_batches_and_leaves_the_model_alone(model):
    questions = some_questions(24)
    inputs = model.prepare(questions[:1])
    clean = logits_of(model.hf, inputs)
    whole = vn.record(model, questions, condition="all", batch_size=2, progress=False)
    began = time.perf_counter()
    vn.record(model, questions, condition="all", batch_size=2, progress=False)
    duration = time.perf_counter() - began
    rng, interrupted = random.Random(0), 0
    for _ in range(80):  # some come too late, above all on a machine whose load has just gone
        if interrupted == 8:
            break
        signal.setitimer(signal.ITIMER_REAL, 0.001 + rng.random() * duration)
        handler = signal.signal(signal.SIGALRM, signal.default_int_handler)  # what Ctrl-C does
        try:
            vn.record(model, questions, condition="all", batch_size=2, progress=False)
        except KeyboardInterrupt as error:
            interrupted += 1
            partial = getattr(error, "partial", None)
            if partial is not None:  # it is missing only where a batch was half added
                n = int(partial.items.sum())
                part = vn.record(model, questions[:n], condition="all", batch_size=2, progress=False) if n else None
                if part is not None:
                    assert torch.equal(partial.positive, part.positive)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler)
        assert torch.equal(logits_of(model.hf, inputs), clean)
    assert interrupted == 8
    assert vn.record(model, questions, condition="all", batch_size=2, progress=False) == whole


def test_an_interrupt_inside_an_ablation_leaves_the_model_as_it_was(model):
    inputs = model.prepare(some_questions(2))
    clean = logits_of(model.hf, inputs)
    handler = signal.signal(signal.SIGALRM, signal.default_int_handler)
    gc.disable()  # hypothesis watches the collector, and an interrupt within its watcher would be lost, with a warning
    try:
        for n in range(8):
            try:
                with vn.Ablation(model, neurons_of(model)):
                    signal.setitimer(signal.ITIMER_REAL, 0.002 + n * 0.004)
                    for _ in range(1000):
                        logits_of(model.hf, inputs)
            except KeyboardInterrupt:
                pass
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert torch.equal(logits_of(model.hf, inputs), clean)
    finally:
        gc.enable()
        signal.signal(signal.SIGALRM, handler)


def test_a_disk_that_fills_while_items_are_recorded_costs_one_batch_and_the_run_goes_on(model, tmp_path, monkeypatch):
    questions = some_questions(8)
    vn.record_items(model, questions, tmp_path / "whole", batch_size=2, progress=False)
    real, calls = os.fsync, []

    def fsync(handle):
        calls.append(handle)
        if len(calls) % 4 == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    failures = 0
    for _ in range(12):
        try:
            vn.record_items(model, questions, tmp_path / "cut", batch_size=2, progress=False)
            break
        except OSError as error:
            failures += 1
            full = error
    assert full.errno == errno.ENOSPC
    assert failures >= 2
    for name in ("manifest.json", "items.bin", "positive.bin"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# -- numbers that are none ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_activations_that_are_no_numbers_end_the_recording_by_name_and_spare_what_was_counted(model, value):
    questions = some_questions(6)
    weight = model.hf.model.language_model.layers[1].mlp.down_proj.weight
    calls = 0

    def poison(module, args):
        nonlocal calls
        calls += 1
        return (torch.full_like(args[0], value),) if calls > 2 else None

    handle = model.hf.model.language_model.layers[1].mlp.down_proj.register_forward_pre_hook(poison)
    try:
        with pytest.raises(
            ActivationError, match=r"NaN or infinite activations at language.layers.2.*question 'q"
        ) as e:
            vn.record(model, questions, condition="all", batch_size=2, progress=False)
    finally:
        handle.remove()
    assert torch.isfinite(weight).all()
    assert int(e.value.partial.items.sum()) == 4


# -- one model, several at once ----------------------------------------------------------------------------------------


def test_a_task_of_asyncio_does_not_run_under_another_tasks_ablation(model):
    inputs = model.prepare(some_questions(1))
    clean = logits_of(model.hf, inputs)

    async def ablate():
        with vn.Ablation(model, neurons_of(model)):
            await asyncio.sleep(0)
            assert not torch.equal(logits_of(model.hf, inputs), clean)
            await asyncio.sleep(0)

    async def run():
        await asyncio.sleep(0)
        with pytest.raises(AblationError, match="is being ablated in"):
            logits_of(model.hf, inputs)

    async def both():
        await asyncio.gather(ablate(), run())

    asyncio.run(both())
    assert torch.equal(logits_of(model.hf, inputs), clean)


def test_an_ablation_around_a_whole_event_loop_acts_in_its_tasks(model):
    inputs = model.prepare(some_questions(1))

    async def run():
        await asyncio.sleep(0)
        return logits_of(model.hf, inputs)

    with vn.Ablation(model, neurons_of(model)):
        expected = logits_of(model.hf, inputs)
        assert torch.equal(asyncio.run(run()), expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_worker_runs_ablated_and_leaving_there_leaves_the_parent_ablated(model):
    inputs = model.prepare(some_questions(1))
    clean = logits_of(model.hf, inputs)
    ablation = vn.Ablation(model, neurons_of(model))
    with ablation:
        ablated = logits_of(model.hf, inputs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # a fork of a process with threads: they are idle
            child = os.fork()
        if child == 0:
            code = 1
            try:
                same = torch.equal(logits_of(model.hf, inputs), ablated)
                ablation.__exit__()
                code = 0 if same and torch.equal(logits_of(model.hf, inputs), clean) else 2
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert torch.equal(logits_of(model.hf, inputs), ablated)
    assert torch.equal(logits_of(model.hf, inputs), clean)
