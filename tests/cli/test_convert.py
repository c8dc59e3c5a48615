"""resnet-jax convert, on files, names and workdirs."""

import argparse
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.checkpoints import Checkpoints
from resnet_jax.cli import convert
from resnet_jax.errors import UserError
from resnet_jax.models import create_model
from resnet_jax.weights import load_weights, save_weights, shapes
from resnet_jax.weights.files import read_arrays, write_safetensors
from resnet_jax.workdir import Workdir
from tests.conftest import make_tiny_config, write_image_folder
from tests.training.helpers import parts

NAME = "cifar_resnet8_b"


def run(*arguments):
    parser = argparse.ArgumentParser()
    convert.add_parser(parser.add_subparsers())
    options = parser.parse_args(["convert", *map(str, arguments)])
    options.run(options)


def refusal(*arguments):
    with pytest.raises(UserError) as error:
        run(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def random_variables(model, channels=3):
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.normal(size=leaf.shape).astype(np.float32)
        for name, leaf in shapes.abstract_arrays(model, channels).items()
    }
    return shapes.unflatten(arrays, model)


def assert_same_arrays(path, other):
    found, expected = read_arrays(path)[0], read_arrays(other)[0]
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].tobytes() == array.tobytes(), name


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One grey net of 5 classes in both layouts, without its name."""
    folder = tmp_path_factory.mktemp("files")
    model = create_model(NAME, num_classes=5)
    variables = random_variables(model, channels=1)
    for layout in ("flax", "torch"):
        save_weights(folder / f"{layout}.safetensors", variables, model, layout=layout)
    return folder


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """The folder of a run as ``train`` leaves it, and the variables that it evaluates.

    The state is made up: to train, or to initialise it, would take ten times as long.
    """
    root = tmp_path_factory.mktemp("convert")
    images = write_image_folder(root / "images", {"train": 4, "test": 1}, (8, 8))
    config = make_tiny_config(str(root))
    config.model.shortcut = "B"
    config.data.path = str(images)
    config.optimizer.ema_decay = 0.5
    config.training.global_batch_size = 8
    # On two of the eight devices: Orbax is slow with many copies.
    setup = parts(config, 2)
    folder = Workdir(root / "run")
    folder.create()
    folder.write_config(setup.config, "resnet-jax train")
    rng = np.random.default_rng(0)

    def draw(leaf):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        value = rng.uniform(0, 9, leaf.shape)
        value = jax.random.key(0) if is_key else jnp.asarray(value, leaf.dtype)
        return jax.device_put(value, leaf.sharding)

    with Checkpoints(folder.checkpoints, setup.config.checkpoint) as checkpoints:
        for step in (1, 2):
            state = jax.tree.map(draw, setup.learner.abstract_state())
            checkpoints.save(state.replace(step=jnp.int32(step)), {}, None)
            checkpoints.wait()
    return folder.path, jax.device_get(state.ema)


@pytest.mark.parametrize(("kind", "other"), [("flax", "torch"), ("torch", "flax")])
def test_the_other_layout_is_the_default(files, tmp_path, capsys, kind, other):
    target = tmp_path / "out.safetensors"
    run(files / f"{kind}.safetensors", target, "--model", NAME)
    assert_same_arrays(target, files / f"{other}.safetensors")
    assert read_arrays(target)[1]["model"] == NAME
    out = capsys.readouterr().out
    model = create_model(NAME, num_classes=5)
    count = shapes.count_parameters(shapes.abstract_arrays(model, channels=1))
    arrays = len(read_arrays(target)[0])
    expected = (
        f"wrote {target}: {arrays} arrays, {count:,} parameters, {other} layout\n"
    )
    assert out == expected


@pytest.mark.parametrize("kind", ["flax", "torch"])
def test_a_file_that_was_converted_knows_its_net(files, tmp_path, kind):
    source = files / f"{kind}.safetensors"
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    run(source, there, "--model", NAME)
    run(there, back)
    assert_same_arrays(back, source)


def test_the_layout_may_be_the_same(files, tmp_path):
    target = tmp_path / "out.safetensors"
    source = files / "torch.safetensors"
    run(source, target, "--model", NAME, "--layout", "torch")
    assert_same_arrays(target, source)


def test_a_net_without_a_classifier(tmp_path):
    model = create_model(NAME, num_classes=None)
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_weights(source, random_variables(model), model, name=NAME)
    run(source, target)
    assert "fc.weight" not in read_arrays(target)[0]
    assert load_weights(target, model)["params"].keys() == {
        "stem", "stage1", "stage2", "stage3"
    }  # fmt: skip


def test_a_deep_net_that_runs_as_a_loop(tmp_path):
    model = create_model("cifar_resnet32", scan=True)
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_weights(source, random_variables(model), model, name="cifar_resnet32")
    run(source, target)
    assert "layer3.4.conv2.weight" in read_arrays(target)[0]


def test_torch_save_files_are_read(files, tmp_path):
    torch = pytest.importorskip("torch")
    arrays, _ = read_arrays(files / "torch.safetensors")
    source, target = tmp_path / "in.pth", tmp_path / "out.safetensors"
    tensors = {name: torch.tensor(array) for name, array in arrays.items()}
    torch.save({"state_dict": tensors, "epoch": 3}, source)
    run(source, target, "--model", NAME)
    assert_same_arrays(target, files / "flax.safetensors")


def test_torchvisions_names_say_which_net_it_is(tmp_path, monkeypatch):
    model = create_model("resnet18", num_classes=3)
    file, target = tmp_path / "file.safetensors", tmp_path / "out.safetensors"
    written = save_weights(file, random_variables(model), model, layout="torch")
    monkeypatch.setattr("resnet_jax.weights.load_save.locate", lambda name: file)
    run("torchvision:resnet18.IMAGENET1K_V1", target)
    arrays, metadata = read_arrays(target)
    assert metadata["model"] == "resnet18"
    np.testing.assert_array_equal(arrays["params/head/kernel"], written["fc.weight"].T)


def test_a_workdir(workdir, tmp_path, monkeypatch, capsys):
    # Its data may be elsewhere by now.
    for module in ("evaluation.saved_run", "data.dataset"):
        monkeypatch.delattr(f"resnet_jax.{module}.open_dataset")
    folder, expected = workdir
    target, torch_target = tmp_path / "out.safetensors", tmp_path / "torch.safetensors"
    run(folder, target)
    assert capsys.readouterr().out.endswith("flax layout\n")
    model = create_model(NAME, num_classes=3)
    found = load_weights(target, model)
    assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))
    metadata = read_arrays(target)[1]
    assert metadata["model"] == "cifar_resnet8"
    assert json.loads(metadata["model_options"]) == {"shortcut": "B"}
    # The shortcut is the file's own business from then on.
    run(target, torch_target)
    again = load_weights(torch_target, model)
    assert jax.tree.all(jax.tree.map(np.array_equal, again, expected))
    run(folder, torch_target, "--layout", "torch", "--force")
    again = load_weights(torch_target, model)
    assert jax.tree.all(jax.tree.map(np.array_equal, again, expected))


def test_workdirs_without_a_whole_checkpoint(workdir, tmp_path):
    folder, _ = workdir
    target = tmp_path / "out.safetensors"
    assert "knows its model; leave --model out" in refusal(
        folder, target, "--model", NAME
    )
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for file in (copy / "checkpoints" / "2" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    assert "is damaged" in refusal(copy, target)
    shutil.rmtree(copy / "checkpoints")
    assert "holds no checkpoint" in refusal(copy, target)
    (copy / "config.json").unlink()
    assert "holds no run" in refusal(copy, target)
    assert not target.exists()


def test_the_name_of_the_net_is_needed_where_the_file_has_none(tmp_path):
    model = create_model("cifar_resnet20", num_classes=5)
    source = tmp_path / "in.safetensors"
    save_weights(source, random_variables(model), model, layout="torch")
    sentence = refusal(source, tmp_path / "out.safetensors")
    assert f"{source} does not name its model: give --model" in sentence
    assert sentence.endswith("its arrays fit cifar_resnet20 or cifar_plain20")


def test_a_file_of_another_net(files, tmp_path):
    target = tmp_path / "out.safetensors"
    sentence = refusal(files / "torch.safetensors", target, "--model", "cifar_resnet14")
    assert "does not match the ResNet: it lacks layer1.1.bn1.bias" in sentence
    assert "unknown model" in refusal(
        files / "torch.safetensors", target, "--model", "resnet19"
    )
    assert not target.exists()


def test_nets_that_torch_lacks(tmp_path):
    model = create_model("cifar_preact_resnet8")
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_weights(source, random_variables(model), model, name="cifar_preact_resnet8")
    assert "no net with pre-activation" in refusal(source, target)
    run(source, target, "--layout", "flax")
    assert_same_arrays(target, source)


def test_what_is_there_already_is_kept(files, tmp_path):
    target = tmp_path / "out.safetensors"
    target.write_text("mine")
    source = files / "torch.safetensors"
    sentence = refusal(source, target, "--model", NAME)
    assert sentence == f"{target} exists; give another path, or --force"
    assert target.read_text() == "mine"
    run(source, target, "--model", NAME, "--force")
    assert_same_arrays(target, files / "flax.safetensors")


def test_a_file_may_replace_itself(files, tmp_path):
    path = tmp_path / "net.safetensors"
    shutil.copy(files / "torch.safetensors", path)
    run(path, path, "--model", NAME, "--force")
    assert_same_arrays(path, files / "flax.safetensors")


def test_other_endings_and_missing_folders(files, tmp_path):
    source = files / "torch.safetensors"
    assert "ends in .safetensors" in refusal(source, tmp_path / "out.pth")
    target = tmp_path / "none" / "out.safetensors"
    assert "no folder" in refusal(source, target, "--model", NAME)


@pytest.mark.parametrize(
    "options", ["{", "[]", '{"dtype": "float16"}', '{"shortcut": 3}', '{"scan": true}']
)
def test_options_that_are_not_known(tmp_path, options):
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    metadata = {"model": NAME, "model_options": options}
    write_safetensors(source, {"fc.weight": np.ones((2, 2), np.float32)}, metadata)
    assert "names unknown options of its model" in refusal(source, target)


def test_bfloat16_runs_are_written_in_float32(tmp_path):
    model = create_model(NAME, dtype=jnp.bfloat16)
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_weights(source, random_variables(model), model, name=NAME)
    run(source, target)
    assert read_arrays(target)[0]["fc.weight"].dtype == np.float32
