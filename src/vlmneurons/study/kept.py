"""A study's folder, opened again: what `run_study` kept there, for reports and explorers that come later."""

import json
from pathlib import Path

import pandas as pd

from vlmneurons.checks import Keywords
from vlmneurons.errors import FileFormatError
from vlmneurons.neurons.selection import Selection
from vlmneurons.study.protocol import NULL, Protocol, StudyResult
from vlmneurons.study.result import KnockoutResult


def open_study(folder: Path) -> StudyResult:
    """The results that a study's folder holds; of a knockout's folder its answers alone.

    Args:
        folder: the folder that `run_study` or `knockout` was given.

    Raises:
        FileFormatError: there are no answers, a file is damaged, or the answers are a part of a run only.
    """
    answers = folder / "knockout" if (folder / "knockout").is_dir() else folder
    result = KnockoutResult.load(answers)
    if "part" in result.provenance:
        raise FileFormatError(
            f"{answers} is part {result.provenance['part']} of a run: `join` it with the others first"
        )
    others = {
        name: KnockoutResult.load(folder / part)
        for name, part in (("blind", "blind"), ("options only", "options-only"))
        if (folder / part / "knockout.json").exists()
    }
    selections = {path.stem: Selection.load(path) for path in sorted((folder / "selections").glob("*.safetensors"))}
    null = folder / "report" / "tables" / f"{NULL.replace(' ', '-')}.csv"
    tables = {NULL: pd.read_csv(null, float_precision="round_trip")} if null.exists() else {}
    return StudyResult(result, others, selections, tables)


def kept_protocol(folder: Path) -> Protocol | None:
    """The settings that a study was run with; None where the folder is no study's.

    Args:
        folder: the study's folder.

    Raises:
        FileFormatError: their file is damaged, or of another release.
    """
    path = folder / "protocol.json"
    if not path.exists():
        return None
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))["protocol"]
        settings: Keywords = {name: tuple(value) if isinstance(value, list) else value for name, value in kept.items()}
        return Protocol(**settings)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise FileFormatError(f"{path} does not hold the settings of a study: {error}") from error
