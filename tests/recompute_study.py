"""The tables of a run, computed again from its kept answers by pandas, SciPy and statsmodels alone.

As a script: ``python tests/recompute_study.py RUN`` compares all of them, at any size. No code of the library is used.
"""

import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats as scipy_stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests


def generator_for(function: Callable[..., Any], seed: int) -> dict[str, np.random.Generator]:
    """The argument that seeds a function of SciPy: ``random_state``, which SciPy 1.15 renamed to ``rng``."""
    name = "rng" if "rng" in inspect.signature(function).parameters else "random_state"
    return {name: np.random.default_rng(seed)}


def compare(run: Path, resamples: int = 2000) -> dict[str, int]:
    """Compare ``table.csv``, ``summary.csv`` and the report's tables with the answers; gives what was compared."""
    folder = run / "knockout"
    about = json.loads((folder / "knockout.json").read_text())
    answers = pd.read_parquet(folder / "answers.parquet")
    for name in ("selector", "mask", "id", "group", "picture"):
        answers[name] = answers[name].astype(str)
    assert (answers["correct"] == (answers["chosen"] == answers["answer"])).all()
    clean = answers[answers["run"] == 0].set_index("id")
    masked = answers[answers["run"] > 0].copy()
    for name in ("correct", "chosen", "margin"):
        masked[f"clean_{name}"] = masked["id"].map(clean[name])
    masked["change"] = masked["correct"].astype(int) - masked["clean_correct"].astype(int)
    controls = set(about["controls"])
    compared = {
        "answers": len(answers),
        "table": _table(folder, masked),
        "summary": _summary(folder, masked[~masked["group"].isin(controls)], resamples),
        "random": _random(run, masked[~masked["group"].isin(controls)]),
    }
    compared["accuracy"] = _accuracy(run, clean)
    return compared


def _close(ours: object, theirs: object, what: str, atol: float = 1e-9) -> None:
    np.testing.assert_allclose(np.asarray(ours, float), np.asarray(theirs, float), atol=atol, err_msg=what)


def _table(folder: Path, masked: pd.DataFrame) -> int:
    ours = pd.read_csv(folder / "table.csv", keep_default_na=False).set_index(["selector", "repeat", "mask", "group"])
    flipped = masked["chosen"] != masked["clean_chosen"]
    right, was = masked["correct"], masked["clean_correct"]
    by_hand = masked.assign(
        flips=flipped,
        right_to_wrong=was & ~right,
        wrong_to_right=~was & right,
        wrong_to_wrong=flipped & ~was & ~right,
        failures=masked["chosen"] < 0,
        ablated=right,
        clean=was,
        margin=masked["margin"] - masked["clean_margin"],
    )
    columns = ["clean", "ablated", "flips", "right_to_wrong", "wrong_to_right", "wrong_to_wrong", "failures", "margin"]
    grouped = by_hand.groupby(["selector", "repeat", "mask", "group"])
    means = grouped[columns].mean()
    means["delta"], means["n"] = means["ablated"] - means["clean"], grouped.size()
    assert set(ours.index) == set(means.index)
    for name in [*columns, "delta", "n"]:
        _close(ours[name], means.loc[ours.index, name], name)
    return ours.size


def _summary(folder: Path, masked: pd.DataFrame, resamples: int) -> int:
    ours = pd.read_csv(folder / "summary.csv", keep_default_na=False, na_values=[""])
    random = np.random.default_rng(12345)
    draws: dict[str, list[np.ndarray]] = {}
    for selector, rows in ours.groupby("selector"):
        of_groups = rows[rows["group"] != "all"].set_index("group")
        part = masked[masked["selector"] == selector]
        groups = list(of_groups.index)
        delta = part.groupby(["mask", "group"])["change"].mean().unstack()
        selves = pd.Series({group: delta.loc[group, group] for group in groups})
        received = pd.Series({group: delta.loc[delta.index != group, group].mean() for group in groups})
        caused = pd.Series({group: delta.loc[group, delta.columns != group].mean() for group in groups})
        values = {"self_effect": selves, "cross_effect": received, "cross_caused": caused, "gap": selves - received}
        overall = rows[rows["group"] == "all"].iloc[0]
        for name, value in values.items():
            _close(of_groups[name], value[groups], f"{selector} {name}")
            _close(overall[name], value.mean(), f"{selector} {name} over all")
        # p of McNemar's test and its corrections, by statsmodels.
        if part["repeat"].nunique() == 1:
            own = part[part["mask"] == part["group"]]
            pvalues = []
            for group in groups:
                here = own[own["group"] == group]
                before, after = here["clean_correct"].to_numpy(bool), here["correct"].to_numpy(bool)
                table = [[(x & y).sum() for y in (after, ~after)] for x in (before, ~before)]
                pvalues.append(mcnemar(table, exact=True).pvalue)
            _close(of_groups["p"], pvalues, f"{selector} p", 1e-9)
            for name, method in (("p_holm", "holm"), ("p_bh", "fdr_bh")):
                _close(of_groups[name], multipletests(pvalues, method=method)[1], f"{selector} {name}", 1e-9)
        # Intervals: our own bootstrap of pictures has other random numbers, so bounds agree to a few standard errors.
        change = part.groupby(["mask", "id"])["change"].mean().unstack("id")
        facts = part.drop_duplicates("id").set_index("id").loc[change.columns]
        pictures, groups_of = facts["picture"].to_numpy(), facts["group"].to_numpy()
        lows, highs, spreads = {}, {}, {}
        assert facts.groupby("picture")["group"].nunique().max() == 1
        for group in groups:
            here = groups_of == group
            names, code = np.unique(pictures[here], return_inverse=True)
            if group not in draws:
                drawn = random.integers(0, len(names), (resamples, len(names)))
                draws[group] = np.apply_along_axis(np.bincount, 1, drawn, minlength=len(names))
            weight = draws[group][:, code]
            means = weight @ change.to_numpy()[:, here].T / weight.sum(1, keepdims=True)
            place = list(change.index).index(group)
            gaps = means[:, place] - np.delete(means, place, 1).mean(1)
            for name, value in (("self_effect", means[:, place]), ("gap", gaps)):
                lows[group, name], highs[group, name] = np.percentile(value, [2.5, 97.5])
                spreads[group, name] = value.std()
            assert of_groups.loc[group, "pictures"] == len(names)
            assert of_groups.loc[group, "n"] == here.sum()
        for (group, name), low in lows.items():
            # a step of the discrete distribution, or five standard errors of a percentile
            slack = max(1.01 / of_groups.loc[group, "n"], 0.35 * spreads[group, name])
            _close(of_groups.loc[group, f"{name}_low"], low, f"{selector} {group} {name} low", slack)
            _close(of_groups.loc[group, f"{name}_high"], highs[group, name], f"{selector} {group} {name} high", slack)
        # The permutation p of one group, against SciPy's own permutation test of the pictures' sums.
        if selector in ("CAS", "MAD"):
            group = groups[0]
            here = groups_of == group
            sums = pd.Series(change.loc[group].to_numpy()[here]).groupby(pictures[here]).sum().to_numpy()
            seeded = generator_for(scipy_stats.permutation_test, 1)
            test = scipy_stats.permutation_test((sums,), np.sum, permutation_type="samples", n_resamples=4000, **seeded)
            _close(of_groups.loc[group, "p_permutation"], test.pvalue, f"{selector} {group} permutation", 0.05)
    return ours.size


def _random(run: Path, masked: pd.DataFrame) -> int:
    path = run / "report" / "tables" / "every-random.csv"
    if not path.exists():
        return 0
    ours = pd.read_csv(path)
    selves = masked[masked["mask"] == masked["group"]].groupby(["selector", "repeat", "mask"])["change"].mean()
    for _, row in ours[ours["effect"] == "self_effect"].iterrows():
        values = selves.loc[row["control"]].unstack()
        drawn = values.mean(axis=1) if row["group"] == "all" else values[row["group"]]
        _close(row["control_mean"], drawn.mean(), f"{row['control']} mean")
        _close(row["control_low"], drawn.min(), f"{row['control']} low")
        if len(drawn) > 1:
            _close(row["control_sd"], drawn.std(ddof=1), f"{row['control']} sd")
        _close(row["p"], (1 + (drawn <= row["value"] + 1e-12).sum()) / (1 + len(drawn)), "p among random masks")
    return ours.size


def _accuracy(run: Path, clean: pd.DataFrame) -> int:
    ours = pd.read_csv(run / "report" / "tables" / "accuracy.csv", keep_default_na=False).set_index("group")
    found = {"as asked": clean}
    for name, folder in (("blind", "blind"), ("options only", "options-only")):
        answers = pd.read_parquet(run / folder / "answers.parquet")
        found[name] = answers[answers["run"] == 0].set_index("id")
    for name, answers in found.items():
        shares = 100 * answers.groupby(answers["group"].astype(str))["correct"].mean()
        theirs = ours.loc[shares.index, name].astype(float)
        _close(theirs, shares, name, 0.0501)
    return ours.size


if __name__ == "__main__":
    print(compare(Path(sys.argv[1])))
