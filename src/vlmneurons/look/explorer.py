"""The explorer of a study: a folder of static files that opens from disk, without a server, and loads nothing else.

It starts at the matrix of effects; a cell opens the questions whose answers changed, a row the group's neurons as a
table, a neuron its pictures, words and tokens, at an address of its own. The page and its script lie in ``static/``;
what this module writes are the data, as scripts that the page loads view by view (a page opened from disk cannot
fetch).
"""

import itertools
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

from vlmneurons.checks import Keywords, as_path, as_whole, check_kind
from vlmneurons.errors import ArchitectureError, MismatchError, SelectionError
from vlmneurons.look.figures import natural
from vlmneurons.look.neuron_pages import InspectedItem, NeuronView, inspect_neurons
from vlmneurons.look.pages import STATIC, thumbnail
from vlmneurons.look.writes import neuron_writes
from vlmneurons.model.vlm import VLM
from vlmneurons.neurons.selection import Selection
from vlmneurons.neurons.sets import NeuronSet
from vlmneurons.neurons.sites import NeuronSpace
from vlmneurons.progress import Progress
from vlmneurons.questions.question import Question
from vlmneurons.questions.sets import QuestionSet
from vlmneurons.run.identity import setting_of_run
from vlmneurons.selectors import Selector
from vlmneurons.statistics.counts import ActivationStatistics
from vlmneurons.statistics.identity import setting_of
from vlmneurons.statistics.items import ItemStatistics
from vlmneurons.study.result import CONDITIONS, NOT_ASKED, KnockoutResult
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
    folder = as_path("folder", folder, MismatchError)
    check_kind("result", result, KnockoutResult, MismatchError, "a KnockoutResult, which knockout gives")
    check_kind("selections", selections, Mapping, MismatchError, "a Selection by each selector's name")
    for name in selections:
        result.rows_of(name)
    as_whole("strongest", strongest, MismatchError, least=0)
    as_whole("top", top, MismatchError, least=1)
    by_id = {item.id: item for item in questions}
    lacking = [name for name in result.ids if name not in by_id]
    if lacking:
        raise MismatchError(
            f"{len(lacking)} questions of the result are not among those given, such as {lacking[0]!r}: give the "
            "questions that the study evaluated on"
        )
    question_set = questions if isinstance(questions, QuestionSet) else QuestionSet(questions)
    evaluated = question_set.with_items(by_id[name] for name in result.ids)
    _check_asked_alike(result, evaluated, model)
    _make_room(folder)
    ranked = _ranked(selections, stats, items, selectors or {}, resamples)
    if model is not None and views is None and strongest:
        views = _inspect_strongest(model, evaluated, selections, ranked, strongest, batch_size, progress)
    if model is not None and writes is None:
        writes = _writes(model, selections)
    writer = _Writer(result, folder, evaluated, selections, ranked, images)
    writer.matrices()
    writer.answers()
    writer.neurons(stats, writes, {(str(view.site), view.number) for view in views or ()})
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


# -- neurons in their order --------------------------------------------------------------------------------------------

_Rows = dict[str, dict[str, pd.DataFrame]]
"""By selector and group the neurons in their order: ``index``, ``score``, ``stability``, ``groups``."""


def _ranked(
    selections: Mapping[str, Selection],
    stats: ActivationStatistics | None,
    items: ItemStatistics | None,
    selectors: Mapping[str, Selector],
    resamples: int,
) -> _Rows:
    """The neurons of every selection by their score, or by how often they fire for their group without one."""
    ranked: _Rows = {}
    for name, selection in selections.items():
        rule = selectors.get(name)
        rule = rule if rule is not None and rule.reads is ActivationStatistics else None
        counts = stats if stats is not None and stats.space == selection.space else None
        scores = rule.score(counts) if rule is not None and counts is not None else None
        stability = _stability(items, rule, selection, resamples) if items is not None and rule is not None else None
        n_groups = torch.zeros(len(selection.space), dtype=torch.int64)
        for neurons in selection.values():
            n_groups[neurons.indices] += 1
        ranked[name] = {}
        for group, neurons in selection.items():
            at = neurons.indices
            table = pd.DataFrame({"index": at.numpy(), "score": np.nan, "stability": np.nan, "groups": n_groups[at]})
            firing = np.zeros(len(at))
            if counts is not None and group in counts.groups:
                place = counts.index(group)
                firing = counts.probability[place, at].double().numpy()
                if scores is not None:
                    table["score"] = scores[place, at].double().numpy()
            if stability is not None:
                table["stability"] = stability[group][at].numpy()
            order = -table["score"].fillna(pd.Series(firing)).to_numpy()
            ranked[name][group] = table.iloc[np.argsort(order, kind="stable")].reset_index(drop=True)
    return ranked


def _stability(
    items: ItemStatistics, rule: Selector, selection: Selection, resamples: int
) -> dict[str, torch.Tensor] | None:
    """For each group the share of draws in which a neuron is chosen; None where there are too few pictures."""
    if items.space != selection.space:
        return None
    try:
        draws = list(resampled_selections(items, rule, balanced=True, resamples=resamples))
    except SelectionError:
        return None
    shares = {group: torch.zeros(len(items.space)) for group in selection}
    for draw in draws:
        for group in draw.keys() & shares.keys():
            shares[group][draw[group].indices] += 1 / len(draws)
    return shares


def _inspect_strongest(
    model: VLM,
    questions: QuestionSet,
    selections: Mapping[str, Selection],
    ranked: _Rows,
    strongest: int,
    batch_size: int,
    progress: Progress,
) -> list[NeuronView]:
    """One pass over the questions for the strongest neurons of every group."""
    wanted: dict[NeuronSpace, set[int]] = defaultdict(set)
    for name, groups in ranked.items():
        for table in groups.values():
            wanted[selections[name].space] |= set(table["index"][:strongest].tolist())
    options: Keywords = {"k": 4 * _EACH, "answers": False, "batch_size": batch_size, "progress": progress}
    return [
        view
        for space, indices in wanted.items()
        for view in inspect_neurons(model, questions, _of_language(space, indices), **options)
    ]


def _writes(model: VLM, selections: Mapping[str, Selection]) -> pd.DataFrame | None:
    """Tokens of every neuron; None for models whose path to the logits is another."""
    wanted: dict[NeuronSpace, set[int]] = defaultdict(set)
    for selection in selections.values():
        wanted[selection.space].update(*selection.values())
    try:
        tables = [neuron_writes(model, _of_language(space, indices)) for space, indices in wanted.items()]
    except ArchitectureError:
        return None
    return pd.concat(tables) if tables else None


def _of_language(space: NeuronSpace, indices: Iterable[int]) -> NeuronSet:
    """Those neurons that see words and pictures as tokens, and write into what the unembedding reads."""
    return NeuronSet(space, [index for index in sorted(indices) if space.locate(index)[0].tower == "language"])


# -- files -------------------------------------------------------------------------------------------------------------

_SHOWN = ("correct", "margin")
"""Values that the page has words and units for."""

_EACH = 2
"""Questions of a group that are shown of a neuron; four times as many are looked at, for some are of one picture."""


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
            result = self.result.select(selector)
            for condition, value in itertools.product(CONDITIONS, self.values):
                if not result.where(condition).ids:
                    continue
                table = result.effects(selector, value=value, condition=condition, permutations=0)
                matrices = {
                    name: table.pivot(index="mask", columns="group", values=name).reindex(masks, columns=self.groups)
                    for name in ("effect", "low", "high", "n", "units", "changed")
                }
                effect, low, high, *numbers = (matrix.to_numpy(dtype=float) for matrix in matrices.values())
                cell = {"effect": effect, "low": low, "high": high}
                cell = {name: [[_number(number) for number in row] for row in cell[name]] for name in cell}
                cells[f"{value} {condition}"] = {**cell, "n": np.nan_to_num(np.dstack(numbers)).astype(int).tolist()}
            self.put(f"matrix/{number}", {"masks": masks, "columns": self.groups, "cells": cells})

    def answers(self) -> None:
        """The questions of every group, and the answers that changed under every mask."""
        result, group_of = self.result, np.array([self.groups.index(group) for group in self.result.groups])
        place = np.zeros(len(result.ids), dtype=int)  # of a question among its group's
        for number in range(len(self.groups)):
            members = np.flatnonzero(group_of == number)
            place[members] = np.arange(len(members))
            self.put(f"questions/{number}", [self._question(n) for n in members.tolist()])
        for number, selector in enumerate(result.selectors):
            for at, group in enumerate(self.masks_of(selector)):
                changed: dict[int, list[list[object]]] = defaultdict(list)
                for row in result.rows_of(selector):
                    mask = result.masks[row - 1]
                    if mask.group != group:
                        continue
                    differs = (result.chosen[row] != result.chosen[0]) & (result.chosen[row] != NOT_ASKED)
                    for n in np.flatnonzero(differs).tolist():
                        answer = [int(place[n]), mask.repeat, int(result.chosen[row, n])]
                        changed[int(group_of[n])].append([*answer, _number(result.margins[row, n])])
                self.put(f"changed/{number}-{at}", changed)

    def _question(self, n: int) -> Keywords:
        item = self.questions[n]
        return {
            "id": item.id,
            "text": item.question,
            "options": list(item.options),
            "order": list(self.questions.order(item)),
            "answer": int(self.result.answers[n]),
            "clean": int(self.result.chosen[0, n]),
            "margin": _number(self.result.margins[0, n]),
            "pictures": self.thumbs_of(item),
        }

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
        selector_of = {name: n for n, name in enumerate(self.result.selectors)}
        for name, selection in self.selections.items():
            space, per_mille = selection.space, None
            if stats is not None and stats.space == space:
                rates = stats.probability.nan_to_num(0.0)[[stats.index(group) for group in _firing(stats)]]
                per_mille = (1000 * rates).round().to(torch.int32).numpy()
            for place, table in enumerate(self.ranked[name].values()):
                rows = []
                for rank, neuron in enumerate(cast(Any, table).itertuples(index=False), start=1):
                    site, number = space.locate(int(neuron.index))
                    key, at = (str(site), number), self._site_of[str(site)]
                    firing = None if per_mille is None else per_mille[:, neuron.index].tolist()
                    about = {"firing": firing, "chosen": [], "tokens": tokens.get(key), "shown": key in shown}
                    sites[at].setdefault(number, about)["chosen"].append([selector_of[name], place, rank])
                    rows.append(
                        {
                            "rank": rank,
                            "site": at,
                            "number": number,
                            "score": _number(neuron.score),
                            "stability": None if math.isnan(neuron.stability) else round(100 * neuron.stability),
                            "groups": int(neuron.groups),
                            "firing": firing,
                            "shown": int(key in shown),
                        }
                    )
                self.put(f"neurons/{selector_of[name]}-{place}", rows)
        for at, neurons in sites.items():
            # Each token stands once in a file, and neurons name its place: half as large.
            place = {}
            for about in neurons.values():
                about["tokens"] = about["tokens"] and [
                    [place.setdefault(token, len(place)) for token in direction] for direction in about["tokens"]
                ]
            self.put(f"sites/{at}", {"tokens": list(place), "neurons": neurons})

    def pages(self, views: Iterable[NeuronView], top: int) -> None:
        """The pictures and words of every neuron that has some."""
        for view in views:
            best: list[InspectedItem] = []
            number: Counter[object] = Counter()  # of questions of a group, and of a picture, that are shown
            for item in sorted(view.items, key=lambda item: -item.value):
                group, picture = item.question.group, ("picture", item.question.image_key)
                if math.isfinite(item.value) and number[group] < _EACH and not number[picture] and len(best) < top:
                    best.append(item)
                    number.update((group, picture))
            highest = max([item.value for item in best], default=1.0)
            items = [self._inspected(item, highest) for item in best]
            name = f"shown/{self._site_of[str(view.site)]}-{view.number}"
            self.put(name, {"items": items, "note": view.note, "each": _EACH})

    def _inspected(self, item: InspectedItem, highest: float) -> Keywords:
        """What is shown of a question of a neuron: neighbouring words that are not counted are one text."""
        words: list[list[Any]] = []
        for text, value, counted in item.words():
            if counted:
                words.append([text, _number(value, 3)])
            elif words and words[-1][1] is None:
                words[-1][0] += text
            else:
                words.append([text, None])
        thumbs = self.thumbs_of(item.question)
        maps = (_map(item, picture, highest) for picture in range(len(thumbs)))
        return {
            "id": item.question.id,
            "group": item.question.group,
            "value": _number(item.value),
            "words": words,
            "pictures": thumbs,
            "maps": [heat for heat in maps if heat is not None],
        }

    def page(self, title: str, main: str, stats: ActivationStatistics | None) -> Path:
        """What is true of all, and the page with its script and style; the page comes last."""
        result, about = self.result, self.result.provenance
        selectors = [{"name": name, "groups": [], "rule": ""} for name in result.selectors]
        for selector in selectors:
            if selection := self.selections.get(str(selector["name"])):
                selector |= {"groups": list(selection), "rule": selection.selector}
        self.put(
            "study",
            {
                "title": title,
                "about": f"{about.get('model', 'A model')}: {len(result.ids):,} questions of {len(self.groups)} "
                f"groups, {len(result.masks):,} masks, clean accuracy {100 * float(np.mean(result.correct[0])):.1f} %.",
                "selectors": selectors,
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


def _has(result: KnockoutResult, value: str) -> bool:
    try:
        return bool(np.isfinite(result.values(value)[1:]).any())
    except MismatchError:  # open questions have scores, and no margin; of infinite margins there are no effects
        return False


def _firing(stats: ActivationStatistics) -> list[str]:
    return sorted(stats.groups, key=natural)


def _number(value: float, digits: int = 9) -> float | None:
    """A number as JSON has it, with so many digits: enough that the page prints what Python would."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def _tokens(writes: pd.DataFrame | None) -> dict[tuple[str, int], list[list[str]]]:
    """By site and number the tokens that a neuron promotes and suppresses."""
    tokens: dict[tuple[str, int], list[list[str]]] = defaultdict(lambda: [[], []])
    if writes is not None:
        for site, number, direction, token in writes[["site", "neuron", "direction", "token"]].itertuples(index=False):
            tokens[site, number][int(direction == "suppresses")].append(token)
    return tokens


def _map(item: InspectedItem, picture: int, highest: float) -> Keywords | None:
    """A neuron's values over one picture, in steps of 63rds of the highest; None where there is no map."""
    patches = [patch for patch in item.patches or () if patch and (patch.picture, patch.view) == (picture, "picture")]
    if not patches:
        return None
    columns, rows = (min(_MAP, round(1 / min(patch.box[k + 2] - patch.box[k] for patch in patches))) for k in (0, 1))
    heat = item.heat(picture, size=(columns, rows))
    steps = np.rint(63 * np.clip(heat / max(highest, 1e-9), 0, 1)).ravel().tolist()
    values = [None if math.isnan(step) else int(step) for step in steps]
    return {"picture": picture, "columns": columns, "rows": rows, "values": values}
