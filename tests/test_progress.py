"""One bar over the steps of a study: its estimate is made of what was measured."""

import contextlib
import io
import logging

import pytest

from vlmneurons import progress
from vlmneurons.progress import Step, Steps, progress_bar


class Clock:
    """A clock that is told the time."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def study(**how) -> Steps:
    steps = [Step("record", 10, forwards=1.0), Step("mask", 100, forwards=0.5), Step("report", 1, seconds=30.0)]
    return Steps(steps, **how)


def test_what_is_left_is_guessed_from_the_speed_that_was_measured(clock):
    steps = study(disable=True)
    assert steps.left() is None  # nothing is known yet, and nothing is made up
    assert steps.share() == 0.0
    record = progress_bar(steps["record"], 10, unit="item")
    clock.now += 8
    record.update(4)
    assert steps.per_forward() == 2.0
    assert steps.left() == 6 * 2.0 + 100 * 0.5 * 2.0 + 30.0
    clock.now += 12
    record.update(6)
    record.finish()
    assert steps.left() == 130.0
    assert steps.share() == pytest.approx(20 / 150)


def test_a_steps_own_speed_takes_the_place_of_the_guess(clock):
    steps = study(disable=True)
    record = steps["record"].start(10)
    clock.now += 20
    record.update(10)
    record.finish()
    masks = progress_bar(steps["mask"], 400, unit="answer")  # more than were planned
    clock.now += 1
    masks.update(8)
    assert steps.left() == pytest.approx(392 * 0.5 * 21 / 14 + 30)  # after a second nothing can be told of it alone
    clock.now += 9
    masks.update(32)
    assert steps.left() == pytest.approx(360 * 10 / 40 + 30)
    clock.now += 90
    masks.update(360)
    masks.finish()
    report = steps["report"].start(1)
    assert steps.left() == 30.0
    report.finish()
    assert steps.left() == 0.0
    assert steps.share() == 1.0


def test_what_was_done_in_an_earlier_session_says_nothing_of_the_speed(clock):
    steps = study(disable=True)
    steps["record"].finish()  # its files were whole
    masks = progress_bar(steps["mask"], 100, initial=60, unit="answer")
    assert steps.left() is None
    clock.now += 4
    masks.update(10)
    assert steps.left() == pytest.approx(30 * 0.4 + 30)


def test_the_bar_names_the_step_and_the_time(clock, monkeypatch):
    written = io.StringIO()
    monkeypatch.setattr("sys.stderr", written)
    with study() as steps:
        record = progress_bar(steps["record"], 10, unit="item")
        clock.now += 65
        record.update(5)
    line = written.getvalue().split("\r")[-1]
    assert line.startswith("record:  ")
    assert "| 5/10 items, 01:05 gone, about 12:25 left" in line  # 5 + 50 forwards of 13 s, and 30 s
    assert written.getvalue().count("\n") == 1  # one bar


def test_one_loop_has_a_bar_of_its_own_or_none(capsys):
    with progress_bar(False, 3) as bar:
        bar.update(3)
    assert capsys.readouterr().err == ""
    with progress_bar(True, 3, unit="item") as bar:
        bar.update(3)
    assert "3/3" in capsys.readouterr().err


@pytest.mark.parametrize("several", [False, True])
def test_lines_of_the_log_stand_above_the_bar_and_not_in_it(monkeypatch, several):
    written = io.StringIO()
    monkeypatch.setattr("sys.stderr", written)
    logger, handler = logging.getLogger("vlmneurons"), logging.StreamHandler(written)
    handler.setFormatter(logging.Formatter("says %(message)s"))
    logger.addHandler(handler)
    try:
        with Steps([Step("record", 3)]) if several else progress_bar(True, 3, unit="item", mininterval=0) as bar:
            if several:
                bar = progress_bar(bar["record"], 3, unit="item")
            for number in range(3):
                bar.update(1)
                logger.warning("line %d", number)
        logger.warning("the end")
    finally:
        assert handler in logger.handlers  # it is the user's own again
        logger.removeHandler(handler)
    lines = written.getvalue().split("\n")
    for number in range(3):
        (line,) = [line for line in lines if f"line {number}" in line]
        assert line.split("\r")[-1] == f"says line {number}"  # the bar before it was wiped out
    assert "says the end" in lines
    name, last = ("record: ", "3/3 items") if several else ("items: ", "3/3")
    assert any(line.split("\r")[-1].startswith(name) and last in line.split("\r")[-1] for line in lines)


def test_a_bar_without_a_name_is_called_by_its_unit_and_ends_at_its_last_count_when_it_is_left_early(capsys):
    with contextlib.suppress(KeyboardInterrupt), progress_bar(True, 9, unit="answer", mininterval=1000) as bar:
        bar.update(4)
        raise KeyboardInterrupt
    last = capsys.readouterr().err.split("\r")[-1]
    assert last.startswith("answers:  44%")
    assert "4/9" in last
