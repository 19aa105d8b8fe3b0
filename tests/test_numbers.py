"""Numbers are printed alike everywhere: in figures, tables and pages, and by the explorer's script."""

import json
import shutil
import subprocess

import numpy as np
import pytest

from vlmneurons.look import numbers
from vlmneurons.look.pages import STATIC

HALVES = [sign * (n + 0.5) for n in range(9) for sign in (1, -1)]
"""Numbers that lie exactly between two whole ones; 12.5 is one in eight questions, in percent."""


def test_a_number_between_two_becomes_the_even_one_in_every_way_of_printing():
    assert [numbers.printed(value, 0) for value in (12.5, 13.5, -12.5, -13.5)] == ["12", "14", "−12", "−14"]
    assert [numbers.in_matrix(value, 0) for value in (12.5, 13.5, -12.5, -13.5)] == ["12", "14", "−12", "−14"]
    assert [numbers.significant(value, 2) for value in (12.5, 13.5, -12.5, 0.375)] == ["12", "14", "−12", "0.38"]
    assert [numbers.printed(value) for value in (6.25, 18.75, -6.25)] == ["6.2", "18.8", "−6.2"]
    assert [numbers.in_table(value) for value in (0.1875, 1.0625, -2.0)] == ["0.188", "1.062", "−2.000"]


def test_what_is_not_0_is_not_printed_as_0_and_what_is_not_there_as_a_dash():
    assert [numbers.printed(value) for value in (0.0, 0.04, -0.00012, 1e-17)] == ["0.0", "0.04", "−0.0001", "0.0"]
    for value in (np.nan, np.inf, None):
        assert numbers.printed(value) == "–"
    assert [numbers.significant(np.nan), numbers.in_table(np.nan), numbers.printed_p(np.nan)] == ["–"] * 3
    assert [numbers.in_matrix(value, 1) for value in (0.0, -0.04, np.nan)] == ["0", "0.0", ""]
    assert [numbers.printed_p(value) for value in (0.0004, 0.05)] == ["< 0.001", "0.050"]
    assert [numbers.printed_setting(value) for value in (0.0005, 0.1, 1 / 3)] == ["0.0005", "0.1", "0.3333333333333333"]


def test_significant_digits_are_those_of_pythons_g_without_powers_of_ten_in_between():
    generator = np.random.default_rng(0)
    for value in (generator.standard_normal(2000) * 10.0 ** generator.integers(-8, 3, 2000)).tolist():
        assert numbers.significant(value) == f"{value:.3g}".replace("1e+03", "1000").replace("-", "−")
    assert [numbers.significant(value) for value in (0, 1240.6, -987654.0)] == ["0", "1241", "−987654"]


@pytest.mark.skipif(shutil.which("node") is None, reason="runs the explorer's script in Node")
def test_the_explorers_script_prints_as_python_does_at_halves_and_everywhere():
    generator = np.random.default_rng(1)
    values = [0.0, -0.0, *HALVES, *(value / 2**power for value in HALVES for power in range(1, 12))]
    values += [n / 800 * 100 for n in range(-800, 801)]  # shares of questions, in percent
    values += (generator.standard_normal(4000) * 10.0 ** generator.integers(-9, 7, 4000)).tolist()
    values += [float(f"{value:.3g}") for value in values]
    calls = [("printed", digits) for digits in range(4)] + [("inMatrix", digits) for digits in range(3)]
    calls += [("significant", digits) for digits in (2, 3, 4)]
    head, end, _ = (STATIC / "explorer.js").read_text("utf-8").partition("// -- building pages")
    assert end
    script = (
        f"globalThis.window = {{}};\n{head}\nconst given = JSON.parse(require('fs').readFileSync(0, 'utf-8'));\n"
        "const calls = { printed, inMatrix, significant };\nconsole.log(JSON.stringify(given.calls.map(([name, digits])"
        " => given.values.map(value => calls[name](value, digits)))));"
    )
    given = json.dumps({"values": values, "calls": calls})
    done = subprocess.run(["node", "-e", script], input=given, capture_output=True, text=True, check=True)
    names = {"printed": numbers.printed, "inMatrix": numbers.in_matrix, "significant": numbers.significant}
    for (name, digits), texts in zip(calls, json.loads(done.stdout), strict=True):
        assert texts == [names[name](value, digits) for value in values], (name, digits)
