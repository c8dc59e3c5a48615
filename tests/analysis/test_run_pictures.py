"""The pictures of a run's report against scikit-learn and a plain sort."""

import re
import shutil

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix

import resnet_jax
from resnet_jax.analysis import run_pictures
from resnet_jax.analysis.evaluation_page import mistake_parts
from resnet_jax.evaluation.evaluate import evaluate
from resnet_jax.evaluation.figures import MOST_MISTAKES
from resnet_jax.training import report as reports
from tests.conftest import make_console, make_tiny_config, write_image_folder


@pytest.fixture(scope="module")
def finished(tfds_dir, tmp_path_factory):
    """A run on the digits: its workdir, and its probabilities on the test set."""
    workdir = tmp_path_factory.mktemp("pictures") / "run"
    config = make_tiny_config(tfds_dir)
    config.training.steps, config.evaluation.every_steps = 30, 30
    resnet_jax.train(config, workdir, make_console())
    net = resnet_jax.load_net(workdir)
    test = net.run.dataset.test
    images, labels, _ = test.arrays(2)
    pixels = (images / np.float32(255) - net.statistics.mean) / net.statistics.std
    logits = np.float64(net.model.apply(net.variables, pixels))
    shares = np.exp(logits - logits.max(1, keepdims=True))
    return workdir, shares / shares.sum(1, keepdims=True), labels, images


def test_counts_are_those_of_scikit_learn(finished, console):
    workdir, shares, labels, _ = finished
    found = evaluate(workdir, console=console)
    expected = confusion_matrix(labels, shares.argmax(1))
    matrix = np.zeros((10, 10), int)
    for label, predicted, count in found["confusion"]:
        matrix[label, predicted] = count
    np.testing.assert_array_equal(matrix, expected)
    for label, name in enumerate(found["class_names"]):
        own = expected[label]
        errors = own.sum() - own[label]
        assert found["classes"][name] == {"errors": errors, "count": own.sum()}


def test_the_worst_mistakes_are_those_of_a_plain_sort(finished, console):
    workdir, shares, labels, images = finished
    pictures = {}
    found = evaluate(workdir, on_mistake=pictures.__setitem__, console=console)
    wrong = [i for i in range(360) if shares[i].argmax() != labels[i]]
    worst = sorted(wrong, key=lambda i: -shares[i].max())[:MOST_MISTAKES]
    assert len(worst) == MOST_MISTAKES
    assert [mistake["index"] for mistake in found["mistakes"]] == worst
    for mistake in found["mistakes"]:
        index = mistake["index"]
        assert mistake["class"] == str(labels[index])
        assert mistake["predicted"] == str(shares[index].argmax())
        assert mistake["probability"] == pytest.approx(shares[index].max(), rel=1e-4)
        np.testing.assert_array_equal(pictures[index], images[index])
    page = (workdir / "report.html").read_text()
    captions = re.findall(r"<figcaption>right: (\d)\npredicted: (\d)\n(.*) %<", page)
    rows = "\n".join(mistake_parts(found))  # without the pictures
    assert all(f"<td>{m['name']}</td>" in rows for m in found["mistakes"])
    assert captions == [
        (m["class"], m["predicted"], f"{100 * m['probability']:.1f}")
        for m in found["mistakes"]
    ]


def test_the_config_is_folded_but_for_what_differs(finished):
    page = (finished[0] / "report.html").read_text()
    shown, _, folded = page.partition("<details>")
    for name, is_shown in (
        ("training.steps", True),
        ("augmentation.pad", True),
        ("optimizer.momentum", False),
    ):
        assert (f"<th>{name}</th>" in shown) == is_shown
        assert (f"<th>{name}</th>" in folded) != is_shown


def test_many_classes_have_no_matrix():
    names = [f"class {i}" for i in range(61)]
    found = {
        "mistakes": [],
        "confusion": [(0, 0, 5), (0, 60, 2), (7, 7, 1)],
        "class_names": names,
        "classes": {names[0]: {"errors": 2, "count": 7}},
    }
    page = "\n".join(mistake_parts(found))
    assert "<svg" not in page
    assert "drawn for at most 60 classes; these data have 61" in page
    assert "<td>class 60</td>" in page


@pytest.fixture
def folder_run(tmp_path):
    """A run on a folder of images, which may disappear."""
    data = write_image_folder(tmp_path / "data", per_class={"train": 12, "test": 2})
    config = make_tiny_config("unused")
    config.data.path, config.training.steps = str(data), 2
    return config, data, tmp_path / "run"


def test_without_the_data_the_report_keeps_its_pictures_or_has_its_curves(
    folder_run, console
):
    config, data, workdir = folder_run
    resnet_jax.train(config, workdir, make_console())
    shutil.rmtree(data)
    resnet_jax.report(workdir, console=make_console())
    assert "<img" in (workdir / "report.html").read_text()
    (workdir / "report.html").unlink()
    resnet_jax.report(workdir, console=console)
    printed = console.file.getvalue()
    assert printed.count("warning: no new pictures for the report: ") == 1
    page = (workdir / "report.html").read_text()
    assert "<img" not in page
    assert f"resnet-jax report --workdir {workdir}" in page
    assert page.count("<svg") == 1


def test_a_large_test_set_is_not_tested_again(folder_run, monkeypatch):
    config, _, workdir = folder_run
    config.data.resident_mib = 0

    def never(*_, **__):
        raise AssertionError("it was tested again")

    monkeypatch.setattr(run_pictures, "evaluate_nets", never)
    resnet_jax.train(config, workdir, make_console())
    page = (workdir / "report.html").read_text()
    assert page.count("<img") == 32
    assert f"resnet-jax evaluate --workdir {workdir} --html" in page


@pytest.mark.parametrize("fault", [KeyboardInterrupt, MemoryError("no\nroom")])
def test_a_fault_of_a_picture_costs_no_result(folder_run, monkeypatch, console, fault):
    config, _, workdir = folder_run

    def fail(*_):
        assert (workdir / "result.json").exists()
        raise fault

    monkeypatch.setattr(reports, "run_pictures", fail)
    result = resnet_jax.train(config, workdir, console)
    assert result["step"] == 2
    lines = console.file.getvalue().splitlines()
    reason = "interrupted" if fault is KeyboardInterrupt else "no"
    assert lines[-1] == f"warning: no new pictures for the report: {reason}"
    assert (workdir / "report.html").read_text().count("<svg") == 1
