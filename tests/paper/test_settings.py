import dataclasses

import pytest

from resnet_jax.config import derive, flatten, load_config
from resnet_jax.config.files import config_folder
from resnet_jax.errors import UserError
from resnet_jax.paper.entries import PaperRun
from resnet_jax.paper.settings import Setting

RESNET110 = PaperRun("cifar_resnet110", "cifar10.py:cifar_resnet110")
PLAIN18 = PaperRun("plain18", "imagenet.py:plain18,he2015")
WIDE = PaperRun("wide", "cifar10_wide.py:cifar_wide_resnet16_8")


def changed(run, setting):
    """Fields in which a setting's config differs from the published one."""
    published = flatten(load_config(str(config_folder() / run.config)))
    wanted = flatten(setting.config(run))
    return {name: value for name, value in wanted.items() if value != published[name]}


def test_the_published_setting_changes_only_how_often_it_is_looked_at():
    assert changed(RESNET110, Setting()) == {
        "evaluation.every_steps": 400,
        "checkpoint.every_steps": 1600,
    }
    assert changed(WIDE, Setting()) == {}


def test_a_scale_keeps_the_schedules_shape():
    config = Setting(scale="small").config(RESNET110)
    derived = derive(config, 50_000)
    assert (derived.steps, derived.boundaries) == (640, (320, 480))
    assert derived.evaluate_every == 40
    wide = derive(Setting(scale="tiny").config(WIDE), 50_000)
    assert wide.epochs == pytest.approx(0.2, abs=0.01)
    shares = [step / wide.steps for step in wide.boundaries]
    assert shares == pytest.approx([0.3, 0.6, 0.8], abs=0.02)


def test_a_data_set_brings_its_augmentation():
    fields = changed(RESNET110, Setting("digits"))
    assert fields["data.name"] == "digits"
    assert fields["augmentation.pad"] == 1
    assert fields["augmentation.flip"] is False


def test_a_folder_is_a_data_set(tmp_path):
    folder = tmp_path / "my images"
    folder.mkdir()
    setting = Setting(str(folder), "tiny")
    config = setting.config(RESNET110)
    assert (config.data.path, config.data.name) == (str(folder), "my images")
    assert setting.section(config) == "my-images-tiny"
    with pytest.raises(
        UserError, match=r"unknown data set 'digit'; give a folder, or one"
    ):
        Setting("digit").config(RESNET110)


def test_tiny_imagenet_has_a_quarter_of_the_recipes_sizes(tmp_path):
    setting = Setting("tiny-imagenet", overrides={"data.path": str(tmp_path)})
    config = setting.config(PLAIN18)
    published = Setting().config(PLAIN18)
    assert 4 * config.data.image_size == published.data.image_size
    assert 4 * config.data.eval_shorter_side == published.data.eval_shorter_side
    sides = [4 * side for side in config.augmentation.shorter_side]
    assert sides == list(published.augmentation.shorter_side)
    # The share of 100,000 images that the paper's run holds out of ImageNet.
    share = published.data.holdout_examples / 1_281_167
    assert config.data.holdout_examples / 100_000 == pytest.approx(share, rel=0.03)
    assert set(changed(PLAIN18, setting)) == {
        *("data.name", "data.path", "data.test_split", "data.holdout_examples"),
        *("data.image_size", "data.eval_shorter_side", "augmentation.shorter_side"),
    }
    assert setting.section(config) == "tiny-imagenet-64x64"


@pytest.mark.parametrize(
    ("dataset", "run", "sentence"),
    [
        ("digits", PLAIN18, "does not suit plain18, .* ImageNet; .* tiny-imagenet"),
        ("tiny-imagenet", RESNET110, "does not suit cifar_resnet110, .* small images"),
        ("tiny-imagenet", PLAIN18, "needs --config.data.path=FOLDER with Tiny-ImageN"),
        ("imagnet", PLAIN18, "unknown .* give a folder, or one of tiny-imagenet"),
    ],
)
def test_a_data_set_that_does_not_suit_is_refused(dataset, run, sentence):
    with pytest.raises(UserError, match=sentence):
        Setting(dataset).config(run)


def test_overrides_have_the_last_word():
    setting = Setting("digits", "tiny", {"training.steps": "32", "data.name": "mine"})
    config = setting.config(RESNET110)
    assert config.training.steps == 32
    assert config.data.name == "mine"
    assert config.evaluation.every_steps == 2


def test_members_are_runs_of_one_seed_each():
    members = Setting("digits", "tiny").members(RESNET110, 2)
    names = [f"digits-tiny/cifar_resnet110/seed-{seed}" for seed in (0, 1)]
    assert list(members) == names
    first, second = members.values()
    assert (first.seed, second.seed, second.seeds) == (0, 1, 1)
    assert dataclasses.replace(second, seed=0) == first


def test_an_unknown_scale_is_told():
    with pytest.raises(
        UserError, match=r"unknown scale 'little'; valid are paper, small"
    ):
        Setting(scale="little").config(RESNET110)


@pytest.mark.parametrize("text", ["x", "1e30", "-1", "9" * 5000])
def test_a_wrong_length_is_told(text):
    with pytest.raises(UserError, match=r"config field training\.steps"):
        Setting("digits", "tiny", {"training.steps": text}).config(RESNET110)


def test_overrides_may_count_in_epochs():
    overrides = {"training.steps": "None", "training.epochs": "1"}
    overrides |= {"schedule.kind": "constant", "schedule.boundaries_steps": "None"}
    config = Setting("digits", "tiny", overrides).config(RESNET110)
    assert (config.training.steps, config.training.epochs) == (None, 1)


def test_a_data_set_without_letters_has_a_folder():
    setting = Setting("digits", "tiny", {"data.name": "\u6570"})
    assert list(setting.members(RESNET110, 1)) == ["data-tiny/cifar_resnet110/seed-0"]


@pytest.mark.parametrize("folder", ["~nobody-here/x", "http://x", ""])
def test_a_folder_that_cannot_be_is_told(folder):
    with pytest.raises(UserError):
        Setting(folder).config(RESNET110)
