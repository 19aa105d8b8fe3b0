"""The arithmetic of the demo's tables."""

import numpy as np

from tools.demo.catalogue import CULTURES
from tools.demo.tables import Effects

GROUPS = np.repeat(np.arange(len(CULTURES)), 4)


def effects(change, things):
    """Effects of four questions a culture, on so many pictured things each."""
    pictures = [np.split(np.flatnonzero(index == GROUPS), things) for index in range(len(CULTURES))]
    return Effects(change, GROUPS, pictures)


def test_intervals_resample_all_questions_about_a_thing_together():
    change = np.random.default_rng(0).normal(size=(2, len(CULTURES), len(GROUPS)))
    for interval in effects(change, 1).intervals():  # one thing a culture: nothing varies between resamples
        np.testing.assert_allclose(interval[0], interval[1])
    widths = {
        things: [np.ptp(interval, axis=0).mean() for interval in effects(change, things).intervals()]
        for things in (2, 4)
    }
    assert all(width > 0 for pair in widths.values() for width in pair)


def test_intervals_of_questions_that_agree_within_a_thing_are_as_wide_as_its_few_things_make_them():
    # Own effects -1 for one thing and 0 for the other: a culture's mean is -1, -1/2 or 0 with chances 1/4, 1/2, 1/4.
    change = np.zeros((2, len(CULTURES), len(GROUPS)))
    for index in range(len(CULTURES)):
        change[:, index, np.flatnonzero(index == GROUPS)[:2]] = -1
    own, cross = effects(change, 2).intervals()
    # The mean of eight such has variance (1/8) / 8: a deviation of 1/8, in steps of 1/16.
    np.testing.assert_allclose(own[0], -0.5 - 0.25, atol=1 / 16)
    np.testing.assert_allclose(own[1], -0.5 + 0.25, atol=1 / 16)
    np.testing.assert_array_equal(cross, 0)
    alone = effects(change, 4).intervals()[0]
    assert (np.ptp(alone, axis=0) < np.ptp(own, axis=0)).all()  # as if independent: too narrow
