"""What makes two numbers comparable: the setting that they were made under, as typed data, compared in one place.

Counts, attributions and answers carry their setting in their provenance, under ``"setting"``. Two tables are added only
if their settings are equal. A run's folder is gone on with only if setting and content are equal; the content is the
questions and pictures, see `vlmneurons.questions.identity`. Parts are joined only if they have the same setting, and no
question in common.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields

from vlmneurons.checks import JSON, JSONMapping
from vlmneurons.errors import MismatchError
from vlmneurons.files.folders import differences


@dataclass(frozen=True)
class Setting:
    """Everything that a number depends on, apart from the questions.

    Attributes:
        model: class of the model.
        weights: a digest of all weights and buffers, and its kind: ``"bytes …"``; where the weights cannot be seen, as
            on a remote host, ``"repository …"``, which never equals a digest of bytes.
        configuration: digest of the model's configuration.
        adapters: names of the adapters in force.
        quantisation: how the weights are quantised.
        dtype: the precision that ran.
        in_force: ablations that the model was under, and hooks of others.
        processor: settings of the processor, of its tokenizer and of the chat template.
        prompt: the prompt, a function of the user's by its code.
        answer: how answers are read.
        tokens: which tokens count; empty where none are counted.
        engine: what ran the model.
    """

    model: str
    weights: str
    configuration: str
    adapters: list[str]
    quantisation: str
    dtype: str
    in_force: list[str]
    processor: JSON
    prompt: str
    answer: str
    tokens: str
    engine: str

    def to_json(self) -> JSON:
        """As plain values, for files."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: JSONMapping) -> "Setting":
        """What `to_json` gave; entries that this release does not know are refused.

        Raises:
            MismatchError: the entries are not those of a setting.
        """
        names = {field.name for field in fields(cls)}
        if set(data) != names:
            raise MismatchError(f"a setting has {', '.join(sorted(names))}; got {', '.join(sorted(data))}")
        return cls(**data)

    def differences(self, other: "Setting") -> Iterator[str]:
        """What differs in another setting, in words."""
        yield from differences(other.to_json(), self.to_json(), "setting")


def setting_of(provenance: JSONMapping) -> Setting | None:
    """The setting that a provenance holds; None for counts that the user brought, which have none.

    Raises:
        MismatchError: a recording of an earlier release, whose setting is not known.
    """
    if "setting" in provenance:
        return Setting.from_json(provenance["setting"])
    if "versions" in provenance:  # the library recorded it
        raise MismatchError(
            "it was recorded by an earlier release, which did not keep of which weights, pictures and settings it is: "
            "it can be read and selected from, but not added to; record it again"
        )
    return None


def check_addable(first: Mapping[str, object], second: Mapping[str, object], noun: str = "statistics") -> None:
    """Refuse to add two tables of different settings.

    Args:
        first: the provenance of the first table.
        second: that of the second.
        noun: what tables are called in errors.

    Raises:
        MismatchError: settings differ, or one is not known; the message says what.
    """
    try:
        setting, second_setting = setting_of(first), setting_of(second)
    except MismatchError as error:
        raise MismatchError(f"these {noun} cannot be added: of one of them, {error}") from None
    if (setting is None) != (second_setting is None):
        raise MismatchError(
            f"these {noun} cannot be added: one was recorded by the library, the other has no setting that says of "
            "which model it is. Give from_counts(…, provenance=…) that of the recording if model and rules are its own"
        )
    if setting is not None and second_setting is not None and (differs := list(setting.differences(second_setting))):
        raise MismatchError(f"{noun} of different settings cannot be added: of the second, {'; '.join(differs[:3])}")
