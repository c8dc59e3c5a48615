"""The experiments name nets and configs that exist, and numbers that were published."""

import dataclasses
import re

import pytest

from resnet_jax.config import derive, load_config
from resnet_jax.errors import UserError
from resnet_jax.models import create_model
from resnet_jax.paper.entries import Published
from resnet_jax.paper.experiments import EXPERIMENTS, choose_runs, find_experiment
from resnet_jax.paper.settings import Setting, config_folder

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


def test_tables_2_and_3_are_the_papers():
    errors = {label: number.error for label, number in published("table2").items()}
    assert list(errors.values()) == [27.94, 28.54, 27.88, 25.03]
    errors = {label: number.error for label, number in published("table3").items()}
    assert errors["ResNet-34 C"] == 24.19
    assert errors["ResNet-152"] == 21.43


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
