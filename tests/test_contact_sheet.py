"""Every figure in print: no label is cut off, lies on another or is too small, and PDFs hold no font of Type 3.

Here with the fonts that matplotlib brings; ``.ci/browser`` draws the whole sheet, with names in four scripts.
"""

import pytest
from matplotlib.figure import Figure

import vlmneurons as vn
from tools.contact_sheet import NAMES, WIDTHS, a_result, a_summary, drawn_texts, faults, figures, measured
from vlmneurons.errors import MismatchError


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("number", [8, 25])
def test_no_figure_has_a_fault_in_print(width, number, tmp_path):
    groups = NAMES["Latin"].split(", ")[-number:]
    for name, draw in figures(groups, width):
        figure = draw()
        assert figure.get_size_inches()[0] == width
        assert faults(figure, tmp_path / "figure.pdf") == [], name
        if number == 8:
            assert min(text.get_fontsize() for text, _ in drawn_texts(figure)) >= 7, name


def test_what_is_measured_is_told_in_a_row(tmp_path, capsys):
    def wrong() -> Figure:
        figure = Figure(figsize=(2, 1))
        figure.text(0.1, 0.3, "small", fontsize=5)
        return figure

    row, pictures = measured([("wrong", wrong)], tmp_path, "one")
    assert (row["figures"], row["wrong"], row["smallest pt"]) == (1, 1, 5)
    assert "Type" in str(row["fonts"])
    assert [name for name, _ in pictures] == ["one-wrong"]
    assert "one-wrong: text of 5 pt in the PDF" in capsys.readouterr().out


def test_faults_are_found(tmp_path):
    figure = Figure(figsize=(2, 1))
    figure.text(0.9, 0.5, "beyond the edge", fontsize=8)
    figure.text(0.1, 0.3, "one", fontsize=8)
    figure.text(0.12, 0.3, "two", fontsize=4)
    found = " ".join(faults(figure, tmp_path / "figure.pdf"))
    assert "'beyond the edge' is cut off" in found
    assert "'one' lies on 'two'" in found
    assert "text of 4 pt in the PDF" in found
    assert "a font of Type" in found  # matplotlib's own figures have Type 3 unless told otherwise


GROUPS = ["G10", "G2", "G1", "G33"]


def rows(axis):
    return [label.get_text() for label in axis.get_yticklabels()]


def drawings(**how):
    result = a_result(GROUPS)
    accuracy = {"as asked": dict.fromkeys(GROUPS, 0.5), "blind": {"G1": 0.2, "G2": 0.9, "G10": 0.2, "G33": 0.9}}
    return {
        "effects": vn.plot_effects(a_summary(GROUPS, "group"), "group", **how),
        "random": vn.plot_random(result, "CAS", ["random"], **how),
        "accuracy": vn.plot_accuracy(accuracy, **how),
    }


def test_groups_stand_in_the_order_given_or_clustered():
    for name, figure in drawings().items():
        assert rows(figure.axes[0]) == (GROUPS if name == "effects" else ["G1", "G2", "G10", "G33"]), name
    wanted = ["G33", "G1", "G2", "G10"]
    for name, figure in drawings(order=wanted).items():
        assert rows(figure.axes[0]) == wanted, name
    clustered = rows(drawings(order="clustered")["accuracy"].axes[0])
    assert {frozenset(clustered[:2]), frozenset(clustered[2:])} == {frozenset({"G1", "G10"}), frozenset({"G2", "G33"})}
    with pytest.raises(MismatchError, match="order has each group once; it lacks G33"):
        drawings(order=["G1", "G2", "G10"])


def test_points_keep_their_group_in_any_order():
    summary = a_summary(GROUPS, "group").set_index("group")
    for order in (None, ["G33", "G1", "G2", "G10"]):
        axis = drawings(order=order)["effects"].axes[0]
        (line,) = [one for one in axis.containers if one.get_label().startswith("Self")]
        found = dict(zip(rows(axis), line[0].get_xdata(), strict=True))
        assert found == pytest.approx((100 * summary["self_effect"]).to_dict())


def test_every_panel_is_drawn_into_given_axes():
    result = a_result(GROUPS)
    for draw in (
        lambda ax: vn.plot_effects(a_summary(GROUPS, "group"), "group", ax=ax),
        lambda ax: vn.plot_flips(result, ax=ax),
        lambda ax: vn.plot_depth(result, ["CAS"], ax=ax),
        lambda ax: vn.plot_random(result, "CAS", ["random"], ax=ax),
        lambda ax: vn.plot_accuracy({"as asked": dict.fromkeys(GROUPS, 0.5)}, ax=ax),
    ):
        figure = Figure(figsize=(9, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        assert draw(right) is figure
        assert right.get_legend() is not None
        assert len(right.lines) + len(right.collections) + len(right.patches) > 0
        assert not left.lines
        assert len(figure.axes) == 2
    with pytest.raises(MismatchError, match="width is that of a new figure, and ax has a figure"):
        vn.plot_flips(result, ax=Figure().subplots(), width=3.3)


def test_more_selectors_than_colours_are_all_drawn_and_unknown_ones_are_refused():
    result = a_result(GROUPS)
    with pytest.raises(MismatchError, match="there is no selector 'LAP' here; there are CAS, MAD, random"):
        vn.plot_depth(result, ["LAP"])
    with pytest.raises(MismatchError, match="there is no selector 'nobody' here"):
        vn.plot_random(result, "CAS", ["nobody"])
    assert len(vn.plot_depth(result).axes[0].lines) == 4  # three, and the uniform share
