"""Training: what is learned, on any number of devices, with stops in between."""

import functools
import json
import shutil
import signal

import jax
import numpy as np
import pytest

from resnet_jax import create_model, parallel, save_weights
from resnet_jax.checkpoints import Checkpoints
from resnet_jax.detection.detections import load_detections
from resnet_jax.detection.detector import detection_program, load_detector
from resnet_jax.detection.evaluate import evaluate_detector
from resnet_jax.detection.faster_rcnn import make_detector
from resnet_jax.detection.losses import DetectionSums, anchor_places
from resnet_jax.detection.predict import detect_pictures
from resnet_jax.detection.pretrained import initial_state
from resnet_jax.detection.state import make_detection_learner
from resnet_jax.detection.step import _choose, make_detection_step
from resnet_jax.detection.train import train_detector
from resnet_jax.errors import Preempted, UserError
from resnet_jax.training.train import Run
from tests.conftest import make_console
from tests.detection.tiny import SIZE, batch_of_four, tiny_config, write_four_images


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_four_images(tmp_path_factory.mktemp("data"))


def learner_of(config, devices=1):
    mesh = parallel.data_mesh(devices)
    return make_detection_learner(config, mesh, steps_per_epoch=1, num_classes=2)


def placed(batch, learner):
    return parallel.place(batch, parallel.batch_sharding(learner.mesh))


def fresh(learner):
    return learner.fresh_state(*initial_state(learner, print))


def final_state(config, workdir):
    learner = learner_of(config, 8)
    with Checkpoints(workdir / "checkpoints", config.checkpoint) as checkpoints:
        return checkpoints.restore(checkpoints.steps()[-1], learner.abstract_state())


def test_four_images_are_learned_by_heart(folder):
    """AP 1 at IoU 0.5: the whole of training and testing, in small."""
    config = tiny_config(folder)
    learner = learner_of(config)
    state, step = fresh(learner), make_detection_step(learner)
    batch = placed(batch_of_four(), learner)
    for _ in range(130):
        state = step(state, None, batch)
    program = detection_program([learner.model], learner.mesh, config.data)
    found = program(
        [state.evaluation_variables()],
        [state.statistics],
        [(batch["images"], batch["sizes"])],
    )
    for index in range(4):
        sure = np.asarray(found.scores[index]) > 0.5
        boxes, classes = found.boxes[index][sure], found.classes[index][sure]
        order = np.argsort(-classes)
        np.testing.assert_array_equal(classes[order], [1, 0])
        wanted = np.asarray(batch["boxes"])[index]
        assert np.abs(boxes[order] - wanted).max() < 5
    sums = state.sums.summary()
    assert sums["train_objects"] > 2


def on_devices(function, count, *batches):
    """What a function makes of batches that are cut over devices, on the host."""
    mesh = parallel.data_mesh(count)
    batches = parallel.place(batches, parallel.batch_sharding(mesh))
    return jax.device_get(jax.jit(parallel.on_each_device(function, mesh))(*batches))


def test_samples_do_not_depend_on_the_devices(folder):
    model = make_detector(tiny_config(folder), num_classes=2)
    per_cell = model.anchors.per_cell
    choose = functools.partial(
        _choose,
        anchors=model.anchors.grid(4, 6),
        places=anchor_places(4, 6, per_cell),
        config=model.config,
        num_classes=2,
    )
    batch = jax.tree.map(lambda x: np.concatenate([x, x]), batch_of_four())
    targets = {name: batch[name] for name in ("sizes", "boxes", "classes")}
    rng, count = np.random.default_rng(0), 4 * 6 * per_cell
    keys = jax.random.key_data(jax.random.split(jax.random.key(3), 8))
    arguments = (
        np.asarray(keys),
        rng.normal(size=(8, count)).astype(np.float32),
        rng.normal(0, 0.1, (8, count, 4)).astype(np.float32),
        np.ones((8, count), bool),
        targets,
    )

    def chosen(keys, *others):
        return choose(jax.random.wrap_key_data(keys), *others)

    one, two, eight = (on_devices(chosen, n, *arguments) for n in (1, 2, 8))
    for several in (two, eight):
        jax.tree.map(np.testing.assert_array_equal, several, one)
    anchors, regions = one
    assert (anchors.labels == 1).any()
    assert ((regions.labels >= 0) & (regions.labels < 2)).sum() > 8
    # The same image with another key: other samples.
    assert not np.array_equal(anchors.indices[0], anchors.indices[4])


def test_losses_do_not_depend_on_the_devices(folder):
    config = tiny_config(folder)
    batch = jax.tree.map(lambda x: np.concatenate([x, x]), batch_of_four())
    sums = []
    for devices in (1, 8):
        learner = learner_of(config, devices)
        step = make_detection_step(learner)
        state = step(fresh(learner), None, placed(batch, learner))
        sums.append(state.sums.summary())
    one, eight = sums
    assert one["train_objects"] == eight["train_objects"] > 1
    for name in one:
        np.testing.assert_allclose(eight[name], one[name], rtol=1e-4)


def test_frozen_parts_and_statistics_stay_bit_for_bit(folder, tmp_path):
    """With the weights of a classifier; what it lacks starts at random."""
    net = create_model("resnet10t", num_classes=5).clone(width=16)
    key, example = jax.random.key(7), np.zeros((1, 64, 64, 3), np.float32)
    variables = jax.jit(net.init)(key, example)
    save_weights(tmp_path / "net.safetensors", variables, net)
    weights = str(tmp_path / "net.safetensors")
    config = tiny_config(folder, **{"model.weights": weights})
    learner, said = learner_of(config), []
    state = learner.fresh_state(*initial_state(learner, said.append))
    assert said == [f"random: head, rpn; the other parts are from {weights}"]
    before = jax.device_get((state.params, state.batch_stats))
    np.testing.assert_array_equal(
        before[0]["stage2"]["block1"]["conv1"]["kernel"],
        variables["params"]["stage2"]["block1"]["conv1"]["kernel"],
    )
    step, batch = make_detection_step(learner), placed(batch_of_four(), learner)
    for _ in range(2):
        state = step(state, None, batch)
    after = jax.device_get((state.params, state.batch_stats))
    jax.tree.map(np.testing.assert_array_equal, before[1], after[1])
    moved = {
        part: any(
            not np.array_equal(old, new)
            for old, new in zip(*map(jax.tree.leaves, (before[0][part], tree)))
        )
        for part, tree in after[0].items()
    }
    assert {part for part, has_moved in moved.items() if not has_moved} == {
        "stem",
        "stage1",
    }

    other = tiny_config(folder, **{"model.weights": weights, "model.width": 8})
    other = learner_of(other)
    with pytest.raises(UserError, match="does not match the ResNet"):
        initial_state(other, print)


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    config = tiny_config(folder, **{"training.steps": 5})
    workdir = tmp_path_factory.mktemp("run") / "run"
    return config, workdir, train_detector(config, workdir, make_console())


def test_a_run_leaves_its_files(undisturbed):
    config, workdir, result = undisturbed
    names = {path.name for path in workdir.iterdir()}
    wanted = {"config.json", "metrics.jsonl", "result.json", "report.html"}
    assert wanted | {"detections.npz", "checkpoints"} <= names
    saved = json.loads((workdir / "result.json").read_text())
    assert saved == json.loads(json.dumps(result))
    assert saved["images"] == 4
    assert saved["objects"] == 8
    assert 0 <= saved["voc"]["map_area"] <= 1
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[-1]["test_map_11"] == saved["voc"]["map_11"]
    parts = ("rpn_loss", "rpn_box_loss", "class_loss", "box_loss")
    total = sum(rows[-1][f"train_{name}"] for name in parts)
    np.testing.assert_allclose(rows[-1]["train_loss"], total, rtol=1e-6)
    # A second call only prints.
    assert train_detector(config, workdir, make_console()) == saved


def test_a_stopped_run_ends_bit_for_bit_the_same(undisturbed, tmp_path, monkeypatch):
    config, workdir, result = undisturbed
    stopped = tmp_path / "stopped"
    after_step = Run.after_step

    def stop_after_three(self, state, step, saved=False):
        if step == 3:
            signal.raise_signal(signal.SIGTERM)
        return after_step(self, state, step, saved)

    monkeypatch.setattr(Run, "after_step", stop_after_three)
    with pytest.raises(Preempted):
        train_detector(config, stopped, make_console())
    monkeypatch.undo()
    again = train_detector(config, stopped, make_console())
    assert again["voc"] == result["voc"]
    (one, _), (two, _) = (final_state(config, run) for run in (workdir, stopped))
    jax.tree.map(
        np.testing.assert_array_equal,
        *(jax.device_get((s.params, s.batch_stats, s.opt_state)) for s in (one, two)),
    )


def test_other_data_and_other_fields_are_refused(undisturbed, tmp_path):
    config, workdir, _ = undisturbed
    with pytest.raises(
        UserError, match=r"holds a run with detector\.nms=0\.3, not 0\.5"
    ):
        train_detector(
            tiny_config(config.data.path, **{"training.steps": 5, "detector.nms": 0.5}),
            workdir,
            make_console(),
        )
    other = write_four_images(tmp_path)
    xml = other / "Annotations" / "image0.xml"
    xml.write_text(xml.read_text().replace("wide", "long"))
    longer = tiny_config(other, **{"training.steps": 6})
    with pytest.raises(
        UserError, match="other data: there are 3 classes, not 2: 'long'"
    ):
        train_detector(longer, workdir, make_console())
    assert (workdir / "result.json").exists()


@pytest.mark.parametrize("damage", [b"", b"PK\3\4 and nothing else", None])
def test_lost_detections_are_found_again(undisturbed, tmp_path, damage):
    config, workdir, result = undisturbed
    copy = shutil.copytree(workdir, tmp_path / "copy")
    (copy / "result.json").unlink()
    (copy / "detections.npz").unlink()
    if damage is not None:
        (copy / "detections.npz").write_bytes(damage)
    with pytest.raises(UserError, match="missing, damaged or no file of detections"):
        load_detections(copy / "detections.npz")
    assert train_detector(config, copy, make_console())["voc"] == result["voc"]
    assert load_detections(copy / "detections.npz")[0] == tuple(
        f"image{index}" for index in range(4)
    )


def test_a_broken_test_image_is_left_out_of_the_report(tmp_path):
    root = write_four_images(tmp_path / "data")
    (root / "JPEGImages" / "broken.png").write_bytes(b"no image")
    xml = (root / "Annotations" / "image0.xml").read_text()
    (root / "Annotations" / "broken.xml").write_text(xml)
    (root / "ImageSets" / "Main" / "test.txt").write_text("image0\nbroken")
    changes = {"data.on_error": "skip", "training.steps": 1}
    console = make_console()
    result = train_detector(tiny_config(root, **changes), tmp_path / "run", console)
    assert (result["images"], result["objects"]) == (2, 4)
    assert "skipped: image broken" in console.file.getvalue()
    assert "image0: 2 objects" in (tmp_path / "run" / "report.html").read_text()


def test_the_run_is_tested_again(undisturbed, tmp_path):
    _, workdir, result = undisturbed
    console = make_console()
    page = tmp_path / "page.html"
    again = evaluate_detector(workdir, html_path=page, console=console)
    assert again["voc"] == result["voc"]
    assert again["classes"] == result["classes"]
    assert page.stat().st_size > 10_000
    assert "mAP" in console.file.getvalue()
    detector = load_detector(workdir)
    assert detector.class_names == ("tall", "wide")
    picture = np.zeros((*SIZE, 3), np.uint8)
    for _ in range(2):
        ((number, pixels, found),) = detect_pictures(detector, picture)
        assert (number, pixels.shape) == (0, picture.shape)
        assert found.boxes.shape == (len(found), 4)
    assert detector.program._cache_size() == 1
    with pytest.raises(UserError, match="cannot be changed for a trained detector"):
        evaluate_detector(workdir, overrides={"model.width": "8"}, console=console)


def test_seeds_are_runs_of_their_own(folder, tmp_path):
    config = tiny_config(folder, **{"training.steps": 1, "seeds": 2, "seed": 3})
    result = train_detector(config, tmp_path / "runs", make_console())
    assert set(result["runs"]) == {"seed-3", "seed-4"}
    aps = [run["voc"]["map_area"] for run in result["runs"].values()]
    np.testing.assert_allclose(result["voc"]["map_area"], np.mean(aps))
    deviation = np.std(aps, ddof=1)
    np.testing.assert_allclose(result["voc"]["map_area_deviation"], deviation)


def test_the_four_steps_share_what_they_should(folder, tmp_path):
    changes = {"training.steps": 2, "training.procedure": "four_steps"}
    config = tiny_config(folder, **changes)
    result = train_detector(config, tmp_path / "runs", make_console())
    assert "voc" in result
    names = ("rpn", "fast_rcnn", "shared_rpn", "shared_fast_rcnn")
    rpn, fast, shared_rpn, shared = (
        jax.device_get(load_detector(tmp_path / "runs" / name).variables["params"])
        for name in names
    )

    def same(one, two, part):
        pairs = zip(jax.tree.leaves(one[part]), jax.tree.leaves(two[part]))
        return all(np.array_equal(a, b) for a, b in pairs)

    trunk = ("stem", "stage1", "stage2", "stage3")
    # Steps 3 and 4 keep the trunk of step 2, which is not that of step 1.
    assert all(same(fast, shared_rpn, part) for part in trunk)
    assert all(same(fast, shared, part) for part in trunk)
    assert not same(rpn, fast, "stage3")
    assert not same(fast, shared_rpn, "rpn")
    assert same(fast, shared_rpn, "stage4")
    assert same(shared_rpn, shared, "rpn")
    assert not same(shared_rpn, shared, "stage4")
    # The workdir stands for its last step; an RPN alone is no detector.
    whole = load_detector(tmp_path / "runs").variables["params"]
    assert same(jax.device_get(whole), shared, "stage4")
    with pytest.raises(UserError, match="only proposes regions"):
        evaluate_detector(tmp_path / "runs" / "rpn")
    # A second call finds all of it done.
    again = train_detector(config, tmp_path / "runs", make_console())
    assert again["voc"] == result["voc"]


def test_sums_are_means_over_images():
    sums = DetectionSums(*(np.float32(x) for x in (8, 4, 2, 1)), 12, 4)
    summary = (sums + DetectionSums.zeros()).summary()
    assert summary["train_loss"] == pytest.approx(15 / 4)
    assert summary["train_objects"] == 3
