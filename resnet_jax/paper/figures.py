"""Draws an experiment's figure from its measurements."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from resnet_jax.analysis import plots
from resnet_jax.paper.entries import Experiment
from resnet_jax.paper.sections import Measured, Section


def draw(
    experiment: Experiment, section: Section, measured: Sequence[Measured]
) -> Figure | None:
    """The experiment's figure, with its finished runs; None if there are none."""
    if experiment.figure is None:
        return None
    results = [result for item in measured for result in item.results]
    where = section.path.name
    if experiment.trains:
        where = f"{results[0]['data'] if results else where}, {section.describe()}"
    title = f"{experiment.title}\n{where}"
    if experiment.figure in ("responses", "gradients"):
        return _layers(experiment, section, measured, title)
    present = {item.entry.label: item for item in measured if item.results}
    panels = _with_news(
        {
            panel.title: [present[label] for label in panel.labels if label in present]
            for panel in experiment.panels
        }
    )
    if not panels:
        return None
    if experiment.figure == "depth":
        return plots.error_by_depth(
            [_depths(*panel) for panel in panels.items()], title
        )
    curves = {name: [_curves(item) for item in panels[name]] for name in panels}
    if experiment.figure == "curves":
        return plots.error_curves(curves, title)
    return plots.training_and_test_error(curves[""], title)


def _with_news(
    panels: Mapping[str, Sequence[Measured]],
) -> dict[str, Sequence[Measured]]:
    """The panels that have a line which no earlier panel has."""
    kept: dict[str, Sequence[Measured]] = {}
    drawn: set[str] = set()
    for title, items in panels.items():
        labels = {item.entry.label for item in items}
        if labels - drawn:
            kept[title] = items
            drawn |= labels
    return kept


def _family(label: str) -> str:
    """One of ``plots.FAMILIES``, by a row's label."""
    if label.startswith("plain"):
        return "plain"
    return "residual" if label.startswith("ResNet") else "other"


def _curves(item: Measured) -> plots.Curves:
    runs = [o.workdir.read_rows() for o in item.outcomes if o.result is not None]
    return plots.Curves(item.entry.label, runs, _family(item.entry.label))


def _depths(title: str, items: Sequence[Measured]) -> plots.Depths:
    errors = {
        int(item.entry.label.rpartition("-")[2]): [
            r["test_error"] for r in item.results
        ]
        for item in items
    }
    return plots.Depths(title, errors, _family(items[0].entry.label))


def _layers(
    experiment: Experiment, section: Section, measured: Sequence[Measured], title: str
) -> Figure | None:
    """A figure of layers, with each row that was analysed."""
    values = {
        item.entry.label: [value for _, value in layers]
        for item in measured
        if (layers := section.layers(str(experiment.analysis), item))
    }
    if not values:
        return None
    if experiment.figure == "responses":
        nets = [plots.Layers(label, values[label], _family(label)) for label in values]
        return plots.layer_responses_figure(nets, title)
    panels = {
        panel.title: [
            plots.Layers(label.partition(", ")[2], values[label], family)
            for label, family in zip(panel.labels, plots.FAMILIES, strict=True)
            if label in values
        ]
        for panel in experiment.panels
    }
    return plots.gradient_norms_figure({k: v for k, v in panels.items() if v}, title)
