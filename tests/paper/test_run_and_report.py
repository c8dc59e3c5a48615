import dataclasses
import json
import re
import shutil

import cv2
import jax
import numpy as np
import pytest
from flax import linen as nn

from resnet_jax.cli import main
from resnet_jax.errors import Preempted, UserError
from resnet_jax.evaluation.nets import load_net
from resnet_jax.paper.experiments import EXPERIMENTS
from resnet_jax.paper.figures import draw
from resnet_jax.paper.report import report
from resnet_jax.paper.run import run_experiment
from resnet_jax.paper.sections import Section
from resnet_jax.paper.settings import Setting
from resnet_jax.training.train import train_one
from resnet_jax.workdir import Workdir
from tests.conftest import make_console
from tests.test_run_files import RESULT, ROW


@pytest.fixture(scope="module")
def setting(tfds_dir):
    """Four steps of a net of 8 layers, whatever the experiment's."""
    overrides = {
        "data.data_dir": tfds_dir,
        "model.name": "cifar_plain8",
        "training.steps": "4",
        "training.global_batch_size": "16",
        "schedule.boundaries_steps": "(2, 3)",
    }
    return Setting("digits", "tiny", overrides)


@pytest.fixture(scope="module")
def finished(setting, tmp_path_factory):
    """plain-20 of Figure 1 with two seeds, and no plain-56."""
    folder = tmp_path_factory.mktemp("paper")
    console = make_console()
    run_experiment(
        "figure1",
        folder,
        only=["cifar_plain20"],
        seeds=2,
        setting=setting,
        console=console,
    )
    return folder, console.file.getvalue()


def test_runs_lie_where_experiments_share_them(finished):
    folder, printed = finished
    run = folder / "digits-tiny" / "cifar_plain20"
    errors = []
    for seed in (0, 1):
        result = json.loads((run / f"seed-{seed}" / "result.json").read_text())
        assert (result["seed"], result["step"]) == (seed, 4)
        errors.append(result["test_error"])
    assert "[2/2] digits-tiny/cifar_plain20/seed-1" in printed


def test_other_data_have_a_table_of_their_own(finished):
    folder, _ = finished
    report(folder, figures=folder / "figures", console=make_console())
    text = (folder / "report.md").read_text()
    results = [
        json.loads(file.read_text())["test_error"]
        for file in sorted(folder.glob("digits-tiny/cifar_plain20/*/result.json"))
    ]
    mean = sum(results) / 2
    deviation = (sum((x - mean) ** 2 for x in results)) ** 0.5
    row = next(x for x in text.splitlines() if x.startswith("| plain-20 |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:4] == [
        "plain-20",
        f"{100 * mean:.2f}",
        f"{100 * deviation:.2f}",
        "2",
    ]
    assert cells[5:7] == ["last, step 4", "digits"]
    assert "#### Measured on digits, 4 steps" in text
    assert "| plain-56 |" not in text
    assert "not measured: plain-56" in text
    assert "data.name=digits (published: cifar10)" in text
    assert "model.name=cifar_plain8 (published: cifar_plain20)" in text
    assert "1/1000 of the full length" in text
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 1
    assert not re.search(r"""(src|href)=["']?http""", page)
    assert (folder / "figures" / "digits-tiny-figure1.png").stat().st_size > 1000


def pretend(folder, setting, name, label, seed=0, **result):
    """A finished run of a table's row, made up; returns what its config says."""
    experiment = EXPERIMENTS[name]
    run = next(entry.run for entry in experiment.entries if entry.label == label)
    config = dataclasses.replace(setting.config(run), seed=seed)
    section = folder / setting.section(config)
    Section.note(section, setting, name)
    workdir = Workdir(section / run.name / f"seed-{seed}")
    workdir.create()
    workdir.write_config(config, "resnet-jax paper run")
    where = {"devices": "8 x TPU", "cpu": "a CPU", "cpu_cores": 2}
    about = {"step": 64_000, "data": config.data.name, "environment": where}
    workdir.write_rows([ROW | {"step": 64_000}])
    workdir.write_result(RESULT | about | result)


def table_of(folder, number=0):
    """The rows of a table in report.md, as cells; the first is its header."""
    report(folder, console=make_console())
    tables = re.findall(r"(?:^\|.*\n)+", (folder / "report.md").read_text(), re.M)
    lines = tables[number].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [rows[0], *rows[2:]]


def test_the_report_sets_measured_beside_published(tmp_path):
    published = Setting()
    for seed, error in enumerate((0.0875, 0.0925)):
        pretend(tmp_path, published, "table6", "ResNet-20", seed, test_error=error)
    pretend(tmp_path, published, "table6", "plain-32", test_error=0.12)
    header, *rows = table_of(tmp_path)
    assert header[:5] == ["", "published (%)", "measured (%)", "deviation", "n"]
    shown = {row[0]: row[1:5] for row in rows}
    assert shown == {
        "Maxout": ["9.38", "", "", ""],
        "NIN": ["8.81", "", "", ""],
        "DSN": ["8.22", "", "", ""],
        "FitNet, 19 layers": ["8.39", "", "", ""],
        "ResNet-20": ["8.75", "9.00", "0.35", "2"],
        "plain-32": ["", "12.00", "", "1"],
    }
    text = (tmp_path / "report.md").read_text()
    assert "Measured on" not in text
    assert "not measured: Highway, 19 layers, Highway, 32 layers, ResNet-32" in text


@pytest.mark.parametrize(
    ("setting", "title"),
    [
        (Setting("cifar100"), "cifar100, 64,000 steps"),
        (Setting("/data/mine"), "mine, 64,000 steps"),
        (Setting(None, "small"), "cifar10, 640 steps"),
        (Setting(None, "paper", {"training.steps": "48000"}), "cifar10, 48,000 steps"),
    ],
)
def test_no_published_error_stands_beside_another_measurement(setting, title, tmp_path):
    pretend(tmp_path, setting, "table6", "ResNet-20", test_error=0.0667)
    header, *rows = table_of(tmp_path)
    assert header[:2] == ["", "measured (%)"]
    assert [row[:2] for row in rows] == [["ResNet-20", "6.67"]]
    text = (tmp_path / "report.md").read_text()
    assert f"#### Measured on {title}\n" in text
    assert "they are for cifar10, 64,000 steps, and cannot be compared" in text
    page = (tmp_path / "report.html").read_text()
    for number in ("8.75", "9.38"):
        assert number not in text
        assert number not in re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL)


def test_tables_with_top_5_errors_show_them(tmp_path):
    errors = {"test_error": 0.23, "test_top5_error": 0.07}
    for name, label in (("table2", "plain-34"), ("table3", "ResNet-50")):
        pretend(tmp_path, Setting(), name, label, **errors)
    table2, table3 = (dict_of(table_of(tmp_path, number)) for number in (0, 1))
    assert table2["plain-34"]["published (%)"] == "28.54"
    assert "published top-5 (%)" not in table2["plain-34"]
    assert table3["VGG-16"]["published (%)"] == "28.07"
    assert table3["VGG-16"]["published top-5 (%)"] == "9.33"
    assert table3["GoogLeNet"]["published top-5 (%)"] == "9.15"
    found = table3["ResNet-50"]
    assert (found["published (%)"], found["measured (%)"]) == ("22.85", "23.00")
    assert found["published top-5 (%)"] == "6.71"
    assert found["measured top-5 (%)"] == "7.00"


def dict_of(table):
    header, *rows = table
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def test_a_panel_without_news_is_left_out(tmp_path):
    def panels():
        section = Section.read(tmp_path / "cifar10")
        experiment = EXPERIMENTS["figure6"]
        figure = draw(experiment, section, section.measured(experiment))
        return [axes.get_title() for axes in figure.axes]

    for label in ("ResNet-20", "ResNet-110"):
        pretend(tmp_path, Setting(), "figure6", label)
    assert panels() == ["ResNets"]
    pretend(tmp_path, Setting(), "figure6", "ResNet-1202")
    assert panels() == ["ResNets", "110 and 1202 layers"]


@pytest.fixture
def tiny_imagenet(tmp_path):
    """Tiny-ImageNet as distributed, with 100 classes of two images."""
    root, lines = tmp_path / "tiny-imagenet-200", []
    images = np.random.default_rng(0).integers(0, 256, (100, 3, 64, 64, 3), np.uint8)
    (root / "val" / "images").mkdir(parents=True)
    for label in range(100):
        wnid = f"n{label:08}"
        folder = root / "train" / wnid / "images"
        folder.mkdir(parents=True)
        (folder.parent / f"{wnid}_boxes.txt").write_text("box\n")
        files = [folder / f"{wnid}_{i}.JPEG" for i in range(2)]
        files.append(root / "val" / "images" / f"val_{label}.JPEG")
        for file, image in zip(files, images[label], strict=True):
            assert cv2.imwrite(str(file), image)
        lines.append(f"val_{label}.JPEG\t{wnid}\t0\t0\t63\t63\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    return root


@pytest.fixture
def tiny_setting(tiny_imagenet):
    overrides = {
        "data.path": str(tiny_imagenet),
        "data.holdout_examples": "20",
        "model.name": "cifar_plain8",
        "training.steps": "2",
        "training.global_batch_size": "8",
        "evaluation.every_steps": "2",
        "checkpoint.every_steps": "2",
    }
    return Setting("tiny-imagenet", "tiny", overrides)


def test_tiny_imagenet_stands_in_for_imagenet(tiny_setting, tiny_imagenet, tmp_path):
    options = {"only": ["plain34"], "setting": tiny_setting, "console": make_console()}
    run_experiment("table3", tmp_path / "paper", **options)
    section = tmp_path / "paper" / "tiny-imagenet-64x64-tiny"
    result = json.loads((section / "plain34/seed-0/result.json").read_text())
    assert (result["test_count"], result["data"]) == (100, "Tiny ImageNet (64x64)")
    tested = json.loads((section / "analyses/ten_crop-plain34-0.json").read_text())
    report(tmp_path / "paper", console=make_console())
    text = (tmp_path / "paper" / "report.md").read_text()
    line = next(x for x in text.splitlines() if x.startswith("| plain-34 |"))
    one, five, ten, ten_five = (
        f"{100 * error:.2f}"
        for error in (
            *(result["test_error"], result["test_top5_error"]),
            *(tested["error"], tested["top5_error"]),
        )
    )
    cells = f"| plain-34 | {one} | {ten} | {five} | {ten_five} | 1 |"
    assert line.startswith(cells)
    assert "| measured, 10-crop (%) | measured top-5 (%) |" in text
    assert "Measured on Tiny ImageNet (64x64), 2 steps" in text
    assert "28.54" not in text
    assert "| Tiny ImageNet (64x64) |" in line
    assert "data.image_size=56 (published: 224)" in text
    # Ten crops of 56 from the 64 pixels, and the mean of their softmax.
    net = load_net(section / "plain34/seed-0")
    files = (f"{tiny_imagenet}/val/images/val_{label}.JPEG" for label in range(100))
    images = np.stack([cv2.imread(file)[..., ::-1] for file in files])
    corners = [(0, 0), (0, 8), (8, 0), (8, 8), (4, 4)]
    crops = [images[:, y : y + 56, x : x + 56] for y, x in corners]
    apply = jax.jit(net.model.apply)
    # On one device; all eight would compute the same.
    variables, statistics = jax.device_get((net.variables, net.statistics))
    total = 0
    for view in crops + [crop[:, :, ::-1] for crop in crops]:
        pixels = (view / np.float32(255) - statistics.mean) / statistics.std
        total += nn.softmax(apply(variables, pixels))
    assert tested["errors"] == (total.argmax(1) != np.arange(100)).sum()


def test_table_5_tests_an_ensemble(tiny_setting, tmp_path, monkeypatch):
    table5 = EXPERIMENTS["table5"]
    rows = [entry for entry in table5.entries if entry.label == "ResNet-152"]
    small = dataclasses.replace(table5, entries=(*rows,))
    monkeypatch.setitem(EXPERIMENTS, "table5", small)
    smaller = {"data.image_size": "28", "data.eval_shorter_side": "32"}
    setting = dataclasses.replace(
        tiny_setting, overrides=tiny_setting.overrides | smaller
    )
    options = {"setting": setting, "console": make_console()}
    run_experiment("table5", tmp_path, seeds=1, **options)
    said = options["console"].file.getvalue()
    assert "no ensemble yet: tiny-imagenet-64x64-tiny/resnet152_v1/seed-1" in said
    run_experiment("table5", tmp_path, **options)
    file = tmp_path / "tiny-imagenet-64x64-tiny/analyses/ensemble-table5.json"
    found = json.loads(file.read_text())
    assert found["nets"] == ["resnet152_v1/seed-0", "resnet152_v1/seed-1"]
    assert found["protocol"].startswith("multi_scale:")
    assert "shorter_sides=28+32+48+60+80" in found["protocol"]
    report(tmp_path, console=make_console())
    shown = " | ".join(f"{100 * found[x]:.2f}" for x in ("error", "top5_error"))
    nets = "resnet152_v1/seed-0, resnet152_v1/seed-1"
    assert f"| 2 nets | {nets} | {shown} |" in (tmp_path / "report.md").read_text()


def test_what_is_finished_is_not_run_again(finished, setting, monkeypatch):
    folder, _ = finished

    def never(*_):
        raise AssertionError("it was run again")

    monkeypatch.setattr("resnet_jax.paper.run.train_one", never)
    console = make_console()
    # Table 6 has the same run.
    run_experiment(
        "table6",
        folder,
        only=["cifar_plain20"],
        seeds=2,
        setting=setting,
        console=console,
    )
    assert "seed-1: test error" in console.file.getvalue()


def test_an_interrupted_experiment_goes_on(setting, tmp_path, monkeypatch):
    calls = []

    def stop_at_the_second(*arguments):
        calls.append(arguments[1])
        if len(calls) == 2:
            raise Preempted("stopped")
        return train_one(*arguments)

    monkeypatch.setattr("resnet_jax.paper.run.train_one", stop_at_the_second)
    options = {"only": ["cifar_plain20", "cifar_plain56"], "setting": setting}
    with pytest.raises(Preempted):
        run_experiment("figure1", tmp_path, console=make_console(), **options)
    report(tmp_path, console=make_console())
    assert "not measured: plain-56" in (tmp_path / "report.md").read_text()
    run_experiment("figure1", tmp_path, console=make_console(), **options)
    # The first one was not run again.
    names = [path.parent.name for path in calls]
    assert names == ["cifar_plain20", "cifar_plain56", "cifar_plain56"]


def test_a_run_that_diverged_is_told(setting, tmp_path):
    wild = Setting(
        setting.dataset,
        setting.scale,
        {**setting.overrides, "optimizer.learning_rate": "1e30"},
    )
    run_experiment("figure1", tmp_path, setting=wild, console=make_console())
    report(tmp_path, console=make_console())
    text = (tmp_path / "report.md").read_text()
    assert "plain-20, seed 0: diverged: the loss is not finite" in text
    assert "| plain-20 |" not in text


def test_a_folder_holds_one_setting(finished, setting):
    folder, _ = finished
    other = Setting(
        setting.dataset, setting.scale, {**setting.overrides, "training.steps": "5"}
    )
    with pytest.raises(UserError, match=r"holds runs with overrides .*training.steps"):
        run_experiment("figure1", folder, setting=other, console=make_console())
    # Where the data lie may change.
    moved = Setting(
        setting.dataset, setting.scale, {**setting.overrides, "data.num_threads": "1"}
    )
    options = {"only": ["cifar_plain20"], "console": make_console()}
    run_experiment("figure1", folder, setting=moved, **options)


def test_identity_layers_change_no_answer(setting, tmp_path):
    options = {"only": ["cifar_plain20"], "setting": setting}
    run_experiment("identity", tmp_path, console=make_console(), **options)
    file = tmp_path / "digits-tiny/analyses/deepened-cifar_plain20-0.json"
    found = json.loads(file.read_text())
    result = json.loads(
        (tmp_path / "digits-tiny/cifar_plain20/seed-0/result.json").read_text()
    )
    assert found["errors_before"] == found["errors_after"] == result["test_errors"]
    assert (found["blocks_before"], found["blocks_after"]) == (3, 9)
    # It is kept, and read from there.
    run_experiment("identity", tmp_path, console=make_console(), **options)
    report(tmp_path, console=make_console())
    share = 100 * result["test_errors"] / result["test_count"]
    cell = f"{share:.2f} ({result['test_errors']} of 360)"
    text = (tmp_path / "report.md").read_text()
    assert f"| plain-20 | 3 | {cell} | 9 | {cell} | 0 |" in text


def test_layers_are_analysed_in_order(finished, setting, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "copy")
    options = {"only": ["cifar_plain20"], "seeds": 1, "setting": setting}
    run_experiment("figure7", folder, console=make_console(), **options)
    run_experiment("gradients", folder, console=make_console(), **options)
    analyses = folder / "digits-tiny" / "analyses"
    layers = {
        kind: json.loads((analyses / f"{kind}-cifar_plain20-0.json").read_text())
        for kind in ("responses", "gradients")
    }
    # Eight layers, of which the last is no convolution.
    assert [len(values) for values in layers.values()] == [7, 7]
    assert layers["responses"][0][0] == layers["gradients"][0][0] == "stem/conv"
    report(folder, only=["figure7", "gradients"], console=make_console())
    assert (folder / "report.html").read_text().count("<svg") == 2
    text = (folder / "report.md").read_text()
    for label, found in (
        ("plain-20", layers["responses"]),
        ("plain-20, BN, He", layers["gradients"]),
    ):
        x = np.array([value for _, value in found])
        numbers = (x[0], x[-1], x.min(), x.mean(), x.max())
        shown = " | ".join(f"{number:.3g}" for number in numbers)
        assert f"| {label} | 7 | {shown} |" in text


def test_wrong_use_is_told(tmp_path, setting):
    with pytest.raises(UserError, match="holds no experiment; run one with"):
        report(tmp_path, console=make_console())
    with pytest.raises(UserError, match="at least 1, not 0"):
        run_experiment("table6", tmp_path, seeds=0, setting=setting)


def test_the_command_lists_all(capsys):
    assert main(["paper", "list"]) == 0
    printed = capsys.readouterr().out
    for name in (
        "figure1",
        "figure6",
        "table6",
        "figure7",
        "cifar_resnet110 (5 seeds)",
    ):
        assert name in printed
    assert main(["paper", "run", "tabel6", "--workdir", "nowhere"]) == 1
    assert "did you mean table6" in capsys.readouterr().err


def test_free_text_breaks_no_table(finished, tmp_path):
    folder, _ = finished
    copy = shutil.copytree(folder, tmp_path / "copy")
    name = "a|b\n$x_{$ <script>\x1b[31m"
    for file in copy.glob("digits-tiny/cifar_plain20/*/*.json"):
        content = json.loads(file.read_text())
        if file.name == "result.json":
            content["data"] = name
        elif file.name == "config.json":
            content["config"]["data"]["name"] = name
        file.write_text(json.dumps(content))
    report(copy, figures=copy / "figures", console=make_console())
    shown = r"a\|b $x_{$ \<script>\\x1b[31m"
    lines = (copy / "report.md").read_text().splitlines()
    for line in lines:
        assert f"| {shown} |" in line or not line.startswith("| plain-20 |")
    separators = [len(re.findall(r"(?<!\\)\|", x)) for x in lines if x[:2] == "| "]
    assert set(separators) == {10}
    assert any(f"data.name={shown} (published" in line for line in lines)
    assert f"#### Measured on {shown}, 4 steps" in lines
    assert "<script" not in (copy / "report.html").read_text()


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"scale": 1}'])
def test_a_damaged_setting_is_named(tmp_path, text):
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "setting.json").write_text(text)
    with pytest.raises(UserError, match=r"setting\.json is damaged"):
        report(tmp_path, console=make_console())
