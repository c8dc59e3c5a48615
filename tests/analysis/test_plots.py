import io
import os
import re

import pytest

from resnet_jax.analysis import plots
from resnet_jax.analysis.plots import training_curves
from resnet_jax.errors import UserError


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


NO_FORMULA = r"a $x_{$ \$ $\frac$ \x1b[31m"


def figures_with(text):
    """Every kind of figure, with a text wherever a text is drawn."""
    run = [row(10, 0.1, 0.5, test_error=0.3, test_loss=1.0)]
    curves, layers = [plots.Curves(text, [run])], [plots.Layers(text, [1.0, 2.0])]
    yield training_curves(run, text)
    yield plots.training_and_test_error(curves, text)
    yield plots.error_curves({text: curves}, text)
    yield plots.layer_responses_figure(layers, text)
    yield plots.gradient_norms_figure({text: layers}, text)
    yield plots.error_by_depth([plots.Depths(text, {20: [0.1]})], text)
    yield plots.error_by_setting({text: [0.1]}, text)


@pytest.mark.parametrize("index", range(7))
def test_text_is_drawn_as_it_is(monkeypatch, index):
    """Not as a formula between dollars; SVG shows which text is drawn."""
    import matplotlib as mpl

    monkeypatch.setitem(mpl.rcParams, "svg.fonttype", "none")

    def texts(text):
        file = io.StringIO()
        list(figures_with(text))[index].savefig(file, format="svg")
        return re.findall(r"<text[^>]*>([^<]*)</text>", file.getvalue())

    expected = [text.replace("plain", "@") for text in texts("plain")]
    assert any("@" in text for text in expected)
    drawn = NO_FORMULA.replace("\x1b", r"\x1b")
    assert [text.replace(drawn, "@") for text in texts(NO_FORMULA)] == expected


def test_a_picture_that_cannot_be_written_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    for name, sentence in (
        ("folder.png", "is no file"),
        ("pipe.png", "is no file"),
        ("file/a.png", "cannot be written"),
        ("a.jpeg2", r"must end in \.png, \.svg or \.pdf"),
        ("a" * 300 + ".png", "File name too long"),
        (".", "must end in"),
    ):
        with pytest.raises(UserError, match=sentence):
            plots.check_file(tmp_path / name)
    with pytest.raises(UserError, match="must not be empty"):
        plots.check_file("")
    figure = training_curves([row(10, 0.1, 0.5)], "")
    file = plots.save(figure, tmp_path / "new" / "a.PNG")
    assert file.read_bytes()[:4] == b"\x89PNG"
    assert list(file.parent.iterdir()) == [file]
