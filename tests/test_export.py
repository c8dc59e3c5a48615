"""Exported nets run without this library, and compute what the net computes."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax import export

from resnet_jax.cli import main
from resnet_jax.data.transforms import PixelStatistics, normalize, to_unit
from resnet_jax.errors import UserError
from resnet_jax.evaluation.nets import TrainedNet
from resnet_jax.evaluation.protocols import Center, Stored
from resnet_jax.export import PLATFORMS, export_net, image_shape, serialize
from resnet_jax.models import create_model
from resnet_jax.weights import save_weights
from tests.models.reference import random_variables

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
STATISTICS = PixelStatistics(
    np.float32([0.4, 0.5, 0.6])[None, None], np.float32([0.2, 0.3, 0.4])[None, None]
)

WITHOUT_THE_LIBRARY = """
import sys
sys.modules["resnet_jax"] = sys.modules["flax"] = None
import jax, numpy as np
net = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
np.save(sys.argv[3], net.call(np.load(sys.argv[2])))
"""


def net_of(name, **options):
    options = {"num_classes": 5} | options
    model = create_model(name, **options)
    return model, random_variables(model, np.float32(IMAGES))


def trained(name="cifar_resnet8", **fields):
    model, variables = net_of(name)
    values = {
        "source": "made up",
        "name": name,
        "options": {},
        "model": model,
        "variables": variables,
        "statistics": STATISTICS,
        "protocol": Stored(),
        "class_names": ("a", "b", "c", "d", "e"),
    }
    return TrainedNet(**values | fields)


def logits(model, variables, images):
    return model.apply(variables, normalize(to_unit(images), STATISTICS), train=False)


def assert_close(ours, expected, error=1e-5):
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, expected, atol=error * np.abs(expected).max())


@pytest.mark.parametrize(
    ("model", "fold"),
    [
        (lambda: net_of("cifar_resnet8"), True),
        (lambda: net_of("cifar_resnet8"), False),
        (lambda: net_of("cifar_bottleneck_resnet11", scan=True), True),
        (lambda: net_of("cifar_preact_resnet8"), True),  # it cannot be folded
        (lambda: net_of("resnet18", shortcut="A"), True),
        (lambda: net_of("cifar_highway19"), True),
    ],
)
def test_any_batch_gives_the_logits_of_the_net(model, fold):
    net, variables = model()
    content = serialize(net, variables, STATISTICS, (32, 32, 3), fold=fold)
    program = export.deserialize(bytearray(content))
    assert program.platforms == PLATFORMS
    for images in (IMAGES, IMAGES[:1]):
        assert_close(program.call(images), logits(net, variables, images))


def test_a_folded_program_has_no_normalisation_and_takes_images_alone():
    net, variables = net_of("cifar_resnet8")
    for fold, roots in ((True, 0), (False, 7)):
        content = serialize(net, variables, STATISTICS, (32, 32, 3), fold=fold)
        program = export.deserialize(bytearray(content))
        assert [aval.dtype for aval in program.in_avals] == [np.uint8]
        on_each = 3 * roots  # a program for the CPU, one for GPUs, one for TPUs
        assert program.mlir_module().count("stablehlo.rsqrt") == on_each


def test_bfloat16_is_kept_apart_on_the_cpu_wherever_it_was_exported(monkeypatch):
    """``models.barriers.apart`` is in the file of a GPU machine too."""
    net, variables = net_of("cifar_resnet8")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    barriers = {}
    for dtype in ("float32", "bfloat16"):
        content = serialize(net, variables, STATISTICS, (32, 32, 3), dtype=dtype)
        module = export.deserialize(bytearray(content)).mlir_module()
        barriers[dtype] = module.count("optimization_barrier")
    # In float32, only the sums of blocks have one (computed_once).
    assert barriers["bfloat16"] > barriers["float32"]


def test_weights_are_stored_once_for_all_platforms():
    net, variables = net_of("cifar_resnet20")
    content = serialize(net, variables, STATISTICS, (32, 32, 3))
    count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert 4 * count < len(content) < 6 * count


def test_in_bfloat16_logits_stay_float32():
    net, variables = net_of("cifar_resnet8")
    content = serialize(net, variables, STATISTICS, (32, 32, 3), dtype="bfloat16")
    program = export.deserialize(bytearray(content))
    assert "bf16" in program.mlir_module()
    expected = logits(net, variables, IMAGES)
    assert_close(program.call(IMAGES), expected, 0.05)
    assert np.abs(program.call(IMAGES) - expected).max() > 0


def test_the_command_writes_a_file_that_needs_jax_alone(tmp_path, capsys):
    net = trained()
    weights, target = tmp_path / "w.safetensors", tmp_path / "net.jax"
    save_weights(weights, net.variables, net.model, name=net.name)
    flags = ["--mean", "0.4,0.5,0.6", "--std", "0.2,0.3,0.4"]
    arguments = ["export", "--weights", str(weights), *flags, str(target)]
    assert main(arguments) == 0
    assert "uint8 images of 32x32x3 to 5 logits" in capsys.readouterr().out
    facts = json.loads((tmp_path / "net.json").read_text())
    assert facts["input"] == {"dtype": "uint8", "shape": ["batch", 32, 32, 3]}
    assert facts["view"] == Stored().to_json()
    assert facts["checksum"] == net.checksum

    np.save(tmp_path / "images.npy", IMAGES)
    files = [target, tmp_path / "images.npy", tmp_path / "logits.npy"]
    command = [sys.executable, "-c", WITHOUT_THE_LIBRARY, *map(str, files)]
    subprocess.run(command, check=True, cwd=tmp_path)
    expected = logits(net.model, net.variables, IMAGES)
    assert_close(np.load(tmp_path / "logits.npy"), expected)

    assert main(arguments) == 1
    assert "net.jax exists" in capsys.readouterr().err
    assert main([*arguments, "--force"]) == 0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("net.onnx", "docs/export.md"),
        ("net.safetensors", "resnet-jax convert"),
        ("net", "ends in .jax"),
        ("no/folder/net.jax", "there is no folder"),
    ],
)
def test_targets_that_cannot_be_written(name, words, tmp_path):
    with pytest.raises(UserError, match=words):
        export_net(trained(), tmp_path / name)


def test_a_net_without_a_classifier_gives_features(tmp_path):
    net = trained()
    model = net.model.clone(num_classes=None)
    params = {k: v for k, v in net.variables["params"].items() if k != "head"}
    net = dataclasses.replace(
        net, model=model, variables={**net.variables, "params": params}
    )
    facts = export_net(net, tmp_path / "net.jax")
    assert facts["output"]["shape"] == ["batch", 64]
    assert facts["output_is"] == "features"


def test_images_have_the_size_of_the_own_view():
    per_pixel = PixelStatistics(np.zeros((28, 24, 1)), np.ones((28, 24, 1)))
    assert image_shape(trained()) == (32, 32, 3)
    assert image_shape(trained(protocol=Center(16, 20))) == (16, 16, 3)
    assert image_shape(trained(statistics=per_pixel)) == (28, 24, 1)
