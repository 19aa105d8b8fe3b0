"""The setting of a run, put together in one place from what model, questions, reader and engine say."""

import platform
from collections.abc import Iterator, Mapping

import torch
from torch import nn

import vlmneurons.model.identity as of_model
from vlmneurons._version import __version__
from vlmneurons.checks import JSON
from vlmneurons.files.digests import digest_of_code
from vlmneurons.model.tokens import TokenRule
from vlmneurons.model.vlm import VLM
from vlmneurons.questions.sets import QuestionSet
from vlmneurons.run.ablation import ablations_in_force
from vlmneurons.run.engine import Engine
from vlmneurons.run.readers import AnswerReader
from vlmneurons.statistics.identity import Setting

_HOOKS_OF = ("nnsight", "transformers", "accelerate", "torch", "peft", "vlmneurons")


def setting_of_run(
    model: VLM,
    *,
    tokens: TokenRule | Mapping[str, TokenRule] | None = None,
    questions: QuestionSet | None = None,
    engine: Engine | None = None,
) -> Setting:
    """Everything but the questions that the numbers of a run depend on; all weights are read for it.

    Args:
        model: the model.
        tokens: which tokens are counted, where any are.
        questions: what is asked, for the prompt.
        engine: what runs the model and reads its answers; None for the user's own runs here.
    """
    of_engine = {} if engine is None else engine.own_setting
    return Setting(
        model=type(model.hf).__name__,
        weights=of_engine.get("weights") or of_model.weights_of(model),
        configuration=of_model.configuration_of(model),
        adapters=of_model.adapters_of(model),
        quantisation=of_model.quantisation_of(model),
        dtype=of_model.dtype_of(model),
        in_force=[*(ablation.what.fingerprint for ablation in ablations_in_force(model.hf)), *foreign_hooks(model.hf)],
        processor=of_model.processor_of(model),
        prompt="" if questions is None else name_of_rule(questions.prompt),
        answer="" if engine is None else name_of_reader(engine.reader),
        tokens="" if tokens is None else name_of_rule(tokens),
        engine="transformers" if engine is None else engine.name,
    )


def foreign_hooks(hf: nn.Module) -> Iterator[str]:
    """The user's own hooks, which may change what is computed: where each is, and a digest of its code.

    Args:
        hf: the transformers model.
    """
    for path, module in hf.named_modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            maker = (getattr(hook, "__module__", None) or type(hook).__module__).split(".")[0]
            if maker not in _HOOKS_OF:
                yield f"a hook at {path or 'the model'}: {digest_of_code(hook, state=False)}"


def name_of_rule(rule: object) -> str:
    """What tells a rule from others: its name, and for a function of the user's a digest of its code too."""
    if isinstance(rule, str):
        return rule
    if isinstance(rule, Mapping):
        return ", ".join(f"{name}: {name_of_rule(part)}" for name, part in rule.items())
    return digest_of_code(rule)


def name_of_reader(reader: AnswerReader) -> str:
    """What tells a reader from others: how it prints, and for a reader of the user's a digest of its code too."""
    if type(reader).__module__.startswith("vlmneurons."):
        scorer = getattr(reader, "scorer", None)
        by = "" if scorer is None else f", scored by {digest_of_code(scorer)}"
        return f"{reader!r} of vlmneurons {__version__}{by}"
    return f"{reader!r}: {digest_of_code(reader)}"


def run_provenance(
    model: VLM,
    setting: Setting,
    *,
    tokens: TokenRule | Mapping[str, TokenRule] | None = None,
    questions: QuestionSet | None = None,
    engine: Engine | None = None,
) -> JSON:
    """What a result keeps of the run that it comes from: names and versions for people to read, and its setting."""
    return {
        "model": model.name,
        "revision": model.revision,
        "dtype": setting.dtype,
        "device": model.device.type,
        "versions": versions(),
        **({} if engine is None else engine.provenance),
        **({} if tokens is None else {"tokens": rule_name(tokens)}),
        **({} if engine is None else {"answer": repr(engine.reader)}),
        **({} if questions is None else {"prompt": rule_name(questions.prompt), "shuffle": questions.shuffle}),
        "setting": setting.to_json(),
    }


def versions() -> dict[str, str]:
    """The versions of the library, and of what it computes with."""
    import nnsight
    import transformers

    return {
        "vlmneurons": __version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "nnsight": nnsight.__version__,
        "python": platform.python_version(),
    }


def rule_name(rule: object) -> str:
    """What a person calls a rule: its name, or that of the function."""
    if isinstance(rule, Mapping):
        return ", ".join(f"{name}: {rule_name(part)}" for name, part in rule.items())
    return rule if isinstance(rule, str) else f"{getattr(rule, '__module__', '')}.{getattr(rule, '__qualname__', rule)}"
