import json
import shutil

import pytest
from PIL import Image

from resnet_jax.cli import main
from resnet_jax.config import DetectionConfig, fields
from tests.detection.tiny import SIZE, write_four_images

SMALL = {
    "model.name": "resnet10t",
    "model.width": 16,
    "data.shorter_side": SIZE[0],
    "data.longer_side": SIZE[1],
    "detector.anchor_sizes": "24,40",
    "detector.rpn_features": 16,
    "detector.train_candidates": 60,
    "detector.train_proposals": 20,
    "detector.test_candidates": 40,
    "detector.test_proposals": 10,
    "detector.roi_samples": 8,
    "detector.score_threshold": 0.01,
    "training.global_batch_size": 8,
    "training.epochs": 2,
    "tracking.trackers": "",
    "compilation_cache": None,
}
"""Fields of ``detection/bccd`` for four small images."""


def run(capsys, *arguments):
    status = main(list(map(str, arguments)))
    return status, *capsys.readouterr()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Annotated images in voc/, their shards in shards/, and a run in run/."""
    folder = tmp_path_factory.mktemp("detect")
    voc, shards = (str(write_four_images(folder / "voc"))), str(folder / "shards")
    assert main(["detect", "prepare", voc, shards, "--splits", "train,test"]) == 0
    overrides = [f"--config.{name}={value}" for name, value in SMALL.items()]
    line = ["detect", "train", "--config", "detection/bccd"]
    line += ["--workdir", str(folder / "run"), "--config.data.path", shards]
    assert main([*line, *overrides]) == 0
    return folder


def test_a_finished_run_prints_its_result(folder, capsys):
    status, out, err = run(capsys, "detect", "train", "--workdir", folder / "run")
    assert (status, err) == (0, "")
    assert "holds a finished run; nothing to do" in out
    result = json.loads((folder / "run" / "result.json").read_text())
    assert f"mAP {100 * result['voc']['map_area']:.2f} % by area" in out
    assert "(8 objects on 4 images)" in out


def test_evaluates_on_the_files_as_on_the_shards(folder, tmp_path, capsys):
    page, file = tmp_path / "page.html", tmp_path / "found.json"
    line = ["detect", "evaluate", "--workdir", folder / "run", "--json", file]
    moved = f"--config.data.path={folder / 'voc'}"
    status, out, err = run(capsys, *line, "--html", page, moved)
    assert (status, err) == (0, "")
    trained = json.loads((folder / "run" / "result.json").read_text())
    found = json.loads(file.read_text())
    assert found["voc"] == trained["voc"]
    assert found["classes"] == trained["classes"]
    assert f"page: {page}" in out
    assert "Precision over recall" in page.read_text()


def test_predicts_and_names_a_broken_picture(folder, tmp_path, capsys):
    pictures, out, file = tmp_path / "in", tmp_path / "out", tmp_path / "found.jsonl"
    pictures.mkdir()
    shutil.copy(folder / "voc/JPEGImages/image0.png", pictures / "b.png")
    (pictures / "a.png").write_bytes(b"no image")
    line = ["detect", "predict", "--workdir", folder / "run", pictures]
    status, printed, err = run(
        capsys, *line, "--out", out, "--json", file, "--score", "0.011"
    )
    assert status == 1
    broken, last = err.splitlines()
    assert f"{pictures / 'a.png'} cannot be decoded" in broken
    assert last == ("resnet-jax: error: 1 of 2 could not be read: see the lines above")
    (line,) = file.read_text().splitlines()
    found = json.loads(line)
    assert found["image"] == str(pictures / "b.png")
    assert found["detections"]
    for each in found["detections"]:
        assert each["class"] in ("tall", "wide")
        assert each["score"] >= 0.011
        x1, y1, x2, y2 = each["box"]
        assert 0 <= x1 < x2 <= SIZE[1]
        assert 0 <= y1 < y2 <= SIZE[0]
    assert found["image"] in printed
    (drawn,) = out.iterdir()
    assert drawn.name == "0001-b.png"
    width, height = Image.open(drawn).size
    assert width / height == pytest.approx(SIZE[1] / SIZE[0], rel=0.01)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("trian", "there is no action trian; did you mean train?"),
        ("train --confg=x", "unknown flag --confg; did you mean --config?"),
        ("train --lr 1", "--lr; did you mean --config.optimizer.learning_rate?"),
        ("train --nms 1", "--nms; did you mean --config.detector.nms?"),
        ("predict --scor 1", "unknown flag --scor; did you mean --score?"),
        ("predict p --workdir r --score 2", "a number above 0 and up to 1, not '2'"),
        ("prepare a b --format x", "invalid choice: 'x'"),
    ],
)
def test_typos_of_flags(capsys, line, sentence):
    with pytest.raises(SystemExit) as stop:
        main(["detect", *line.split()])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert err.splitlines()[-1].startswith("resnet-jax detect")


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("detect train --config digits", "the config of a classifier"),
        ("train --config detection/bccd", "use the commands of resnet-jax detect"),
        ("detect train --config bccd", "did you mean detection/bccd?"),
        ("detect train --config detection/bccd", "set --config.data.path to a folder"),
        ("detect train", "give --config NAME or FILE.py"),
        (
            "detect train --config detection/bccd --config.detector.nsm=0.3",
            "unknown config field detector.nsm; did you mean --config.detector.nms?",
        ),
        (
            "detect train --config detection/bccd --config.detector.nms=2",
            "--config.detector.nms must be from 0 to 1, not 2",
        ),
        ("detect evaluate", "DIR does not exist: give the workdir"),
        ("detect predict pictures", "DIR does not exist"),
    ],
)
def test_faults_are_one_sentence(line, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(capsys, *line.split(), "--workdir", "DIR")
    assert status == 1
    assert sentence in err
    assert not (tmp_path / "DIR").exists()


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (["evaluate"], "use the commands of resnet-jax detect"),
        (
            ["detect", "evaluate", "--config.model.name=vgg16"],
            "--config.model.name cannot be changed for a trained detector; only data.*",
        ),
    ],
)
def test_what_a_detectors_run_refuses(folder, line, sentence, capsys):
    status, _, err = run(capsys, *line, "--workdir", folder / "run")
    assert status == 1
    assert sentence in err
    assert err.count("\n") == 1


def test_help_lists_every_field_of_a_detector(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["detect", "train", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name, field in fields(DetectionConfig).items():
        assert f"  {name} = {field.default}  (" in text
