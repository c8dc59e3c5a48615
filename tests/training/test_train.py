import copy
import functools
import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import time

import cv2
import jax
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

import resnet_jax
from resnet_jax.config import resolve
from resnet_jax.errors import UserError
from resnet_jax.training import train as training
from resnet_jax.workdir import Workdir
from tests.conftest import (
    REPOSITORY,
    make_console,
    make_tiny_config,
    write_image_folder,
)
from tests.test_checkpoints import same, truncate
from tests.training.helpers import final_state


def printed(console):
    return console.file.getvalue()


def rows_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").open()]


@pytest.fixture(scope="module")
def finished(tfds_dir, tmp_path_factory):
    """A finished run, shared: config, workdir, result and what was printed."""
    config, console = make_tiny_config(tfds_dir), make_console()
    workdir = tmp_path_factory.mktemp("finished") / "run"
    result = resnet_jax.train(config, workdir, console)
    return config, workdir, result, printed(console)


def test_a_run_leaves_what_a_reader_needs(finished):
    _, workdir, result, output = finished
    assert sorted(path.name for path in workdir.iterdir()) == [
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "report.html",
        "result.json",
        "tensorboard",
    ]
    rows = rows_of(workdir)
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 12]
    assert [row["step"] for row in rows if "test_error" in row] == [6, 12]
    assert rows[-1]["test_count"] == 360
    assert rows[-1]["epoch"] == pytest.approx(12 * 32 / 1437)
    assert result == json.loads((workdir / "result.json").read_text())
    errors = result["test_errors"]
    line = f"test error {100 * errors / 360:.2f} % ({errors} of 360)"
    assert line in output
    assert f"report: {workdir / 'report.html'}" in output
    saved = json.loads((workdir / "config.json").read_text())
    assert saved["config"]["training"]["global_batch_size"] == 32
    assert saved["derived"]["steps"] == 12
    assert any(workdir.glob("tensorboard/events*"))


def test_the_report_needs_nothing_from_outside(finished):
    _, workdir, result, _ = finished
    page = (workdir / "report.html").read_text()
    assert f"({result['test_errors']} of 360)" in page
    assert page.count("<svg") == 2  # the curves and the confusion matrix
    pictures = re.findall(r'src="([^"]{12})', page)
    assert set(pictures) == {"data:image/p"}
    assert len(pictures) == 32 + 24  # a batch, and the most confident mistakes
    assert page.count("src=") == len(pictures)
    for reference in ("url(http", "<script", "<link", "@import"):
        assert reference not in page


def test_the_report_can_be_made_again_with_a_picture(finished, tmp_path, console):
    _, workdir, _, _ = finished
    page = (workdir / "report.html").read_text()
    (workdir / "report.html").unlink()
    picture = tmp_path / "curves.png"
    resnet_jax.report(workdir, figure=picture, console=console)
    text = re.compile(r"<svg.*?</svg>", re.DOTALL)  # matplotlib writes the time in it
    assert text.sub("", (workdir / "report.html").read_text()) == text.sub("", page)
    assert cv2.imread(str(picture)).shape == (400, 1000, 3)
    with pytest.raises(UserError, match=r"must end in \.png, \.svg or"):
        resnet_jax.report(workdir, figure=tmp_path / "x.nonsense", console=console)
    with pytest.raises(UserError, match=r"no finished run"):
        resnet_jax.report(tmp_path / "nowhere", console=console)


def test_a_finished_run_is_left_alone(finished, console):
    config, workdir, result, _ = finished
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    assert resnet_jax.train(config, workdir, console) == result
    assert "holds a finished run; nothing to do" in printed(console)
    assert before == {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}


def test_another_config_is_refused_and_where_data_lie_is_not(finished, console):
    config, workdir = finished[0].copy_and_resolve_references(), finished[1]
    config.data.num_threads = 2
    resnet_jax.train(config, workdir, console)
    config.optimizer.learning_rate = 0.05
    with pytest.raises(UserError, match=r"optimizer\.learning_rate=0\.1, not 0\.05"):
        resnet_jax.train(config, workdir, console)


def test_evaluation_is_the_same_for_every_batch_size(finished, console):
    _, workdir, result, _ = finished
    for batch_size in (None, 7, 1000):
        found = resnet_jax.evaluate(workdir, batch_size=batch_size, console=console)
        assert found["errors"] == result["test_errors"]
        assert found["count"] == 360
        assert found["loss"] == pytest.approx(result["test_loss"], rel=1e-5)
    assert resnet_jax.evaluate(workdir, split="train", console=console)["count"] == 1437


def test_precise_statistics_are_averaged_over_training_batches(finished, console):
    _, workdir, *_ = finished
    evaluate = functools.partial(resnet_jax.evaluate, workdir, console=console)
    running, precise = evaluate(), evaluate(precise_batches=3)
    assert "averaged over 3 batches" in printed(console)
    assert precise["count"] == running["count"]
    assert precise["loss"] != running["loss"]
    assert evaluate(precise_batches=3) == precise
    with pytest.raises(UserError, match="precise batches must be at least 1, not 0"):
        evaluate(precise_batches=0)


def test_evaluate_faults_are_named(finished, tmp_path, console):
    workdir = finished[1]
    with pytest.raises(UserError, match=r"must be at least 1, not 0"):
        resnet_jax.evaluate(workdir, batch_size=0, console=console)
    with pytest.raises(UserError, match=r"no checkpoint at step 5; there are 8, 12"):
        resnet_jax.evaluate(workdir, checkpoint=5, console=console)
    with pytest.raises(UserError, match=r"holdout if"):
        resnet_jax.evaluate(workdir, split="holdout", console=console)
    with pytest.raises(UserError, match=r"no best checkpoint"):
        resnet_jax.evaluate(workdir, checkpoint="best", console=console)
    with pytest.raises(
        UserError, match=r"nowhere does not exist; give the workdir of a run"
    ):
        resnet_jax.evaluate(tmp_path / "nowhere", console=console)


def tensorboard_steps(workdir, tag):
    """Steps of a curve, read from the records: length, checksum, event, checksum."""
    steps = []
    for file in sorted((workdir / "tensorboard").iterdir()):
        data, start = file.read_bytes(), 0
        while start < len(data):
            (length,) = struct.unpack_from("<Q", data, start)
            event = event_pb2.Event.FromString(data[start + 12 : start + 12 + length])
            steps += [event.step for value in event.summary.value if value.tag == tag]
            start += length + 16
    return steps


class Stopped(Exception):
    """Stands for a kill inside the process."""


def run_killed(config, workdir, step, console):
    """Runs a config until it would write the row of a step."""
    append_row = Workdir.append_row

    def kill(self, row):
        if row["step"] == step:
            raise Stopped
        append_row(self, row)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workdir, "append_row", kill)
        with pytest.raises(Stopped):
            resnet_jax.train(config, workdir, console)


def test_a_run_goes_on_bit_for_bit_from_a_damaged_checkpoint_too(
    tiny_config, finished, tmp_path, console
):
    whole = finished[1]
    workdir = tmp_path / "stopped"
    run_killed(tiny_config, workdir, 10, console)
    truncate(workdir / "checkpoints" / "8")
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "lo')  # a kill in the middle of a line
    resnet_jax.train(tiny_config, workdir, console)
    assert "checkpoints/8 is damaged" in printed(console)
    assert "continuing from the checkpoint at step 4" in printed(console)
    same(final_state(tiny_config, workdir)[0], final_state(tiny_config, whole)[0])
    assert [row["step"] for row in rows_of(workdir)] == [2, 4, 6, 8, 10, 12]
    assert tensorboard_steps(workdir, "error/train") == [2, 4, 6, 8, 10, 12]
    assert tensorboard_steps(workdir, "error/test") == [6, 12]
    for a, b in zip(rows_of(workdir), rows_of(whole)):
        assert {k: v for k, v in a.items() if k in EXACT} == {
            k: v for k, v in b.items() if k in EXACT
        }


EXACT = ("train_loss", "train_error", "test_loss", "test_errors", "learning_rate")


def test_a_checkpoint_tells_all_that_a_run_is(finished):
    config, workdir, _, _ = finished
    _, content = final_state(config, workdir)
    assert content["position"] == 12 * 32
    assert content["rows"] == rows_of(workdir)
    assert content["config"]["model"]["name"] == "cifar_resnet8"


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    tiny_config, tmp_path, console
):
    tiny_config.checkpoint.every_steps = 1
    tiny_config.optimizer.learning_rate = 1e37
    workdir = tmp_path / "run"
    with pytest.raises(UserError, match=r"not finite .*step \d+") as error:
        resnet_jax.train(tiny_config, workdir, console)
    assert str(workdir / "checkpoints") in str(error.value)
    assert not (workdir / "result.json").exists()
    for row in rows_of(workdir):
        assert np.isfinite(row["train_loss"])


def test_the_best_checkpoint_is_chosen_on_the_held_out_part(
    tiny_config, tmp_path, console
):
    tiny_config.data.holdout_examples = 100
    tiny_config.checkpoint.best = True
    tiny_config.checkpoint.keep_last = 1
    tiny_config.checkpoint.every_steps = 2
    workdir = tmp_path / "run"
    resnet_jax.train(tiny_config, workdir, console)
    errors = {row["step"]: row["holdout_error"] for row in rows_of(workdir)}
    best = resnet_jax.evaluate(
        workdir, split="holdout", checkpoint="best", console=console
    )
    assert best["count"] == 100
    assert best["error"] == errors[best["step"]] == min(errors.values())


def test_a_streamed_folder_trains_as_a_resident_one(tiny_config, tmp_path, console):
    root = write_image_folder(tmp_path / "images", {"train": 8, "test": 3}, (8, 8))
    tiny_config.data.path = str(root)
    tiny_config.training.global_batch_size = 8
    tiny_config.training.steps = 6
    states = []
    for resident in (True, False):
        tiny_config.data.resident = resident
        workdir = tmp_path / f"resident-{resident}"
        result = resnet_jax.train(tiny_config, workdir, console)
        assert result["test_count"] == 9
        states.append(final_state(tiny_config, workdir)[0])
    for a, b in zip(*(jax.tree.leaves(state.params) for state in states)):
        np.testing.assert_allclose(a, b, atol=1e-5)


def crop_on_the_host(config, root):
    config.data.path = str(root)
    config.data.image_size = 8
    config.data.normalization = "per_channel"
    config.augmentation.pad = 0
    config.augmentation.crop_area = (0.3, 1.0)
    config.augmentation.flip = True
    config.augmentation.policy = "trivialaugment"
    config.training.global_batch_size = 8
    config.training.steps = 6
    config.training.log_every_steps = 1
    config.checkpoint.every_steps = 2


def test_a_streamed_run_goes_on_bit_for_bit_with_other_workers(
    tiny_config, tmp_path, console
):
    root = write_image_folder(tmp_path / "images", {"train": 8, "test": 3}, (12, 9))
    crop_on_the_host(tiny_config, root)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    resnet_jax.train(tiny_config, whole, console)
    run_killed(tiny_config, stopped, 5, console)
    tiny_config.data.num_threads = 1
    tiny_config.data.num_processes = 2
    tiny_config.data.prefetch_batches = 1
    resnet_jax.train(tiny_config, stopped, console)
    same(final_state(tiny_config, stopped)[0], final_state(tiny_config, whole)[0])


def test_broken_images_stop_a_run_or_are_replaced_counted_and_told(
    tiny_config, tmp_path, console
):
    root = write_image_folder(tmp_path / "images", {"train": 8, "test": 3}, (12, 9))
    crop_on_the_host(tiny_config, root)
    tiny_config.data.normalization = "none"
    for name in ("train/bee/2.png", "test/cat/1.png"):
        (root / name).write_bytes(b"no image")
    tiny_config.data.resident = False
    workdir = tmp_path / "run"
    with pytest.raises(UserError, match=r"bee/2\.png cannot be decoded"):
        resnet_jax.train(tiny_config, workdir, console)
    tiny_config.data.on_error = "skip"
    result = resnet_jax.train(tiny_config, workdir, console)
    # 6 steps of 8 are two epochs of 24.
    assert result["train_skipped"] == 2
    assert sum(row["train_skipped"] for row in rows_of(workdir)) == 2
    assert result["test_count"] == 8
    for name in ("bee/2.png", "cat/1.png"):
        assert printed(console).count(name) == 1


def test_a_workdir_that_cannot_be_written_is_named(tiny_config, tmp_path, console):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match=r"cannot be written to"):
        resnet_jax.train(tiny_config, file / "run", console)


@pytest.mark.parametrize("seeds", [1, 2])
@pytest.mark.parametrize("fault", ["data", "weights", "step"])
def test_a_start_that_fails_leaves_no_workdir(
    tiny_config, tmp_path, console, monkeypatch, seeds, fault
):
    """Unless the folder was there, which may be the user's."""
    tiny_config.seeds = seeds
    if fault == "data":
        tiny_config.data.path = str(tmp_path / "nowhere")
    elif fault == "weights":
        tiny_config.model.weights = str(tmp_path / "none.safetensors")
    else:
        monkeypatch.setattr(training, "make_train_step", out_of_memory)
        monkeypatch.setattr(training, "make_train_steps", out_of_memory)
    (tmp_path / "mine").mkdir()
    for workdir in ("runs/new", "mine"):
        with pytest.raises((UserError, MemoryError)):
            resnet_jax.train(tiny_config, tmp_path / workdir, console)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def out_of_memory(_):
    def step(*_):
        raise MemoryError

    return step


def test_a_finished_run_can_become_longer(tiny_config, finished, tmp_path, console):
    """It ends with the bits of a run that was that long from its start."""
    config, workdir = copy.deepcopy(tiny_config), tmp_path / "run"
    config.training.steps = 6
    resnet_jax.train(config, workdir, console)
    config.training.steps = tiny_config.training.steps
    before = (workdir / "result.json").read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "open_dataset", out_of_memory(None))
        with pytest.raises(MemoryError):
            resnet_jax.train(config, workdir, console)
    assert (workdir / "result.json").read_text() == before
    assert resnet_jax.train(config, workdir, console)["step"] == config.training.steps
    same(final_state(config, workdir)[0], final_state(tiny_config, finished[1])[0])
    assert Workdir(workdir).read_config() == resolve(tiny_config)


@pytest.mark.parametrize(
    ("kind", "steps", "sentence"),
    [
        (
            "constant",
            11,
            r"steps=12, not 11, and a run can only become longer",
        ),
        ("cosine", 24, r"schedule.kind=cosine spreads its learning rates"),
    ],
)
def test_why_a_finished_run_cannot_have_another_length(
    tiny_config, tmp_path, console, kind, steps, sentence
):
    tiny_config.schedule.kind = kind
    Workdir(tmp_path).write_config(resolve(tiny_config), "train")
    tiny_config.training.steps = steps
    with pytest.raises(UserError, match=sentence):
        resnet_jax.train(tiny_config, tmp_path, console)


def test_a_second_run_in_one_workdir_is_refused(tiny_config, tmp_path, console):
    workdir = tmp_path / "run"
    folder = Workdir(workdir)
    folder.create()
    with folder.lock(print), pytest.raises(UserError, match=r"in use by another run"):
        resnet_jax.train(tiny_config, workdir, console)
    assert list(workdir.iterdir()) == []


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_disk_too_full_for_tensorboard_costs_its_curves_alone(
    tiny_config, finished, tmp_path, console, monkeypatch
):
    def full(_):
        return open("/dev/full", "wb")

    monkeypatch.setattr("tensorboardX.record_writer.open_file", full)
    resnet_jax.train(tiny_config, tmp_path / "run", console)
    assert printed(console).count("no more curves for TensorBoard") == 1
    assert "No space left on device" in printed(console)
    same(
        final_state(tiny_config, tmp_path / "run")[0],
        final_state(tiny_config, finished[1])[0],
    )


def test_metrics_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(
        UserError, match=r"metrics\.jsonl cannot be written \(No space .*; make room"
    ):
        Workdir(tmp_path).append_row({"step": 1})


def command(config_file, workdir):
    return [
        sys.executable, "-m", "resnet_jax", "train",
        "--config", str(config_file), "--workdir", str(workdir),
    ]  # fmt: skip


def write_config_file(path, tfds_dir):
    path.write_text(
        "from resnet_jax.config import default_config\n"
        "def get_config():\n"
        "    config = default_config()\n"
        "    config.model.name = 'cifar_resnet8'\n"
        f"    config.data.data_dir = {tfds_dir!r}\n"
        "    config.augmentation.pad = 1\n"
        "    config.optimizer.ema_decay = 0.9\n"
        "    config.training.steps = 40\n"
        "    config.training.global_batch_size = 32\n"
        "    config.training.log_every_steps = 1\n"
        "    config.evaluation.every_steps = 20\n"
        "    config.checkpoint.every_steps = 7\n"
        "    return config\n"
    )
    return path


def kill_after_rows(process, metrics, count):
    """SIGKILL once ``metrics`` holds ``count`` rows more than it held."""
    while process.poll() is None:
        if metrics.exists() and len(metrics.read_bytes().split(b"\n")) > count:
            os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.01)
    return process.wait()


def test_killed_and_started_again_it_ends_bit_for_bit_the_same(tmp_path, tfds_dir):
    """Whole processes and SIGKILL, at moments drawn anew each time."""
    config_file = write_config_file(tmp_path / "killed.py", tfds_dir)
    environment = dict(os.environ, PYTHONPATH=str(REPOSITORY))
    options = {"env": environment, "stdout": subprocess.DEVNULL}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(config_file, whole), check=True, **options)
    for rows in (random.randint(1, 15), random.randint(18, 36)):
        process = subprocess.Popen(command(config_file, killed), **options)
        assert (
            kill_after_rows(process, killed / "metrics.jsonl", rows) == -signal.SIGKILL
        )
    subprocess.run(command(config_file, killed), check=True, **options)
    config = resnet_jax.load_config(str(config_file))
    (a, content), (b, _) = final_state(config, killed), final_state(config, whole)
    same(a, b)
    assert [row["step"] for row in rows_of(killed)] == list(range(1, 41))
    assert content["rows"] == rows_of(killed)
