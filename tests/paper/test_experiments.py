"""The experiments name nets and configs that exist, and numbers that were published."""

import dataclasses
import re

import pytest

from resnet_jax.config import derive, load_config
from resnet_jax.config.files import config_folder
from resnet_jax.errors import UserError
from resnet_jax.models import blocks, create_model
from resnet_jax.paper.entries import Published
from resnet_jax.paper.experiments import (
    DETECTION,
    ELSEWHERE,
    EXPERIMENTS,
    choose_runs,
    find_experiment,
)
from resnet_jax.paper.settings import Setting

RUNS = [(e.name, run) for e in EXPERIMENTS.values() for run in e.runs()]


def test_a_name_is_one_run_everywhere():
    by_name = {}
    for experiment, run in RUNS:
        assert by_name.setdefault(run.name, run) == run, (experiment, run.name)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_run_has_a_config_of_its_own(name):
    configs = {}
    for run in EXPERIMENTS[name].runs():
        config = Setting().config(run)
        create_model(config.model.name)
        assert configs.setdefault(config, run.name) == run.name
    labels = [entry.label for entry in EXPERIMENTS[name].entries]
    assert len(set(labels)) == len(labels)
    drawn = [label for panel in EXPERIMENTS[name].panels for label in panel.labels]
    assert set(drawn) <= set(labels)


def published(name):
    return {e.label: e.published for e in EXPERIMENTS[name].entries if e.published}


def test_table_6_is_the_papers():
    # He et al. 2015, Table 6.
    errors = {label: number.error for label, number in published("table6").items()}
    assert errors == {
        "Maxout": 9.38,
        "NIN": 8.81,
        "DSN": 8.22,
        "FitNet, 19 layers": 8.39,
        "Highway, 19 layers": 7.54,
        "Highway, 32 layers": 8.80,
        "ResNet-20": 8.75,
        "ResNet-32": 7.51,
        "ResNet-44": 7.17,
        "ResNet-56": 6.97,
        "ResNet-110": 6.43,
        "ResNet-1202": 7.93,
    }
    assert str(published("table6")["ResNet-110"]) == "6.43 (6.61 \u00b1 0.16)"
    assert str(Published(8.75)) == "8.75"
    seeds = {run.name: run.seeds for run in EXPERIMENTS["table6"].runs()}
    assert seeds["cifar_resnet110"] == 5


def test_tables_2_to_5_are_the_papers():
    # He et al. 2015: top-1 and top-5 errors.
    errors = {
        name: [
            (label, number.error, number.top5)
            for label, number in published(name).items()
        ]
        for name in ("table2", "table3", "table4", "table5")
    }
    assert errors["table2"] == [
        ("plain-18", 27.94, None),
        ("plain-34", 28.54, None),
        ("ResNet-18", 27.88, None),
        ("ResNet-34", 25.03, None),
    ]
    assert errors["table3"] == [
        ("VGG-16", 28.07, 9.33),
        ("GoogLeNet", None, 9.15),
        ("PReLU-net", 24.27, 7.38),
        ("plain-34", 28.54, 10.02),
        ("ResNet-34 A", 25.03, 7.76),
        ("ResNet-34 B", 24.52, 7.46),
        ("ResNet-34 C", 24.19, 7.40),
        ("ResNet-50", 22.85, 6.71),
        ("ResNet-101", 21.75, 6.05),
        ("ResNet-152", 21.43, 5.71),
    ]
    assert errors["table4"] == [
        ("VGG-16", None, 8.43),
        ("GoogLeNet", None, 7.89),
        ("VGG v5", 24.4, 7.1),
        ("PReLU-net", 21.59, 5.71),
        ("BN-inception", 21.99, 5.81),
        ("ResNet-34 B", 21.84, 5.71),
        ("ResNet-34 C", 21.53, 5.60),
        ("ResNet-50", 20.74, 5.25),
        ("ResNet-101", 19.87, 4.60),
        ("ResNet-152", 19.38, 4.49),
    ]
    top5 = [number for _, _, number in errors["table5"]]
    table5 = EXPERIMENTS["table5"]
    nets = {run.name: table5.seeds_of(run) for run in table5.runs()}
    assert (sum(nets.values()), nets["resnet152_v1"]) == (6, 2)
    assert top5 == [7.32, 6.66, 6.8, 4.94, 4.82, 3.57]
    assert {error for _, error, _ in errors["table5"]} == {None}


def test_other_shortcuts_are_the_follow_ups():
    # He et al. 2016, Table 1.
    shown = {
        label: str(number) for label, number in published("shortcut_variants").items()
    }
    assert shown == {
        "identity": "6.61",
        "scaled by 0.5": "(above 20 %)",
        "both scaled by 0.5": "12.35",
        "exclusive gate, bias 0": "(above 20 %)",
        "exclusive gate, bias -6": "8.70",
        "exclusive gate, bias -7": "9.81",
        "gate on the shortcut alone, bias 0": "12.86",
        "gate on the shortcut alone, bias -6": "6.91",
        "1x1 convolution": "12.22",
        "dropout 0.5": "(above 20 %)",
    }


def test_a_note_stands_beside_the_number_it_explains():
    number = Published(top5=3.57, note="six models")
    assert (str(number), number.top5_text) == ("", "3.57 (six models)")
    number = Published(24.4, top5=7.1, note="one net")
    assert (str(number), number.top5_text) == ("24.40 (one net)", "7.10")
    number = Published(note="above 20 %")
    assert (str(number), number.top5_text) == ("(above 20 %)", "")


CIFAR_RUNS = {run.name: run for _, run in RUNS if run.config.startswith("cifar10.py")}


@pytest.mark.parametrize("name", CIFAR_RUNS)
def test_train_and_paper_run_train_a_net_alike(name):
    """The experiments change the net alone; its recipe is the config file's."""
    run = CIFAR_RUNS[name]
    assert {field.split(".")[0] for field in run.overrides} <= {"model"}
    trained = load_config(str(config_folder() / run.config), run.overrides)
    config = Setting().config(run)
    for field in ("evaluation", "checkpoint"):  # only how often
        assert dataclasses.replace(getattr(config, field), every_steps=None) == getattr(
            trained, field
        )
        config = dataclasses.replace(config, **{field: getattr(trained, field)})
    assert config == trained


@pytest.mark.parametrize("name", CIFAR_RUNS)
def test_the_recipe_is_64k_steps_and_published_depths_warm_up(name):
    config = Setting().config(CIFAR_RUNS[name])
    derived = derive(config, 50_000)
    assert (derived.steps, derived.boundaries) == (64_000, (32_000, 48_000))
    layers = re.search("[0-9]+", config.model.name)[0]
    schedule = config.schedule
    assert (schedule.warmup_learning_rate, schedule.warmup_until_error) == (
        (0.01, 0.8) if layers in ("110", "164", "1001") else (None, None)
    )


def test_blocks_of_any_length_have_equal_depth():
    # Six convolutions a stage.
    for run in EXPERIMENTS["block_convs"].runs()[1:]:
        config = Setting().config(run)
        net = create_model(config.model.name)
        assert set(net.stage_sizes) == {6 // (config.model.block_convs or 2)}
    for run in EXPERIMENTS["wide_convs"].runs():
        config = Setting().config(run)
        net = create_model(config.model.name)
        assert set(net.stage_sizes) == {12 // config.model.block_convs}


def test_wrong_names_are_refused():
    with pytest.raises(
        UserError, match=r"unknown experiment 'tabel6'; did you mean table6"
    ):
        find_experiment("tabel6")
    experiment = find_experiment("table6")
    with pytest.raises(UserError, match=r"table6 has no run 'resnet20'; did you mean"):
        choose_runs(experiment, ["resnet20"])
    chosen = choose_runs(experiment, ["cifar_plain20", "cifar_resnet20"])
    assert [run.name for run in chosen] == ["cifar_resnet20", "cifar_plain20"]


def test_every_table_and_figure_of_the_paper_is_listed():
    listed = {
        match.group()
        for experiment in EXPERIMENTS.values()
        if experiment.source == "He et al. 2015"
        and (match := re.match(r"(Table|Figure) [0-9]+", experiment.title))
    }
    listed |= {table.title.split(":")[0] for table in DETECTION.values()}
    listed |= set(ELSEWHERE)
    figures, tables = range(1, 8), range(1, 15)
    assert listed == {f"Figure {n}" for n in figures} | {f"Table {n}" for n in tables}
    for where in ELSEWHERE.values():
        if where.startswith("resnet-jax summary "):
            for name in where.removesuffix(" --blocks").split()[2:]:
                create_model(name)
    assert hasattr(blocks, ELSEWHERE["Figure 2"].split()[0])
