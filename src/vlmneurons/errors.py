"""What can go wrong, as few kinds of exception as a caller may want to tell apart.

Every message says what was wrong, what was given, what is allowed, and, where it is not obvious, the next step.
"""


class VLMNeuronsError(Exception):
    """Base class of every error that the library raises on purpose."""


class SiteError(VLMNeuronsError, LookupError):
    """A tower, layer, site or neuron that does not exist."""


class ArchitectureError(VLMNeuronsError):
    """A model whose MLPs cannot be named without guessing."""


class MismatchError(VLMNeuronsError, ValueError):
    """Two things that do not belong together: statistics, neurons or a model of different shapes or names."""


class SelectionError(VLMNeuronsError, ValueError):
    """A selection that cannot be made from these statistics with these settings."""


class QuestionError(VLMNeuronsError, ValueError):
    """A question, or a set of questions, that cannot be asked."""


class ActivationError(VLMNeuronsError, FloatingPointError):
    """NaN or infinite activations."""


class AblationError(VLMNeuronsError, RuntimeError):
    """An ablation that cannot be applied, or would act on something else than what it says."""


class FileFormatError(VLMNeuronsError, ValueError):
    """A file that is damaged, of another kind, or from a newer version."""


class OutOfMemoryError(VLMNeuronsError, MemoryError):
    """A single question that does not fit into memory; larger batches are halved without an error."""


class GroupError(VLMNeuronsError, KeyError):
    """A group that does not exist."""

    # KeyError shows the repr of its argument, which turns a sentence into a quoted, escaped string.
    __str__ = Exception.__str__
