"""Random results of every shape, recomputed from their files by a program of its own; see ``recompute_study.py``."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from recompute_study import Study, check_difference, check_effects, check_excess, check_summary, check_table
from vlmneurons.files.folders import RunFolder
from vlmneurons.study.masks import Mask, setting_name
from vlmneurons.study.result import RUN, KnockoutResult


def drawn_result(seed: int, scores: bool = False) -> KnockoutResult:
    """A result drawn at random: groups, pictures, masks, what was asked, and ties all differ from seed to seed."""
    random = np.random.default_rng([seed, 77])
    names = [f"g{n}" for n in range(random.integers(2, 6))]
    controls = ("general",) if seed % 3 == 0 else ()
    groups, pictures = [], []
    for name in (*names, *controls):
        for unit in range(random.integers(3, 45)):
            shared = seed % 4 == 1 and random.random() < 0.5  # a picture of several groups
            questions = int(random.integers(1, (1, 2, 5)[seed % 3] + 1))
            groups += [name] * questions
            pictures += [f"p{unit}" if shared else f"{name}-{unit}"] * questions
    n = len(groups)
    order = random.permutation(n)
    groups, pictures = [groups[place] for place in order], [pictures[place] for place in order]
    masks = [Mask(name, 0, group, 5) for name in ("CAS", "MAD") for group in names]
    masks += [Mask("random", repeat, group, 5) for repeat in range(2) for group in names]
    masks += [Mask("one set", 0, "all", 9), *(Mask("languages", 0, group, 5) for group in ("x", "y"))]
    masks += [Mask(setting_name("CAS", "r", 0.001), 0, group, 2) for group in names[:1]]
    answers = random.integers(0, 4, n)
    strength = random.choice([0.02, 0.1, 0.4])
    picture = {name: random.random() for name in sorted(set(pictures))}
    fragile = np.array([picture[name] for name in pictures])
    rows = [np.where(random.random(n) < 0.7, answers, (answers + 1) % 4)]
    for mask in masks:
        p = strength * np.where(np.array(groups) == mask.group, 1.5, 0.4) * (2 * fragile)
        wrong = random.random(n) < p
        rows.append(np.where(wrong, random.integers(-1, 4, n), rows[0]))
    chosen = np.stack(rows)
    margins = np.where(chosen == answers, 1.0, -1.0) * random.integers(1, 4, chosen.shape)  # many are equal
    if seed % 5 == 4:
        margins = np.full(chosen.shape, np.nan)  # generated answers
    graded = None
    if scores:  # of the VQA challenge, of which many are equal, or likelihoods, of which none are
        graded = np.where(chosen == answers, 0.9, 0.3 * random.integers(0, 3, chosen.shape))
        graded = graded if seed % 4 < 2 else graded - random.random(graded.shape)
    asked = None
    if seed % 2:  # not by any plan: cells may lack units, or be empty
        keep = {(m.group, p): random.random() < 0.5 for m in masks for p in sorted(set(pictures))}
        own = np.array(
            [[m.group in (g, "all") or keep[m.group, p] for g, p in zip(groups, pictures, strict=True)] for m in masks]
        )
        own[random.random(own.shape) < 0.02] = False
        asked = np.concatenate([np.ones((1, n), dtype=bool), own])
    result = KnockoutResult(
        tuple(f"q{number}" for number in order),
        tuple(groups),
        answers,
        tuple(masks),
        chosen,
        margins,
        controls=controls,
        pictures=None if seed % 7 == 6 else tuple(pictures),
        asked=asked,
        scores=graded,
    )
    return result.at(np.flatnonzero(random.random(n) < 0.8)) if seed % 6 == 5 else result  # a part of it


def joined_from_parts(result: KnockoutResult, folder: Path, count: int = 3) -> KnockoutResult:
    """The same result, asked in parts of any questions and joined, the last part given first."""
    owner = np.random.default_rng(len(result.ids)).permutation(len(result.ids)) % count
    for number in range(count):
        part = result.at(np.flatnonzero(owner == number))
        part = replace(part, provenance={"part": f"{number + 1}/{count}", "skipped": []})
        told = {
            "kind": RUN,
            "part": part.provenance["part"],
            "batches": "any",
            "content": dict.fromkeys(result.ids, "-"),
        }
        about = {"ids": list(result.ids), "options": [4] * len(result.ids), "asks": list(part.ids)}
        with RunFolder(folder / f"part-{number}", told, about).opened():
            part.save(folder / f"part-{number}")
    return KnockoutResult.join([folder / f"part-{n}" for n in range(count)][::-1], folder / "joined")


@pytest.mark.parametrize("seed", range(60))
def test_tables_equal_those_of_an_independent_program(seed, tmp_path):
    result = drawn_result(seed)
    if seed % 6 == 4:
        joined = joined_from_parts(result, tmp_path)
        assert joined.ids == result.ids
        assert joined.summary().equals(result.summary())
        result = joined
    value = "margin" if seed % 2 == 0 and seed % 5 != 4 else "correct"
    result.save(tmp_path)
    study = Study(pd.read_parquet(tmp_path / "answers.parquet"), set(result.controls))
    kept = KnockoutResult.load(tmp_path)
    assert len(study.masked) == (
        len(result.masks) * len(result.ids) if result.asked is None else result.asked[1:].sum()
    )
    check_table(study, pd.read_csv(tmp_path / "table.csv"))
    check_summary(study, pd.read_csv(tmp_path / "summary.csv"), "correct", tests=value == "correct")
    check_summary(study, kept.summary(value=value), value, tests=False)
    check_effects(study, kept.effects(value=value), value)
    check_difference(study, kept.difference("CAS", "MAD", value=value), "CAS", "MAD", value)
    for selector in ("CAS", "one set", "languages"):
        check_excess(kept.pairs(selector, value=value))


@pytest.mark.parametrize("seed", range(12))
def test_tables_on_scores_equal_those_of_an_independent_program(seed, tmp_path):
    result = drawn_result(seed, scores=True)
    if seed % 4 == 3:
        result = joined_from_parts(result, tmp_path)
    assert result.measure == "score"
    result.save(tmp_path)
    study = Study(pd.read_parquet(tmp_path / "answers.parquet"), set(result.controls))
    kept = KnockoutResult.load(tmp_path)
    np.testing.assert_array_equal(kept.scores, result.scores)
    check_table(study, pd.read_csv(tmp_path / "table.csv"))
    check_summary(study, pd.read_csv(tmp_path / "summary.csv"), "score", tests=seed % 3 == 0)
    check_summary(study, kept.summary(value="correct"), "correct", tests=False)
    check_effects(study, kept.effects(), "score", tests=seed % 3 == 1)
    check_difference(study, kept.difference("CAS", "MAD"), "CAS", "MAD", "score")
    check_excess(kept.pairs("CAS"))
    wide = kept.matrix("CAS")
    changes = study.changes("CAS", "score").T.groupby(study.group).mean().T
    np.testing.assert_allclose(wide, changes.loc[wide.index, wide.columns], atol=1e-12)
