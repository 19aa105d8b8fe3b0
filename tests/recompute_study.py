"""The tables of a run, computed again from its kept answers by pandas, SciPy and statsmodels alone.

As a script: ``python tests/recompute_study.py RUN`` compares all of them, at any size. No code of the library is used:
this is written from the formulas of docs/methods.md ("Effects").
"""

import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import statsmodels.api as sm
from scipy import stats as scipy_stats
from statsmodels.stats.multitest import fdrcorrection

MOST_FLIPS = 10_000
"""Flips of the tests here; more would take long, and the comparison allows for the error of so many."""


def generator_for(function: Callable[..., Any], seed: int) -> dict[str, np.random.Generator]:
    """The argument that seeds a function of SciPy: ``random_state``, which SciPy 1.15 renamed to ``rng``."""
    name = "rng" if "rng" in inspect.signature(function).parameters else "random_state"
    return {name: np.random.default_rng(seed)}


COLUMNS = {"correct": "change", "margin": "nats", "score": "graded"}


def lacking(value: str, changed: int, n: int) -> bool:
    """Whether too few values have moved: of answers, and of scores unless all have."""
    return changed < 20 and (value == "correct" or (value == "score" and changed < n))


def close(ours: object, theirs: object, what: str, atol: float = 1e-9) -> None:
    np.testing.assert_allclose(np.asarray(ours, float), np.asarray(theirs, float), rtol=1e-7, atol=atol, err_msg=what)


class Study:
    """The kept answers of a study, as changes, and what can be said of any values of them."""

    def __init__(self, answers: pd.DataFrame, controls: set[str]) -> None:
        answers = answers.copy()
        for name in ("selector", "mask", "id", "group", "picture"):
            answers[name] = answers[name].astype(str)
        clean = answers[answers["run"] == 0].set_index("id")
        masked = answers[answers["run"] > 0].copy()
        for name in ("correct", "chosen", "margin"):
            masked[f"clean_{name}"] = masked["id"].map(clean[name])
        masked["change"] = masked["correct"].astype(int) - masked["clean_correct"].astype(int)
        masked["nats"] = masked["margin"] - masked["clean_margin"]
        if "score" in answers:
            masked["clean_score"] = masked["id"].map(clean["score"])
            masked["graded"] = masked["score"] - masked["clean_score"]
        self.clean, self.masked, self.controls = clean, masked, controls
        self.group = clean["group"]
        self.picture = clean["picture"].where(clean["picture"] != "", [f"alone {name}" for name in clean.index])
        self.groups = sorted(set(self.group) - controls)

    def changes(self, selector: str, value: str) -> pd.DataFrame:
        """Masks by questions: the change of a value, repeats averaged, NaN where there is none."""
        column = COLUMNS[value]
        part = self.masked[self.masked["selector"] == selector]
        wide = part.groupby(["mask", "id"])[column].mean().unstack("id")
        return wide.reindex(columns=self.clean.index)

    def effects(self, selector: str, value: str) -> dict[str, pd.Series]:
        """Self effect, cross effect and gap, question by question."""
        change = self.changes(selector, value)
        named = [mask for mask in change.index if mask != "all"] or list(change.index)
        selves, cross = [], []
        for group, ids in self.group.groupby(self.group).groups.items():
            own = change.loc[group, ids] if group in change.index else pd.Series(np.nan, ids)
            selves.append(own.astype(float))
            cross.append(change.loc[[mask for mask in named if mask != group], ids].mean().astype(float))
        found = {"self_effect": pd.concat(selves)[self.group.index], "cross_effect": pd.concat(cross)[self.group.index]}
        return found | {"gap": found["self_effect"] - found["cross_effect"]}

    # -- means, intervals, tests ---------------------------------------------------------------------------------------

    def mean(self, values: pd.Series, group: str, value: str, confidence: float = 0.95) -> dict[str, float]:
        """The mean over a group's questions: the interval is that of a regression on a constant, clustered by unit."""
        values = values[(self.group[values.index] == group) & values.notna()]
        units = pd.factorize(self.picture[values.index])[0]
        n_units, changed = len(set(units)), int((values != 0).sum())
        found = {"n": len(values), "units": n_units, "changed": changed, "value": values.mean()}
        found |= {"low": np.nan, "high": np.nan}
        sums = values.groupby(units).sum().to_numpy()
        spread = sums - found["value"] * np.bincount(units, minlength=n_units) if len(values) else sums
        few = (
            n_units < 12 or lacking(value, changed, len(values)) or not (np.abs(spread) > 1e-9 * abs(sums).sum()).any()
        )
        if not few:
            fit = sm.OLS(values.to_numpy(), np.ones(len(values))).fit(
                cov_type="cluster", cov_kwds={"groups": units}, use_t=True
            )
            found["low"], found["high"] = fit.conf_int(1 - confidence)[0]
        return found | {"few": few and len(values) > 0}

    def whole(self, values: dict[str, pd.Series], value: str, confidence: float = 0.95) -> dict[str, float]:
        """The mean over groups of their means: what a picture says in several groups is summed before it is squared."""
        known = {g: v[(self.group[v.index] == g) & v.notna()] for g, v in values.items()}
        known = {group: one for group, one in known.items() if len(one)}
        found = {
            "n": sum(map(len, known.values())),
            "changed": sum(int((one != 0).sum()) for one in known.values()),
            "units": len({name for one in known.values() for name in self.picture[one.index]}),
            "value": np.mean([one.mean() for one in known.values()]) if known else np.nan,
            "low": np.nan,
            "high": np.nan,
        }
        pieces: dict[str, float] = {}
        groups_of: dict[str, list[str]] = {}
        n_units = {group: self.picture[one.index].nunique() for group, one in known.items()}
        for group, one in known.items():
            for picture, part in one.groupby(self.picture[one.index]):
                z = (part.sum() - one.mean() * len(part)) / len(one) / len(known)
                factor = n_units[group] / (n_units[group] - 1) if n_units[group] > 1 else np.nan
                pieces[picture] = pieces.get(picture, 0.0) + np.sqrt(factor) * z
                groups_of.setdefault(picture, []).append(group)
        variance = sum(piece**2 for piece in pieces.values())
        below = 0.0
        for kind in {tuple(groups) for groups in groups_of.values()}:
            pictures = [name for name, groups in groups_of.items() if tuple(groups) == kind]
            part = sum(pieces[name] ** 2 for name in pictures)
            degrees = len(pictures) * (1 - np.mean([1 / n_units[group] for group in kind]))
            below += part**2 / degrees if part > 0 else 0.0
        still = not variance > (1e-9 * found["value"]) ** 2
        few = found["units"] < 12 or lacking(value, found["changed"], found["n"]) or still
        if not few:
            reach = scipy_stats.t.ppf(0.5 + confidence / 2, variance**2 / below) * np.sqrt(variance)
            found["low"], found["high"] = found["value"] - reach, found["value"] + reach
        return found | {"few": few and found["n"] > 0}

    def flips(self, totals: pd.Series, seed: int = 1) -> tuple[float, bool]:
        """Two-sided p of sign flips of units' totals by SciPy, and whether it is that of all flips there are."""
        terms = totals[totals != 0].to_numpy()
        if len(terms) < 2:
            return 1.0, True
        unit = np.abs(terms).sum() * 1e-9  # sums that are equal on paper, and differ by rounding, are equal

        def total(x: np.ndarray, axis: int) -> np.ndarray:
            return np.abs(np.round(x.sum(axis=axis) / unit))

        seeded = generator_for(scipy_stats.permutation_test, seed)
        test = scipy_stats.permutation_test(
            (terms,), total, permutation_type="samples", alternative="greater", n_resamples=MOST_FLIPS, **seeded
        )
        return test.pvalue, 2 ** len(terms) <= 2000

    def totals(self, values: dict[str, pd.Series]) -> pd.Series:
        """What each picture adds to the mean over groups of their means."""
        known = {g: v[(self.group[v.index] == g) & v.notna()] for g, v in values.items()}
        known = {
            group: one / len(one) / sum(len(x) > 0 for x in known.values()) for group, one in known.items() if len(one)
        }
        if not known:
            return pd.Series(dtype=float)
        joined = pd.concat(known.values())
        return joined.groupby(self.picture[joined.index]).sum()


def check_p(ours: float, theirs: tuple[float, bool], flips: int, what: str) -> None:
    """Equal where all flips were made, by both; else within four Monte-Carlo errors of the two programs."""
    p, exact = theirs
    if exact:
        assert abs(ours - p) < 1e-9, (what, ours, p)
    else:
        error = np.sqrt(max(p * (1 - p), 1e-3) * (1 / flips + 1 / MOST_FLIPS))
        assert abs(ours - p) <= 4 * error + 2 / flips, (what, ours, p)


# -- tables ------------------------------------------------------------------------------------------------------------


def check_table(study: Study, ours: pd.DataFrame) -> int:
    """``table()``: means over what was asked; n is 0 and the rest is missing where nothing was."""
    ours = ours.set_index(["selector", "repeat", "mask", "group"])
    masked = study.masked
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
        margin=masked["nats"],
    )
    columns = ["clean", "ablated", "flips", "right_to_wrong", "wrong_to_right", "wrong_to_wrong", "failures", "margin"]
    if "score" in ours:
        by_hand["score"] = masked["graded"]
        columns += ["clean_score", "score"]
    grouped = by_hand.groupby(["selector", "repeat", "mask", "group"])
    means = grouped[columns].mean()
    means["delta"], means["n"] = means["ablated"] - means["clean"], grouped.size()
    assert set(means.index) <= set(ours.index)
    means = means.reindex(ours.index)
    means["n"] = means["n"].fillna(0)
    for name in [*columns, "delta", "n"]:
        close(ours[name], means[name], name)
    return ours.size


def check_effects(study: Study, ours: pd.DataFrame, value: str, *, tests: bool = True) -> int:
    """``effects()``: every mask on every group."""
    for selector, rows in ours.groupby("selector", sort=False):
        change = study.changes(selector, value)
        kinds = {}
        for row in rows.itertuples():
            kind = "self" if row.mask == row.group else "none" if row.mask == "all" else "other"
            kinds.setdefault("control" if row.group in study.controls else kind, []).append(row.Index)
            assert row.kind == ("control" if row.group in study.controls else kind)
            there = change.loc[row.mask] if row.mask in change.index else pd.Series(np.nan, change.columns)
            expected = study.mean(there, row.group, value)
            what = f"{selector} {row.mask} {row.group}"
            for name in ("n", "units", "changed", "low", "high", "few"):
                close(getattr(row, name), expected[name], f"{what} {name}")
            close(row.effect, expected["value"], what)
            tested = expected["n"] > 0 and (row.kind == "self" or expected["units"] >= 12)
            assert np.isfinite(row.p) == tested, what
        for family in kinds.values():
            check_corrections(rows.loc[family], "p")
            tested = [index for index in family if np.isfinite(rows.loc[index, "p"])]
            for index in tested[:: max(1, len(tested) // 2)] if tests else []:
                row = rows.loc[index]
                there = change.loc[row["mask"]]
                theirs = study.flips(study.totals({row["group"]: there}))
                check_p(row["p"], theirs, max(2000, 20 * len(tested)), f"{selector} {row['mask']} {row['group']} p")
    return ours.size


def check_corrections(rows: pd.DataFrame, name: str) -> None:
    p = rows[name].dropna().sort_values()
    holm = np.minimum(1, np.maximum.accumulate(p.to_numpy() * np.arange(len(p), 0, -1)))
    for ending, corrected in (("holm", holm), ("bh", fdrcorrection(p)[1] if len(p) else [])):
        close(rows.loc[p.index, f"{name}_{ending}"], corrected, f"{name}_{ending}")
        assert rows[f"{name}_{ending}"].notna().sum() == len(p)


def check_excess(ours: pd.DataFrame) -> int:
    """``pairs()``: residuals of a weighted regression of the cross effects on masks and groups."""
    cross = ours[(ours["mask"] != ours["group"]) & (ours["n"] > 0)]
    assert ours.drop(cross.index)["excess"].isna().all()
    if not len(cross):
        return 0
    design = pd.get_dummies(cross[["mask", "group"]], prefix=["mask", "group"], dtype=float).to_numpy()
    root = np.sqrt(cross["n"].to_numpy(float))
    fitted = design @ np.linalg.lstsq(root[:, None] * design, root * cross["delta"].to_numpy(), rcond=None)[0]
    rank = np.linalg.matrix_rank(design)
    free = [np.linalg.matrix_rank(np.delete(design, row, 0)) == rank for row in range(len(cross))]
    close(cross["excess"], np.where(free, cross["delta"] - fitted, np.nan), "excess", 1e-8)
    return len(cross)


def check_summary(study: Study, ours: pd.DataFrame, value: str, *, tests: bool = True) -> int:
    """``summary()``: self effect, cross effects and gap."""
    for selector, rows in ours.groupby("selector", sort=False):
        change = study.changes(selector, value)
        masked = [group for group in study.groups if group in change.index]
        groups = masked or study.groups
        assert rows["group"].tolist() == [*groups, "all"], selector
        rows = rows.set_index("group")
        effects, nats = study.effects(selector, value), study.effects(selector, "margin")
        caused, controlled = {}, {}
        clean = study.clean["score" if value == "score" else "correct"].astype(float)
        for group in masked:
            others = [other for other in study.groups if other != group]
            caused[group] = dict.fromkeys(others, change.loc[group])
            controlled[group] = dict.fromkeys(sorted(study.controls), change.loc[group])
        for group, row in rows.iterrows():
            few, alone = [], group != "all"
            own = study.group[study.group.isin(study.groups if not alone else [group])].index
            close(row["n"], len(own), "n")
            close(row["pictures"], study.picture[own].nunique(), "pictures")
            close(
                row["clean"],
                np.mean([clean[study.group == g].mean() for g in ([group] if alone else groups)]),
                "clean",
            )
            for name, one in effects.items():
                expected = study.mean(one, group, value) if alone else study.whole(dict.fromkeys(groups, one), value)
                few += [name] if expected["few"] else []
                for ours_name, theirs in ((name, "value"), (f"{name}_low", "low"), (f"{name}_high", "high")):
                    close(row[ours_name], expected[theirs], f"{selector} {group} {ours_name}")
            if alone and masked:
                parts = [("cross_caused", caused[group])]
                parts += [("control_effect", controlled[group])] if study.controls else []
                for name, cells in parts:
                    expected = study.whole(cells, value)
                    few += [name] if expected["few"] else []
                    for ours_name, theirs in ((name, "value"), (f"{name}_low", "low"), (f"{name}_high", "high")):
                        close(row[ours_name], expected[theirs], f"{selector} {group} {ours_name}")
                reached = [cells for cells in caused[group] if study.mean(change.loc[group], cells, value)["n"]]
                assert row["cross_groups"] == len(reached)
                assert sorted(filter(None, str(row["few"]).replace("nan", "").split(", "))) == sorted(few)
            elif masked:
                each = [study.whole(caused[g], value)["value"] for g in masked]
                close(
                    row["cross_caused"],
                    np.nanmean(each) if np.isfinite(each).any() else np.nan,
                    f"{selector} cross caused",
                )
            for name, label in (("self_effect", "self_margin"), ("cross_effect", "cross_margin")):
                means = [nats[name][study.group == g].mean() for g in ([group] if alone else groups)]
                close(row[label], np.mean([m for m in means if m == m]) if np.isfinite(means).any() else np.nan, label)
        for number, (name, column) in enumerate(zip(effects, ("p", "cross_p", "gap_p"), strict=True)):
            check_corrections(rows.drop("all"), column)
            for group in ["all", *groups[:1]] if tests else []:
                if np.isfinite(rows.loc[group, column]):
                    over = groups if group == "all" else [group]
                    theirs = study.flips(study.totals(dict.fromkeys(over, effects[name])), number)
                    check_p(rows.loc[group, column], theirs, 2000, f"{selector} {group} {column}")
    return ours.size


def check_difference(study: Study, ours: pd.DataFrame, first: str, second: str, value: str) -> int:
    """``difference()``: two selectors, question by question."""
    one, other = study.effects(first, value), study.effects(second, value)
    for effect, rows in ours.groupby("effect"):
        values = one[effect] - other[effect]
        groups = [group for group in rows["group"] if group != "all"]
        for row in rows.itertuples():
            over = groups if row.group == "all" else [row.group]
            expected = study.whole(dict.fromkeys(over, values), value)
            if row.group != "all":
                expected = study.mean(values, row.group, value)
            what = f"{effect} {row.group}"
            for name in ("n", "units", "changed", "low", "high", "few"):
                close(getattr(row, name), expected[name], f"{what} {name}")
            close(row.difference, expected["value"], what)
            if expected["n"] and row.group in ("all", groups[0]):
                check_p(row.p, study.flips(study.totals(dict.fromkeys(over, values))), 2000, f"{what} p")
        check_corrections(rows[rows["group"] != "all"], "p")
    return ours.size


# -- a run -------------------------------------------------------------------------------------------------------------


def compare(run: Path) -> dict[str, int]:
    """Compare ``table.csv``, ``summary.csv`` and the report's tables with the answers; gives what was compared."""
    folder = run / "knockout"
    about = json.loads((folder / "knockout.json").read_text())
    answers = pd.read_parquet(folder / "answers.parquet")
    assert (answers["correct"] == (answers["chosen"] == answers["answer"])).all()
    study = Study(answers, set(about["controls"]))
    kept = {"keep_default_na": False, "na_values": [""]}
    value = "score" if "score" in answers else "correct"
    compared = {
        "answers": len(answers),
        "table": check_table(study, pd.read_csv(folder / "table.csv", **kept)),
        "summary": check_summary(study, pd.read_csv(folder / "summary.csv", **kept), value),
        "random": _random(run, study.masked[~study.masked["group"].isin(study.controls)], COLUMNS[value]),
    }
    pairs = run / "report" / "tables" / "every-pair.csv"
    if pairs.exists():
        every = pd.read_csv(pairs, **kept)
        compared["pairs"] = sum(check_excess(rows) for _, rows in every.groupby("selector"))
    compared["accuracy"] = _accuracy(run, study.clean)
    return compared


def _random(run: Path, masked: pd.DataFrame, column: str) -> int:
    path = run / "report" / "tables" / "every-random.csv"
    if not path.exists():
        return 0
    ours = pd.read_csv(path)
    selves = masked[masked["mask"] == masked["group"]].groupby(["selector", "repeat", "mask"])[column].mean()
    for _, row in ours[ours["effect"] == "self_effect"].iterrows():
        values = selves.loc[row["control"]].unstack()
        drawn = values.mean(axis=1) if row["group"] == "all" else values[row["group"]]
        close(row["control_mean"], drawn.mean(), f"{row['control']} mean")
        close(row["control_low"], drawn.min(), f"{row['control']} low")
        if len(drawn) > 1:
            close(row["control_sd"], drawn.std(ddof=1), f"{row['control']} sd")
        close(row["p"], (1 + (drawn <= row["value"] + 1e-12).sum()) / (1 + len(drawn)), "p among random masks")
    return ours.size


def _accuracy(run: Path, clean: pd.DataFrame) -> int:
    ours = pd.read_csv(run / "report" / "tables" / "accuracy.csv", keep_default_na=False).set_index("group")
    found = {"as asked": clean}
    for name, folder in (("blind", "blind"), ("options only", "options-only")):
        if not (run / folder).exists():  # open questions have no options to be asked with
            continue
        answers = pd.read_parquet(run / folder / "answers.parquet")
        found[name] = answers[answers["run"] == 0].set_index("id")
    for name, answers in found.items():
        shares = 100 * answers.groupby(answers["group"].astype(str))["correct"].mean()
        theirs = ours.loc[shares.index, name].astype(float)
        close(theirs, shares, name, 0.0501)
    return ours.size


if __name__ == "__main__":
    print(compare(Path(sys.argv[1])))
