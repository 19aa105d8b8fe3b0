"""The explorer of a study: a folder of static files that opens from disk, without a server, and loads nothing else.

It starts at the matrix of effects; a cell opens the questions whose answers changed, a row the group's neurons as a
table, a neuron its pictures, words and tokens, at an address of its own. The page and its script lie in ``static/``;
what this module writes are the data, as scripts that the page loads view by view (a page opened from disk cannot
fetch).
"""

import json
import math
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch

from vlmneurons.checks import Keywords, of_kind, path_of, whole
from vlmneurons.errors import ArchitectureError, MismatchError, SelectionError
from vlmneurons.look.figures import natural
from vlmneurons.look.neuron_pages import InspectedItem, NeuronView, inspect_neurons
from vlmneurons.look.pages import STATIC, thumbnail
from vlmneurons.look.writes import neuron_writes
from vlmneurons.model.vlm import VLM
from vlmneurons.neurons.selection import Selection
from vlmneurons.neurons.sets import NeuronSet
from vlmneurons.progress import Progress
from vlmneurons.questions.question import Question
from vlmneurons.questions.sets import QuestionSet
from vlmneurons.run.identity import setting_of_run
from vlmneurons.selectors import Selector
from vlmneurons.statistics.counts import ActivationStatistics
from vlmneurons.statistics.identity import setting_of
from vlmneurons.statistics.items import ItemStatistics
from vlmneurons.study.result import CONDITIONS, KnockoutResult
from vlmneurons.trust.resampling import resampled_selections

_MARK = 'content="vlmneurons explorer"'
_MAP = 32
"""Rows and columns of a map, at most."""


def write_explorer(
    result: KnockoutResult,
    folder: str | Path,
    questions: QuestionSet | Sequence[Question],
    selections: Mapping[str, Selection],
    *,
    model: VLM | None = None,
    stats: ActivationStatistics | None = None,
    items: ItemStatistics | None = None,
    selectors: Mapping[str, Selector] | None = None,
    main: str | None = None,
    strongest: int = 50,
    top: int = 6,
    images: bool = True,
    views: Sequence[NeuronView] | None = None,
    writes: pd.DataFrame | None = None,
    resamples: int = 20,
    title: str = "Knockout study",
    batch_size: int = 8,
    progress: Progress = False,
) -> Path:
    """Write the explorer of a study.

    Args:
        result: the study.
        folder: a new one, an empty one, or an explorer's, which is replaced.
        questions: those of the result, with their texts and pictures; further ones are left out.
        selections: the neurons of each selector of the result, by its name there. Others have a matrix only.
        model: the result's, which sees the questions once more for maps, words and tokens; without it, and without
            ``views`` and ``writes``, pages of neurons have none.
        stats: how often neurons fire, by group, as selected from; rows of neurons show it, and scores are of it.
        items: the recording, for stability: the share of ``resamples`` draws of its pictures in which a neuron is
            chosen.
        selectors: the rules, by the same names; without them there is no score and no stability, and neurons are
            ranked by how often they fire for their group.
        main: the selector whose matrix is shown first; by default the first that has a selection.
        strongest: neurons of each group and selector that have pictures and words.
        top: questions shown of such a neuron, at most two of a group, each of another picture.
        images: keep thumbnails; False for pictures that may not be shared.
        views: of `inspect_neurons`, if they are at hand.
        writes: of `neuron_writes`, if it is at hand.
        resamples: draws for the stability.
        title: stands above the page.
        batch_size: questions a forward.
        progress: show a progress bar.

    Returns:
        The path of the page.

    Raises:
        MismatchError: questions of the result that are not among ``questions``, or are asked in another way than they
            were; another model; selections of other names; or a folder that holds something else.
    """
    folder = path_of("folder", folder, MismatchError)
    of_kind("result", result, KnockoutResult, MismatchError, "a KnockoutResult, which knockout gives")
    of_kind("selections", selections, Mapping, MismatchError, "a Selection by each selector's name")
    for name in selections:
        result.rows_of(name)
    whole("strongest", strongest, MismatchError, least=0)
    whole("top", top, MismatchError, least=1)
    by_id = {item.id: item for item in questions}
    lacking = [name for name in result.ids if name not in by_id]
    if lacking:
        raise MismatchError(
            f"{len(lacking)} questions of the result are not among those given, such as {lacking[0]!r}: give the "
            "questions that the study evaluated on"
        )
    whole_set = questions if isinstance(questions, QuestionSet) else QuestionSet(questions)
    own = whole_set.with_items(by_id[name] for name in result.ids)
    _check_asked_alike(result, own, model)
    _make_room(folder)
    ranked = _ranked(selections, stats, items, selectors or {}, resamples)
    if model is not None and views is None and strongest:
        views = _seen(model, own, selections, ranked, strongest, batch_size, progress)
    if model is not None and writes is None:
        writes = _written(model, selections)
    writer = _Writer(result, folder, own, selections, ranked, images)
    writer.matrices()
    writer.answers()
    writer.neurons(stats, writes, {(str(one.site), one.number) for one in views or ()})
    writer.pages(views or (), top)
    main = main or next(iter([*selections, *result.selectors]))
    if main not in result.selectors:
        raise MismatchError(f"main={main!r} has no masks here; there are {', '.join(result.selectors)}")
    return writer.page(title, main, stats)


def _check_asked_alike(result: KnockoutResult, questions: QuestionSet, model: VLM | None) -> None:
    """Refuse to show what a model makes of questions beside answers of another one, or to other prompts."""
    about = result.provenance
    if "shuffle" in about and about["shuffle"] != questions.shuffle:
        raise MismatchError(
            f"the study showed options in the order of shuffle={about['shuffle']}, and these questions have "
            f"shuffle={questions.shuffle}: give them as the study had them, questions.asked(shuffle={about['shuffle']})"
        )
    then = setting_of(about) if model is not None and "setting" in about else None
    if model is None or then is None:
        return
    now = setting_of_run(model, questions=questions)
    differs = [*replace(then, answer="", engine=now.engine, tokens="").differences(replace(now, answer=""))]
    if differs:
        raise MismatchError(
            f"what neurons do now is not shown beside answers given otherwise: {'; '.join(differs[:3])}. Give the "
            "study's model, and its questions as they were asked (QuestionSet.asked changes how)"
        )


def _make_room(folder: Path) -> None:
    """Empty a folder that holds an explorer, and refuse one that holds something else."""
    page = folder / "index.html"
    if folder.exists() and any(folder.iterdir()):
        if not page.exists() or _MARK not in page.read_text(encoding="utf-8", errors="replace"):
            raise MismatchError(f"{folder} holds something else than an explorer: give a folder of its own")
        page.unlink()  # a folder whose writing is stopped has no page
        for name in ("data", "thumbs"):
            shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("data", "thumbs"):
        (folder / name).mkdir(parents=True, exist_ok=True)


# -- what is known of neurons ------------------------------------------------------------------------------------------

_Rows = dict[str, dict[str, pd.DataFrame]]
"""By selector and group the neurons in their order: ``index``, ``score``, ``stability``, ``groups``."""


def _ranked(
    selections: Mapping[str, Selection],
    stats: ActivationStatistics | None,
    items: ItemStatistics | None,
    selectors: Mapping[str, Selector],
    resamples: int,
) -> _Rows:
    found: _Rows = {}
    for name, selection in selections.items():
        rule = selectors.get(name)
        counted = stats if stats is not None and stats.space == selection.space else None
        scores = rule.score(counted) if rule is not None and counted is not None and _reads_counts(rule) else None
        often = _drawn(items, rule, selection, resamples) if items is not None and rule is not None else None
        several = torch.zeros(len(selection.space), dtype=torch.int64)
        for neurons in selection.values():
            several[neurons.indices] += 1
        found[name] = {}
        for group, neurons in selection.items():
            at = neurons.indices
            known = counted is not None and group in counted.groups
            place = counted.index(group) if counted is not None and known else 0
            table = pd.DataFrame({"index": at.numpy(), "groups": several[at].numpy()})
            fires = counted.probability[place, at] if counted is not None and known else torch.zeros(len(at))
            table["score"] = scores[place, at].double().numpy() if scores is not None and known else np.nan
            table["stability"] = often[group][at].numpy() if often is not None else np.nan
            order = table["score"].fillna(pd.Series(fires.double().numpy()))
            found[name][group] = table.iloc[np.argsort(-order.to_numpy(), kind="stable")].reset_index(drop=True)
    return found


def _reads_counts(rule: Selector) -> bool:
    return rule.reads is ActivationStatistics


def _drawn(items: ItemStatistics, rule: Selector, selection: Selection, resamples: int) -> Keywords | None:
    """For each group the share of draws in which a neuron is chosen; None where there are too few pictures."""
    if items.space != selection.space or not _reads_counts(rule):
        return None
    try:
        draws = list(resampled_selections(items, rule, balanced=True, resamples=resamples))
    except SelectionError:
        return None
    often = {group: torch.zeros(len(items.space)) for group in selection}
    for draw in draws:
        for group in often:
            if group in draw:
                often[group][draw[group].indices] += 1 / len(draws)
    return often


def _seen(
    model: VLM,
    questions: QuestionSet,
    selections: Mapping[str, Selection],
    ranked: _Rows,
    strongest: int,
    batch_size: int,
    progress: Progress,
) -> list[NeuronView]:
    """One pass over the questions for the strongest neurons of every group."""
    wanted: dict[Any, set[int]] = defaultdict(set)
    for name, groups in ranked.items():
        for table in groups.values():
            wanted[selections[name].space] |= set(table["index"][:strongest].tolist())
    views: list[NeuronView] = []
    for space, indices in wanted.items():
        language = [n for n in sorted(indices) if space.locate(n)[0].tower == "language"]
        how: Keywords = {"k": 4 * _EACH, "answers": False, "batch_size": batch_size, "progress": progress}
        views += inspect_neurons(model, questions, NeuronSet(space, language), **how)
    return views


def _written(model: VLM, selections: Mapping[str, Selection]) -> pd.DataFrame | None:
    """Tokens of every neuron; None for models whose path to the logits is another."""
    tables = []
    for space in dict.fromkeys(selection.space for selection in selections.values()):
        own = [neurons for one in selections.values() if one.space == space for neurons in one.values()]
        indices = sorted({n for neurons in own for n in neurons if space.locate(n)[0].tower == "language"})
        try:
            tables.append(neuron_writes(model, NeuronSet(space, indices)))
        except ArchitectureError:
            return None
    return pd.concat(tables) if tables else None


# -- files -------------------------------------------------------------------------------------------------------------


class _Writer:
    """Writes the data of an explorer, file by file."""

    def __init__(
        self,
        result: KnockoutResult,
        folder: Path,
        questions: QuestionSet,
        selections: Mapping[str, Selection],
        ranked: _Rows,
        images: bool,
    ) -> None:
        self.result, self.folder, self.questions = result, folder, questions
        self.selections, self.ranked, self.images = selections, ranked, images
        self.groups = [*sorted(result.group_names, key=natural), *result.control_names]
        spaces = dict.fromkeys(selection.space for selection in selections.values())
        self.sites = [str(site) for site in dict.fromkeys(site for space in spaces for site in space.sites)]
        self._site_of = {name: n for n, name in enumerate(self.sites)}
        self.values = [value for value in _SHOWN if _has(result, value)]
        self._thumbs: dict[object, list[int]] = {}
        self._n_thumbs = 0

    def put(self, name: str, data: object) -> None:
        """One file of data."""
        path = self.folder / "data" / f"{name}.js"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        path.write_text(f"vn({json.dumps(name)},{text});\n", encoding="utf-8", errors="replace")

    def masks_of(self, selector: str) -> list[str]:
        """Names of a selector's masks: those of the questions' groups first."""
        names = {mask.group for mask in self.result.masks if mask.selector == selector}
        return [*(group for group in self.groups if group in names), *sorted(names - set(self.groups), key=natural)]

    def matrices(self) -> None:
        """Every selector's effects, by value and condition."""
        for number, selector in enumerate(self.result.selectors):
            masks, cells = self.masks_of(selector), {}
            shape = (len(masks), len(self.groups))
            part = self.result.select(selector)
            for condition in CONDITIONS:
                if not part.where(condition).ids:
                    continue
                for value in self.values:
                    table = part.effects(selector, value=value, condition=condition, permutations=0)
                    kept: Keywords = {name: np.full(shape, None, dtype=object) for name in _CELL}
                    counts = np.zeros((*shape, 3), dtype=int)
                    rows = table["mask"].map(masks.index).to_numpy(), table["group"].map(self.groups.index).to_numpy()
                    for name in _CELL:
                        kept[name][rows] = [_number(one) for one in table[name]]
                    counts[rows] = table[["n", "units", "changed"]].to_numpy(dtype=int)
                    cells[f"{value} {condition}"] = {name: one.tolist() for name, one in kept.items()} | {
                        "n": counts.tolist()
                    }
            self.put(f"matrix/{number}", {"masks": masks, "columns": self.groups, "cells": cells})

    def answers(self) -> None:
        """The questions of every group, and the answers that changed under every mask."""
        result, place, of = self.result, np.zeros(len(self.result.ids), dtype=int), np.array(self.result.groups)
        for number, group in enumerate(self.groups):
            members = np.flatnonzero(of == group)
            place[members] = np.arange(len(members))
            rows = []
            for n in members.tolist():
                item = self.questions[n]
                rows.append(
                    {
                        "id": item.id,
                        "text": item.question,
                        "options": list(item.options),
                        "order": list(self.questions.order(item)),
                        "answer": int(result.answers[n]),
                        "clean": int(result.chosen[0, n]),
                        "margin": _number(result.margins[0, n]),
                        "pictures": self.thumbs_of(item),
                    }
                )
            self.put(f"questions/{number}", rows)
        group_of = np.array([self.groups.index(group) for group in of])
        for number, selector in enumerate(result.selectors):
            for at, mask in enumerate(self.masks_of(selector)):
                found: dict[int, list[list[object]]] = defaultdict(list)
                for row in result.rows_of(selector):
                    if result.masks[row - 1].group != mask:
                        continue
                    met = result.chosen[row] != result.chosen[0]
                    if result.asked is not None:
                        met &= result.asked[row]
                    for n in np.flatnonzero(met).tolist():
                        after = _number(result.margins[row, n])
                        one = [int(place[n]), result.masks[row - 1].repeat, int(result.chosen[row, n]), after]
                        found[int(group_of[n])].append(one)
                self.put(f"changed/{number}-{at}", found)

    def thumbs_of(self, item: Question) -> list[int]:
        """Numbers of the thumbnails of a question's pictures, which questions of one picture share."""
        if not self.images or not item.n_images:
            return []
        key = (item.image_key, item.n_images)
        if key not in self._thumbs:
            numbers = []
            for picture in item.load_images():
                (self.folder / "thumbs" / f"{self._n_thumbs}.webp").write_bytes(thumbnail(picture))
                numbers.append(self._n_thumbs)
                self._n_thumbs += 1
            self._thumbs[key] = numbers
        return self._thumbs[key]

    def neurons(
        self, stats: ActivationStatistics | None, writes: pd.DataFrame | None, shown: set[tuple[str, int]]
    ) -> None:
        """The table of every group, and what is known of every neuron, by site."""
        tokens = _tokens(writes)
        sites: dict[int, dict[int, Keywords]] = defaultdict(dict)
        numbers = {name: n for n, name in enumerate(self.result.selectors)}
        for name, selection in self.selections.items():
            space, offsets = selection.space, np.array(selection.space.offsets)
            fires = None
            if stats is not None and stats.space == space:
                rates = stats.probability.nan_to_num(0.0)[[stats.index(group) for group in _firing(stats)]]
                fires = (1000 * rates).round().to(torch.int32).numpy()
            for place, table in enumerate(self.ranked[name].values()):
                at = np.searchsorted(offsets, table["index"].to_numpy(), side="right") - 1
                rows = []
                for rank, one in enumerate(cast(Any, table).itertuples(index=False), start=1):
                    site = str(space.sites[at[rank - 1]])
                    key = (site, int(one.index - offsets[at[rank - 1]]))
                    firing = None if fires is None else fires[:, one.index].tolist()
                    number = self._site_of[site]
                    about = sites[number].setdefault(
                        key[1], {"firing": firing, "chosen": [], "tokens": tokens.get(key), "shown": key in shown}
                    )
                    about["chosen"].append([numbers[name], place, rank])
                    rows.append(
                        {
                            "rank": rank,
                            "site": number,
                            "number": key[1],
                            "score": _number(one.score),
                            "stability": None if math.isnan(one.stability) else round(100 * one.stability),
                            "groups": int(one.groups),
                            "firing": firing,
                            "shown": int(key in shown),
                        }
                    )
                self.put(f"neurons/{numbers[name]}-{place}", rows)
        for number, known in sites.items():
            # Each token stands once in a file, and neurons name its place: half as large.
            place = {token: n for n, token in enumerate(dict.fromkeys(_all_tokens(known.values())))}
            for about in known.values():
                about["tokens"] = about["tokens"] and [[place[token] for token in way] for way in about["tokens"]]
            self.put(f"sites/{number}", {"tokens": list(place), "neurons": known})

    def pages(self, views: Iterable[NeuronView], top: int) -> None:
        """The pictures and words of every neuron that has some."""
        for view in views:
            best: list[InspectedItem] = []
            seen: Counter[Any] = Counter()
            for one in sorted(view.items, key=lambda one: -one.value):
                group, picture = one.question.group, ("picture", one.question.image_key)
                if math.isfinite(one.value) and seen[group] < _EACH and not seen[picture] and len(best) < top:
                    best.append(one)
                    seen.update((group, picture))
            highest = max([one.value for one in best], default=1.0)
            shown = [self._shown(one, highest) for one in best]
            name = f"shown/{self._site_of[str(view.site)]}-{view.number}"
            self.put(name, {"items": shown, "note": view.note, "each": _EACH})

    def _shown(self, item: InspectedItem, highest: float) -> Keywords:
        words: list[list[Any]] = []
        for text, value, counted in item.words():
            if counted:
                words.append([text, _number(value, 3)])
            elif words and words[-1][1] is None:
                words[-1][0] += text
            else:
                words.append([text, None])
        thumbs = self.thumbs_of(item.question)
        maps = [_map(item, picture, highest) for picture in range(len(thumbs))] if item.patches else []
        return {
            "id": item.question.id,
            "group": item.question.group,
            "value": _number(item.value),
            "words": words,
            "pictures": thumbs,
            "maps": [one for one in maps if one is not None],
        }

    def page(self, title: str, main: str, stats: ActivationStatistics | None) -> Path:
        """What is true of all, and the page with its script and style; the page comes last."""
        result, about = self.result, self.result.provenance
        listed = []
        for name in result.selectors:
            selection = self.selections.get(name)
            groups = [] if selection is None else list(selection)
            listed.append({"name": name, "groups": groups, "rule": "" if selection is None else selection.selector})
        self.put(
            "study",
            {
                "title": title,
                "about": f"{about.get('model', 'A model')}: {len(result.ids):,} questions of {len(self.groups)} "
                f"groups, {len(result.masks):,} masks, clean accuracy {100 * float(np.mean(result.correct[0])):.1f} %.",
                "selectors": listed,
                "main": main,
                "groups": self.groups,
                "values": self.values,
                "sites": self.sites,
                "layers": [int(name.split(".")[2]) for name in self.sites],
                "firing": [] if stats is None else _firing(stats),
                "images": self.images,
            },
        )
        for name in ("style.css", "explorer.js", "index.html"):
            shutil.copyfile(STATIC / name, self.folder / name)
        return self.folder / "index.html"


_SHOWN = ("correct", "margin")
"""Values that the page has words and units for."""


def _has(result: KnockoutResult, value: str) -> bool:
    try:
        return bool(np.isfinite(result.values(value)[1:]).any())
    except MismatchError:  # open questions have scores, and no margin
        return False


_EACH = 2
"""Questions of a group that are shown of a neuron; four times as many are looked at, for some are of one picture."""

_CELL = ("effect", "low", "high")


def _firing(stats: ActivationStatistics) -> list[str]:
    return sorted(stats.groups, key=natural)


def _number(value: Any, digits: int = 9) -> float | None:
    """A number as JSON has it, with so many digits."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def _tokens(writes: pd.DataFrame | None) -> dict[tuple[str, int], list[list[str]]]:
    """By site and number the tokens that a neuron promotes and suppresses."""
    found: dict[tuple[str, int], list[list[str]]] = {}
    if writes is not None:
        for site, number, direction, token in writes[["site", "neuron", "direction", "token"]].itertuples(index=False):
            found.setdefault((site, number), [[], []])[int(direction == "suppresses")].append(token)
    return found


def _all_tokens(known: Iterable[Keywords]) -> Iterable[str]:
    return (token for about in known for way in about["tokens"] or () for token in way)


def _map(item: InspectedItem, picture: int, highest: float) -> Keywords | None:
    """A neuron's values over one picture, in steps of 63rds of the highest; None where there is no map."""
    own = [one for one in item.patches or () if one is not None and (one.picture, one.view) == (picture, "picture")]
    if not own:
        return None
    columns, rows = (min(_MAP, round(1 / min(one.box[k + 2] - one.box[k] for one in own))) for k in (0, 1))
    heat = item.heat(picture, size=(columns, rows))
    steps = np.rint(63 * np.clip(heat / max(highest, 1e-9), 0, 1)).ravel().tolist()
    values = [None if math.isnan(one) else int(one) for one in steps]
    return {"picture": picture, "columns": columns, "rows": rows, "values": values}
