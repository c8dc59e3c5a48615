"""The pictures of a batch against what a step, or the disk, really holds."""

import cv2
import jax
import numpy as np
import pytest
from flax import linen as nn

import resnet_jax
from resnet_jax import parallel
from resnet_jax.analysis.batches import SeenBatch
from resnet_jax.cli import main
from resnet_jax.config import resolve
from resnet_jax.data.dataset import open_dataset
from resnet_jax.data.feeds import make_feed
from resnet_jax.errors import UserError
from resnet_jax.training import step
from resnet_jax.training.train import learner_for
from tests.conftest import make_tiny_config

CONFIGS = {
    "resident": {"augmentation.flip": True},
    "mixup": {"augmentation.mixup_alpha": 0.4, "augmentation.erasing_probability": 0.5},
    "cutmix": {"augmentation.cutmix_alpha": 1.0, "seed": 3},
    "repeats": {"augmentation.repeats": 2, "data.normalization": "per_channel"},
    "streamed": {"data.resident": False},
    "crops": {
        "data.image_size": 8,
        "augmentation.pad": 0,
        "augmentation.crop_area": (0.2, 1.0),
        "augmentation.flip": True,
        "augmentation.policy": "trivialaugment",
        "augmentation.mixup_alpha": 0.2,
    },
}


def changed(config, fields):
    for name, value in fields.items():
        *sections, key = name.split(".")
        target = config
        for section in sections:
            target = target[section]
        target[key] = value
    return config


def first_step(config, monkeypatch):
    """Images, labels and share that the net and the loss of step 1 receive."""
    config = resolve(config)
    dataset, mesh = open_dataset(config), parallel.data_mesh(1)
    learner = learner_for(config, dataset, mesh)
    state = learner.fresh_state(dataset.train.statistics())
    feed = make_feed(dataset.train, mesh, config.data, config.augmentation)
    size, mixed = config.training.global_batch_size, []
    batches = feed.training_batches(0, size, config.seed)
    batch = next(batches)
    batches.close()
    true_targets, seen = step.mixed_targets, []

    def targets(labels, share, classes):
        jax.debug.callback(lambda *values: mixed.append(values), labels, share)
        return true_targets(labels, share, classes)

    def spy(call, args, kwargs, context):
        if context.module.path == () and context.method_name == "__call__":
            jax.debug.callback(lambda images: seen.append(np.array(images)), args[0])
        return call(*args, **kwargs)

    monkeypatch.setattr(step, "mixed_targets", targets)
    with nn.intercept_methods(spy):
        step.make_train_step(learner)(state, feed.resident, batch)
    jax.effects_barrier()
    if "label" in batch:
        labels = np.array(batch["label"])
    else:
        labels = np.array(feed.resident["label"])[np.array(batch["index"])]
    return seen[0], labels, mixed


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_pictures_are_what_the_step_gets(kind, tfds_dir, image_folder, monkeypatch):
    config = changed(make_tiny_config(tfds_dir), CONFIGS[kind])
    config.training.global_batch_size = 16
    if kind == "crops":
        config.data.path = str(image_folder)
    found = resnet_jax.show_data(config, images=12)
    images, labels, mixed = first_step(config, monkeypatch)
    np.testing.assert_allclose(found.images, images[:12], atol=2e-6)
    assert found.labels.tolist() == labels[:12].tolist()
    if not mixed:
        assert found.share == 1
        assert found.captions == [found.class_names[label] for label in labels[:12]]
        return
    share = float(mixed[0][1])
    assert found.share == pytest.approx(share)
    percent = round(100 * share)
    for i, caption in enumerate(found.captions):
        own, other = (found.class_names[labels[k]] for k in (i, 15 - i))
        both = f"{own}: {percent} %\n{other}: {100 - percent} %"
        assert caption == (own if own == other else both)


def test_without_augmentation_the_pictures_are_the_stored_pixels(image_folder):
    config = make_tiny_config("unused")
    config.data.path = str(image_folder)
    names = [f"{name}/{i}.png" for name in ("ant", "bee", "cat") for i in range(2)]
    stored = [
        cv2.imread(str(image_folder / "test" / name))[..., ::-1] for name in names
    ]
    found = resnet_jax.show_data(config, split="test", images=100)
    np.testing.assert_array_equal(found.pixels, stored)
    assert found.captions == ["ant", "ant", "bee", "bee", "cat", "cat"]
    panels = found.figure("a title").axes
    for panel, image, caption in zip(panels, stored, found.captions, strict=True):
        np.testing.assert_array_equal(panel.get_images()[0].get_array(), image)
        assert panel.get_title() == caption


def test_long_names_are_cut_and_their_shares_kept():
    batch = SeenBatch(
        images=np.zeros((2, 4, 4, 3), np.float32),
        pixels=np.zeros((2, 4, 4, 3), np.uint8),
        labels=np.array([0, 1]),
        partners=np.array([1, 1]),
        share=0.98,
        class_names=("n02099601", "a_class_with_a_long_name"),
    )
    assert batch.captions[0] == "golden retriever: 98 %\na_class_with_a_long_name: 2 %"
    texts = [axes.get_title() for axes in batch.figure().axes]
    assert texts == [
        "golden retr…: 98 %\na_class_with…: 2 %",
        "a_class_with_a_lo…",
    ]
    assert batch._repr_png_()[:4] == b"\x89PNG"


def test_a_broken_image_is_named_or_left_out(image_folder):
    (image_folder / "test" / "bee" / "0.png").write_bytes(b"broken")
    config = make_tiny_config("unused")
    config.data.path = str(image_folder)
    with pytest.raises(UserError, match=r"bee/0\.png cannot be decoded"):
        resnet_jax.show_data(config, split="test")
    config.data.on_error = "skip"
    found = resnet_jax.show_data(config, split="test")
    assert found.captions == ["ant", "ant", "bee", "cat", "cat"]


def test_the_command_draws_a_page_or_a_picture(tfds_dir, tmp_path, capsys):
    config = tmp_path / "config.py"
    config.write_text(
        "from tests.conftest import make_tiny_config\n"
        f"def get_config():\n    return make_tiny_config({tfds_dir!r})\n"
    )
    command = ["show-data", "--config", str(config), "--out"]
    page, picture = tmp_path / "batch.html", tmp_path / "batch.png"
    assert main([*command, str(page)]) == 0
    assert page.read_text().count("<img") == 32
    assert "augmentation.pad" in page.read_text()
    assert main([*command, str(picture), "--images", "9", "--split", "test"]) == 0
    assert len(cv2.imread(str(picture))) > 200
    assert capsys.readouterr().out.splitlines()[-1] == f"9 images: {picture}"
    for out, rest, sentence in (
        ("batch.txt", [], "must end in .png, .svg, .pdf or .html"),
        ("batch.png", ["--split", "tets"], "there is no split 'tets' to show; choose"),
        ("batch.png", ["--config.augmentation.pda=1"], "did you mean"),
    ):
        assert main([*command, str(tmp_path / out), *rest]) == 1
        assert sentence in capsys.readouterr().err
