"""One bar over the steps of a study: its estimate is made of what was measured."""

import io

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
