"""The standard deviations of Fig. 7, against NumPy and torch."""

import re

import jax
import numpy as np
import pytest
from flax import linen as nn

import resnet_jax
from resnet_jax.analysis.responses import layer_responses, responses_of_run
from resnet_jax.errors import UserError
from resnet_jax.evaluation.saved_run import load_run
from resnet_jax.models import (
    BasicBlock,
    BottleneckBlock,
    CifarStem,
    PreActBasicBlock,
    ResNet,
    shortcuts,
)
from resnet_jax.models.highway import HighwayNet
from resnet_jax.models.trees import stack_blocks
from tests.conftest import make_console
from tests.training.helpers import parts


def make_net(stage_sizes=(1, 3), block=BasicBlock, shortcut="A", **options):
    return ResNet(
        stage_sizes,
        block,
        shortcuts.BY_NAME[shortcut],
        stem=CifarStem,
        width=4,
        num_classes=3,
        **options,
    )


def images_of(count, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(0.3, 1.0, (count, 12, 12, 3)).astype(np.float32)


def init(net):
    return jax.jit(lambda key: net.init(key, images_of(1), train=False))(
        jax.random.key(0)
    )


def captured_maps(net, variables, images):
    """What each module returned, as flax itself keeps it."""

    def apply(variables):
        return net.apply(
            variables, images, capture_intermediates=True, mutable=["intermediates"]
        )

    _, captured = jax.jit(apply)(variables)
    return jax.device_get(captured["intermediates"])


def uneven_variables(net):
    """Variables whose normalisations do something different in each channel."""
    rng = np.random.default_rng(1)
    variables = init(net)
    return jax.tree.map(
        lambda leaf: (
            leaf * rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
            + rng.uniform(0.0, 0.3, leaf.shape).astype(np.float32)
        ),
        variables,
    )


def in_batches(images, *sizes):
    return np.split(images, np.cumsum(sizes)[:-1])


@pytest.mark.parametrize("shortcut", ["none", "A", "B"])
def test_it_is_the_deviation_of_all_normalised_outputs_together(shortcut):
    net, images = make_net(shortcut=shortcut), images_of(7)
    variables = uneven_variables(net)
    maps = captured_maps(net, variables, images)
    expected = {"stem/conv": maps["stem"]["norm"]}
    for stage, size in (("stage1", 1), ("stage2", 3)):
        for block in range(1, size + 1):
            for conv in (1, 2):
                name = f"{stage}/block{block}/conv{conv}"
                expected[name] = maps[stage][f"block{block}"][f"norm{conv}"]
    found = layer_responses(net, variables, in_batches(images, 3, 3, 1))
    assert [layer for layer, _ in found] == list(expected)
    for layer, std in found:
        (outputs,) = expected[layer]["__call__"]
        assert std == pytest.approx(np.std(outputs, dtype=np.float64), rel=1e-5)


def torch_responses(variables, images, names, **options):
    """The deviations of the outputs of torch's modules, in the order of the calls."""
    torch_reference = pytest.importorskip("tests.torch_reference")
    net, outputs = torch_reference.make_net(variables, **options), {}

    def keep(name):
        def hook(module, inputs, output):
            outputs[name] = output.numpy()

        return hook

    for name, module in net.named_modules():
        if re.fullmatch(names, name):
            module.register_forward_hook(keep(name))
    torch_reference.evaluate(net, images)
    return [output.std() for output in outputs.values()]


SMALL = {"stage_sizes": (1, 3), "stem": "cifar", "width": 4, "num_classes": 3}


@pytest.mark.parametrize(
    ("ours", "reference", "names"),
    [
        ({"shortcut": "none"}, {"shortcut": "none"}, r"(layer\d\.\d\.)?bn[12]"),
        ({"shortcut": "A"}, {"shortcut": "A"}, r"(layer\d\.\d\.)?bn[12]"),
        # 1x1 convolutions do not count.
        (
            {"shortcut": "B", "block": BottleneckBlock},
            {"shortcut": "B", "bottleneck": True},
            r"bn1|layer\d\.\d\.bn2",
        ),
        # The second convolution of a block meets the addition as it is.
        (
            {"shortcut": "A", "block": PreActBasicBlock},
            {"shortcut": "A", "preactivation": True},
            r"bn1|layer\d\.\d\.(bn2|conv2)",
        ),
    ],
    ids=["plain", "residual", "bottleneck", "preactivation"],
)
@pytest.mark.parametrize("scan", [False, True])
def test_torchs_hooks_see_the_same(ours, reference, names, scan):
    net, images = make_net(**ours), images_of(5)
    variables = uneven_variables(net)
    expected = torch_responses(variables, images, names, **(SMALL | reference))
    if scan:
        net, variables = net.clone(scan=True), stack_blocks(variables)
    found = layer_responses(net, variables, in_batches(images, 4, 1))
    np.testing.assert_allclose([std for _, std in found], expected, rtol=1e-4)


def test_a_scanned_net_names_its_layers_in_the_order_of_the_unrolled_one():
    net = make_net((1, 11))
    variables = uneven_variables(net)
    expected = layer_responses(net, variables, [images_of(2)])
    assert expected[3].layer == "stage2/block1/conv1"
    assert expected[-1].layer == "stage2/block11/conv2"
    scanned, stacked = net.clone(scan=True, remat=True), stack_blocks(variables)
    found = layer_responses(scanned, stacked, [images_of(2)])
    assert [layer for layer, _ in found] == [layer for layer, _ in expected]
    np.testing.assert_allclose(
        [std for _, std in found], [std for _, std in expected], rtol=1e-5
    )


def test_small_deviations_from_a_large_mean_are_exact():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Conv(1, (3, 3), use_bias=False)(x)

    net, images = Net(), np.zeros((64, 8, 8, 1), np.float32)
    images += 4096 + np.arange(64, dtype=np.float32)[:, None, None, None] / 64
    kernel = np.zeros((3, 3, 1, 1), np.float32)
    kernel[1, 1] = 1
    (found,) = layer_responses(
        net, {"params": {"Conv_0": {"kernel": kernel}}}, in_batches(images, 10, 54)
    )
    # Of 0, 1, ..., 63: the root of (64^2 - 1) / 12.
    assert found.std == pytest.approx(np.sqrt((64**2 - 1) / 12) / 64, rel=1e-6)


def test_nets_without_normalisation_answer_with_their_convolutions():
    net, images = HighwayNet((4, 8), (1, 1), 3), images_of(2)
    variables = init(net)
    (expected,) = captured_maps(net, variables, images)["stage1"]["conv"]["__call__"]
    found = dict(layer_responses(net, variables, [images]))
    assert found["stage1/conv"] == pytest.approx(np.std(expected), rel=1e-5)
    assert "bottleneck" not in found


def test_errors_say_what_cannot_be_measured():
    net = make_net()
    with pytest.raises(UserError, match="measured on no images"):
        layer_responses(net, uneven_variables(net), [])

    class Dense(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Dense(2)(x.reshape(len(x), -1))

    dense, images = Dense(), images_of(2)
    variables = init(dense)
    with pytest.raises(UserError, match="Dense has no 3x3 convolution"):
        layer_responses(dense, variables, [images])


@pytest.mark.parametrize("resident", [True, False])
def test_the_responses_of_a_run_are_those_of_its_last_net_on_every_example(
    tiny_config, tmp_path, resident
):
    tiny_config.training.steps = 4
    tiny_config.data.resident = resident
    resnet_jax.train(tiny_config, tmp_path, make_console())
    found = responses_of_run(tmp_path)

    dataset = parts(tiny_config).dataset
    images = np.float32(dataset.test.arrays(1)[0]) / 255
    images -= (np.float64(dataset.train.arrays(1)[0]) / 255).mean(0)
    assert len(images) == 360  # of which batches of 32 leave a part
    run = load_run(tmp_path)
    assert run.step == 4
    expected = layer_responses(run.model, jax.device_get(run.variables), [images])
    assert len(found) == 7
    assert [layer for layer, _ in found] == [layer for layer, _ in expected]
    np.testing.assert_allclose(
        [std for _, std in found], [std for _, std in expected], rtol=1e-4
    )


def test_a_run_that_is_not_there_has_no_responses(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        responses_of_run(tmp_path)
