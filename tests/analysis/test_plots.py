from resnet_jax.analysis.plots import training_curves


def row(step, rate, train_error, **evaluated):
    return {
        "step": step,
        "learning_rate": rate,
        "train_error": train_error,
        "train_loss": 2 * train_error,
        **evaluated,
    }


def lines_of(axes):
    return {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}


def test_curves_show_errors_in_percent_where_they_were_measured():
    rows = [
        row(10, 0.1, 0.5),
        row(20, 0.1, 0.25, test_error=0.3, test_loss=1.0),
        row(30, 0.01, 0.0625, test_error=0.125, test_loss=0.5),
    ]
    figure = training_curves(rows, "a title")
    errors, losses = figure.axes
    assert lines_of(errors)["train"] == [[10, 50], [20, 25], [30, 6.25]]
    assert lines_of(errors)["test"] == [[20, 30], [30, 12.5]]
    assert lines_of(losses)["test"] == [[20, 1.0], [30, 0.5]]
    assert "holdout" not in lines_of(errors)


def falls(rates):
    figure = training_curves(
        [row(step, rate, 0.5) for step, rate in enumerate(rates)], ""
    )
    return [
        data[0][0]
        for label, data in lines_of(figure.axes[0]).items()
        if label.startswith("_")
    ]


def test_a_fall_of_a_constant_rate_is_marked_and_a_cosine_is_not():
    assert falls([0.1, 0.1, 0.01, 0.01, 0.001]) == [2, 4]
    assert falls([0.1, 0.08, 0.03, 0.01, 0.0]) == []
