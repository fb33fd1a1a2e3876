"""The verdict of a comparison: on how many metrics a method beats all controls, and where a control is better."""

from dataclasses import replace

from blocksight.jobs.evaluate.bootstrap import MethodEstimate
from blocksight.jobs.evaluate.compare import Cell, Column, Comparison, Method
from blocksight.jobs.evaluate.verdict import NO_CONTROLS, verdicts

METRICS = ("insertion", "deletion", "drop")


def table(**means):
    """A comparison of methods by their means of `METRICS`; an interval reaches 0.01 to both sides."""
    methods = tuple(Method(name, name, "p", "out", "eager") for name in means)
    columns = tuple(Column(metric, "hash") for metric in METRICS)
    cells = tuple(
        Cell(
            place,
            column,
            MethodEstimate(mean, mean and mean - 0.01, mean and mean + 0.01, 5 if mean else 0),
            None,
            None,
        )
        for place, own in enumerate(means.values())
        for column, mean in zip(columns, own, strict=True)
    )
    return Comparison(methods, columns, cells)


def test_a_method_that_beats_all_controls_is_said_once():
    found = verdicts(table(gradcam=(0.5, 0.1, 20), random=(0.4, 0.2, 30), edges=(0.3, 0.3, 40)))
    assert found == ("gradcam beats all controls on 3 of 3 metrics",)


def test_each_metric_on_which_a_control_is_better_is_said_with_both_means():
    """Lower deletion and drop are better, and higher insertion: the best of one control is not the best of all."""
    found = verdicts(table(gradcam=(0.21, 0.1, 20), random=(0.25, 0.2, 30), edges=(0.215, 0.3, 10)))
    assert found == (
        "gradcam beats all controls on 1 of 3 metrics",
        "gradcam is worse than random and edges on insertion: 0.21 against 0.25 and 0.215 "
        "(higher is better; the intervals overlap)",
        "gradcam is worse than edges on drop: 20 against 10 (lower is better)",
    )


def test_doubt_is_that_of_the_table_of_differences():
    """Paired on the same maps, a difference is sure where intervals overlap: the two must not say different things."""

    def against(p_value):
        made = table(gradcam=(0.21, 0.1, 20), random=(0.215, 0.2, 30))
        cells = [replace(cell, corrected_p=p_value if cell.method else None) for cell in made.cells]
        return verdicts(replace(made, cells=tuple(cells)))[1]

    assert against(0.01) == "gradcam is worse than random on insertion: 0.21 against 0.215 (higher is better)"
    assert against(0.05).endswith("(higher is better; the difference may be chance)")


def test_an_equal_mean_is_neither_better_nor_worse():
    assert verdicts(table(gradcam=(0.5, 0.1, 20), random=(0.5, 0.2, 30))) == (
        "gradcam beats all controls on 2 of 3 metrics",
    )


def test_metrics_that_no_control_has_do_not_count_and_each_method_has_its_verdict():
    found = verdicts(table(gradcam=(0.5, 0.1, 20), sise=(0.1, None, 1), random=(0.4, None, None)))
    assert found == (
        "gradcam beats all controls on 1 of 1 metric",
        "sise beats all controls on 0 of 1 metric",
        "sise is worse than random on insertion: 0.1 against 0.4 (higher is better)",
    )


def test_without_a_control_the_command_that_measures_them_is_named():
    assert verdicts(table(gradcam=(0.5, 0.1, 20))) == (NO_CONTROLS,)
    assert verdicts(table(random=(0.5, 0.1, 20))) == ()
