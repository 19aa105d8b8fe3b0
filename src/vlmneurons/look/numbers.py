"""How a number is printed: the one place for figures, tables, pages and the explorer.

Every function rounds to the nearest decimal, and a number that lies exactly between two to the even one: 12.5 becomes
12, and 13.5 becomes 14. The explorer prints by the functions at the head of ``static/explorer.js``, which have the same
names and give the same texts; a test compares them.
"""

import math
import re

import numpy as np

MISSING = "–"
"""What stands where there is no number."""


def with_minus(text: str) -> str:
    """A printed number with the minus sign of typography, which is as wide as a plus.

    Args:
        text: a number, with hyphens.
    """
    return text.replace("-", "−")


def printed(value: float | None, digits: int = 1) -> str:
    """An effect with so many decimals, or as many as it takes not to be 0 where it is not.

    Args:
        value: of an effect, in its unit.
        digits: decimals.
    """
    if value is None or not np.isfinite(value):
        return MISSING
    value = round(float(value), 9)  # means of shares that cancel each other leave 1e-17
    text = f"{value:.{digits}f}"
    if float(text) == 0:
        text = _shortest(value, 1) if value else f"{0:.{digits}f}"
    return with_minus(text)


def _shortest(value: float, digits: int) -> str:
    """A number with so many digits, and all before the point, without zeros at the end of its decimals."""
    exponent = math.floor(math.log10(abs(value))) if value else 0
    text = f"{value + 0.0:.{max(digits - 1 - exponent, 0)}f}"  # adding 0 takes its sign from −0
    return text.rstrip("0").rstrip(".") if "." in text else text


def printed_p(value: float) -> str:
    """A p-value.

    Args:
        value: from 0 to 1.
    """
    if not np.isfinite(value):
        return MISSING
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def in_matrix(value: float, digits: int) -> str:
    """A number in a cell of a heat map: nothing where nothing was asked, and 0 without decimals where it is exactly 0.

    Args:
        value: as drawn; NaN where nothing was asked.
        digits: decimals.
    """
    text = "" if np.isnan(value) else f"{value:.{digits}f}"
    return f"{0:.{digits if value else 0}f}" if text and float(text) == 0 else with_minus(text)


def significant(value: float, digits: int = 3) -> str:
    """A number with so many digits, and all that it has before the point; below 0.0001 with a power of ten.

    Args:
        value: NaN where there is none, such as the value of a token that did not reach an expert.
        digits: of which none is a leading 0; zeros at the end of decimals are left out.
    """
    if not np.isfinite(value):
        return MISSING
    return with_minus(_shortest(value, digits) if not value or abs(value) >= 1e-4 else f"{value:.{digits}g}")


def in_table(value: object) -> str:
    """A cell of a table: a number has three decimals, and a small one three digits that are not leading zeros.

    Args:
        value: of a table, with numbers as such or as they are printed.
    """
    if not isinstance(value, float | np.floating):
        return re.sub(r"^-(?=[\d.]+(e-?\d+)?$)", "−", str(value))
    if value and abs(value) < 0.1:
        return significant(float(value))
    return with_minus(f"{value:.3f}") if np.isfinite(value) else MISSING


def printed_setting(value: float) -> str:
    """A setting of a sweep, such as 0.0005, with all its digits.

    Args:
        value: a number.
    """
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value))
