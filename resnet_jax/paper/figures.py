"""Draws an experiment from what was measured of it."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from resnet_jax.analysis import plots
from resnet_jax.paper.entries import Experiment, Panel
from resnet_jax.paper.sections import Measured, Section, describe_scale


def draw(
    experiment: Experiment, section: Section, measured: Sequence[Measured]
) -> Figure | None:
    """The experiment's figure with what there is; None where there is nothing.

    Of runs that are not finished nothing is drawn.
    """
    present = {item.entry.label: item for item in measured if item.results}
    where = _where(section, measured) if experiment.trains else section.path.name
    title = f"{experiment.title}\n{where}"
    if experiment.figure == "train_and_test" and present:
        curves = [_curves(item) for item in present.values()]
        return plots.training_and_test_error(curves, title)
    if experiment.figure == "curves":
        return _error_curves(experiment, present, title)
    if experiment.figure == "depth":
        return _error_by_depth(experiment, present, title)
    if experiment.figure in ("responses", "gradients"):
        return _layers(experiment, section, measured, title)
    return None


def _where(section: Section, measured: Sequence[Measured]) -> str:
    """What the data and the length are, on every figure."""
    names = [result["data"] for item in measured for result in item.results]
    name = names[0] if names else section.path.name
    return f"{name}, {describe_scale(section.setting)}"


def family_of(label: str) -> str:
    """Of ``plots.FAMILIES``, by the label of an entry."""
    if label.startswith("plain"):
        return "plain"
    return "residual" if label.startswith("ResNet") else "other"


def _curves(item: Measured) -> plots.Curves:
    runs = [o.workdir.read_rows() for o in item.outcomes if o.result is not None]
    return plots.Curves(item.entry.label, runs, family_of(item.entry.label))


def _error_curves(
    experiment: Experiment, present: dict[str, Measured], title: str
) -> Figure | None:
    panels = {
        panel.title: [_curves(present[label]) for label in _drawn(panel, present)]
        for panel in experiment.panels
        if _drawn(panel, present)
    }
    return plots.error_curves(panels, title) if panels else None


def _error_by_depth(
    experiment: Experiment, present: dict[str, Measured], title: str
) -> Figure | None:
    families = [
        plots.Depths(
            panel.title,
            {
                int(label.rpartition("-")[2]): [
                    result["test_error"] for result in present[label].results
                ]
                for label in _drawn(panel, present)
            },
            family_of(panel.labels[0]),
        )
        for panel in experiment.panels
        if _drawn(panel, present)
    ]
    return plots.error_by_depth(families, title) if families else None


def _drawn(panel: Panel, present: dict[str, Measured]) -> list[str]:
    return [label for label in panel.labels if label in present]


def _layers(
    experiment: Experiment,
    section: Section,
    measured: Sequence[Measured],
    title: str,
) -> Figure | None:
    """The first seed that was analysed, of each entry."""
    assert experiment.analysis is not None
    by_label = {}
    for item in measured:
        run = item.entry.run
        if run is None:
            continue
        seeds = [outcome.seed for outcome in item.outcomes] or [0]
        analyses = (section.analysis(experiment.analysis, run, s) for s in seeds)
        found = next((analysis for analysis in analyses if analysis), None)
        if found:
            values = [value for _, value in found]
            label = item.entry.label
            by_label[label] = plots.Layers(label, values, family_of(label))
    if not by_label:
        return None
    if experiment.figure == "responses":
        return plots.layer_responses_figure(list(by_label.values()), title)
    panels = {
        panel.title: [
            plots.Layers(label.partition(", ")[2], by_label[label].values, family)
            for label, family in zip(panel.labels, plots.FAMILIES, strict=True)
            if label in by_label
        ]
        for panel in experiment.panels
    }
    return plots.gradient_norms_figure({k: v for k, v in panels.items() if v}, title)
