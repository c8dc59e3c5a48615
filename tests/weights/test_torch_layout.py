"""The torch layout against the state dicts of torch's own nets.

torchvision and timm are compared where they are installed; tests/torch_reference.py,
which needs torch alone, has the same names.
"""

import contextlib
import copy
import functools

import jax
import numpy as np
import pytest

from resnet_jax.errors import UserError
from resnet_jax.models import (
    BasicBlock,
    DeepStem,
    OverlappingStage,
    Residual,
    ResNet,
    create_model,
    list_models,
    shortcuts,
    stack_blocks,
)
from resnet_jax.models.vgg import VGG
from resnet_jax.weights import load_weights, save_weights
from resnet_jax.weights.shapes import abstract_arrays
from resnet_jax.weights.torch_layout import counters, torch_layout

torch = pytest.importorskip("torch", reason="torch is the reference of these tests")

import safetensors.torch  # noqa: E402  (needs torch)

from tests import torch_reference  # noqa: E402
from tests.torch_peers import import_peer  # noqa: E402

TORCHVISION = (
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d",
    "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2",
    "vgg16", "vgg16_bn", "vgg19", "vgg19_bn",
)  # fmt: skip
OURS_ALONE = ("cifar_", "mnist_", "plain", "preact_", "vgg")
PAPERS_OWN = ("_a", "_c", "_v1")
TIMM = [
    name
    for name in list_models()
    if not name.startswith(OURS_ALONE) and not name.endswith(PAPERS_OWN)
]
CIFAR = {"stage_sizes": (3, 3, 3), "stem": "cifar"}
FIFTY = {"stage_sizes": (3, 4, 6, 3), "stem": "imagenet", "bottleneck": True}
REFERENCE = {
    "resnet18": {"stage_sizes": (2, 2, 2, 2), "stem": "imagenet"},
    "resnet34_a": {"stage_sizes": (3, 4, 6, 3), "stem": "imagenet", "shortcut": "A"},
    "resnet50": FIFTY,
    "resnet50_v1": FIFTY | {"stride_version": "v1"},
    "plain34": {"stage_sizes": (3, 4, 6, 3), "stem": "imagenet", "shortcut": "none"},
    "cifar_resnet20": CIFAR | {"shortcut": "A"},
    "cifar_resnet20_b": CIFAR | {"shortcut": "B"},
    "cifar_resnet20_c": CIFAR | {"shortcut": "C"},
    "cifar_plain20": CIFAR | {"shortcut": "none"},
    "cifar_bottleneck_resnet29": CIFAR | {"bottleneck": True, "stride_version": "v1"},
}
NARROW_VGG = {"stage_convs": (1, 2, 1), "widths": (6, 8, 5), "hidden_features": 12}


class TorchVGG(torch.nn.Module):
    """A VGG net with torchvision's names, of any width."""

    def __init__(self, model):
        super().__init__()
        layers, before = [], 3
        for size, width in zip(model.stage_convs, model.widths):
            for _ in range(size):
                layers.append(torch.nn.Conv2d(before, width, 3, padding=1))
                if model.batch_norm:
                    layers.append(torch.nn.BatchNorm2d(width))
                layers.append(torch.nn.ReLU())
                before = width
            layers.append(torch.nn.MaxPool2d(2))
        self.features = torch.nn.Sequential(*layers)
        self.avgpool = torch.nn.AdaptiveAvgPool2d(7)
        hidden = model.hidden_features
        self.classifier = torch.nn.Sequential(
            torch.nn.Linear(before * 49, hidden),
            torch.nn.ReLU(),
            torch.nn.Dropout(),
            torch.nn.Linear(hidden, hidden),
            torch.nn.ReLU(),
            torch.nn.Dropout(),
            torch.nn.Linear(hidden, model.num_classes),
        )

    def forward(self, images):
        return self.classifier(self.avgpool(self.features(images)).flatten(1))


def torch_shapes(net):
    return {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}


def our_shapes(model):
    """The shapes under torch's keys, the counters' too."""
    table = torch_layout(model, abstract_arrays(model))
    shapes = {stored.key: stored.shape for stored in table.values()}
    assert len(shapes) == len(table)
    return shapes | {name: array.shape for name, array in counters(table).items()}


@functools.cache
def shapes_of(name):
    return our_shapes(create_model(name))


def randomized(net):
    """The net with statistics and affine maps that reveal any mistake."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                for tensor in (module.weight, module.running_var):
                    tensor.uniform_(0.5, 1.5, generator=generator)
                for tensor in (module.bias, module.running_mean):
                    tensor.normal_(0, 0.1, generator=generator)
                module.num_batches_tracked.fill_(7)
    return net.eval()


@contextlib.contextmanager
def one_torch_thread():
    """Torch's pool and XLA's, on few cores, wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def relative_error(model, variables, net, size=64, channels=3):
    """Between our logits and the torch net's, which computes in float64."""
    rng = np.random.default_rng(0)
    images = rng.normal(0.3, 1, (2, size, size, channels)).astype(np.float32)
    with one_torch_thread(), torch.no_grad():
        tensor = torch.tensor(images.transpose(0, 3, 1, 2)).double()
        expected = copy.deepcopy(net).double()(tensor).numpy()
    with jax.default_matmul_precision("highest"):
        found = np.asarray(jax.jit(model.apply)(variables, images))
    assert found.shape == expected.shape
    return np.abs(found - expected).max() / np.abs(expected).max()


def assert_returns(path, model, variables, net):
    """What is saved in the torch layout is the net's own state dict, bit for bit."""
    save_weights(path, variables, model, layout="torch")
    found = safetensors.torch.load_file(path)
    assert all(tensor.is_contiguous() for tensor in found.values())
    for name, tensor in net.state_dict().items():
        assert found[name].dtype == tensor.dtype
        if name.endswith("num_batches_tracked"):
            assert found[name] == 0
        else:
            assert torch.equal(found[name], tensor), name
    copy.deepcopy(net).load_state_dict(found, strict=True)


def save(net, tmp_path, kind):
    path = tmp_path / f"theirs.{kind}"
    if kind == "safetensors":
        safetensors.torch.save_file(net.state_dict(), path)
    else:
        torch.save(net.state_dict(), path)
    return path


# Names and shapes


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_has_the_same_names_and_shapes(name):
    models = import_peer("torchvision.models")
    with torch.device("meta"):
        net = models.get_model(name)
    assert shapes_of(name) == torch_shapes(net)


@pytest.mark.parametrize("name", TIMM)
def test_timm_has_the_same_names_and_shapes(name, monkeypatch):
    timm = import_peer("timm")
    # Values are not looked at, and initialising them takes longer than all else.
    resnet = timm.models.resnet.ResNet
    monkeypatch.setattr(resnet, "init_weights", lambda *args, **kwargs: None)
    with torch.device("meta"):
        net = timm.create_model(name)
    assert isinstance(net, resnet)
    assert shapes_of(name) == torch_shapes(net)


@pytest.mark.parametrize("name", REFERENCE)
def test_the_reference_has_the_same_names_and_shapes(name):
    classes = create_model(name).num_classes
    options = REFERENCE[name] | {"num_classes": classes}
    with torch.device("meta"):
        net = torch_reference.TorchResNet(**options)
    assert shapes_of(name) == torch_shapes(net)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_vgg_nets_have_the_same_names_and_shapes(batch_norm):
    model = VGG(**NARROW_VGG, batch_norm=batch_norm)
    assert our_shapes(model) == torch_shapes(TorchVGG(model))


@pytest.mark.parametrize(
    "model",
    [
        create_model("cifar_resnet8_b", squeeze_excite=True),
        ResNet((1, 3), shortcut=shortcuts.BY_NAME["pooled"], stem=DeepStem, scan=True),
        create_model("resnext50_32x4d", num_classes=None).clone(stage_sizes=(1, 1)),
        VGG(**NARROW_VGG, batch_norm=True),
    ],
    ids=["squeeze", "deep stem", "groups", "vgg"],
)
def test_every_array_returns_as_it_was(model):
    arrays = abstract_arrays(model, channels=1)
    rng = np.random.default_rng(0)
    for path, stored in torch_layout(model, arrays).items():
        array = rng.normal(size=arrays[path].shape).astype(np.float32)
        there = stored.to_file(array)
        assert there.shape == stored.shape
        back = stored.from_file(there)
        np.testing.assert_array_equal(back, array)
        assert there.flags.c_contiguous
        assert back.flags.c_contiguous


def test_the_first_dense_layer_of_vgg_reads_channels_first():
    model = VGG(**NARROW_VGG)
    stored = torch_layout(model, abstract_arrays(model))["params/fc1/kernel"]
    rows = np.arange(7 * 7 * 5, dtype=np.float32)
    kernel = rows[:, None] + 1000 * np.arange(12, dtype=np.float32)
    weight = stored.to_file(kernel)
    assert weight.shape == (12, 245)
    for y, x, channel, out in [(0, 0, 0, 0), (3, 5, 2, 1), (6, 1, 4, 11)]:
        ours = kernel[(y * 7 + x) * 5 + channel, out]
        assert weight[out, channel * 49 + y * 7 + x] == ours
    np.testing.assert_array_equal(stored.from_file(weight), kernel)


class OwnBlock(BasicBlock):
    pass


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (create_model("preact_resnet200"), "pre-activation"),
        (create_model("plain18", normalization="none"), "without normalisation"),
        (create_model("resnet18", shortcut="shortcut_gate"), "the shortcut Gated"),
        (create_model("cifar_preact_resnet20"), "pre-activation"),
        (create_model("cifar_wide_resnet10_2"), "pre-activation"),
        (create_model("cifar_highway19"), "HighwayNet"),
        (
            ResNet((1, 1), stage=functools.partial(OverlappingStage, every=1, span=2)),
            "the stage OverlappingStage",
        ),
        (ResNet((1, 1), block=OwnBlock), "the block OwnBlock"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_nets_that_torch_lacks_are_refused(model, reason):
    with pytest.raises(UserError, match=reason) as error:
        torch_layout(model, abstract_arrays(model))
    assert "flax layout" in str(error.value)
    assert "\n" not in str(error.value)


def test_other_modules_are_refused():
    arrays = {"params/layer/kernel": np.zeros((2, 2))}
    with pytest.raises(UserError, match="have no net like Residual"):
        torch_layout(Residual(np.tanh), arrays)


# Values


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("resnet18", "pth"),
        ("resnet50", "pth"),
        ("cifar_resnet20", "pth"),
        ("cifar_resnet20_b", "safetensors"),
    ],
)
def test_the_reference_computes_the_same_and_comes_back(tmp_path, name, kind):
    model = create_model(name, num_classes=10)
    torch.manual_seed(0)
    net = randomized(torch_reference.TorchResNet(**REFERENCE[name], num_classes=10))
    variables = load_weights(save(net, tmp_path, kind), model)
    assert relative_error(model, variables, net) < 1e-5
    assert_returns(tmp_path / "ours.safetensors", model, variables, net)


@pytest.mark.parametrize(
    ("library", "name", "kind"),
    [
        ("torchvision.models", "resnet18", "pth"),
        ("timm", "resnet26d", "safetensors"),
        ("timm", "resnet14t", "pth"),
        ("timm", "seresnet18", "safetensors"),
        ("timm", "resnext50_32x4d", "pth"),
    ],
)
def test_their_nets_compute_the_same_and_come_back(tmp_path, library, name, kind):
    peer = import_peer(library)
    create = peer.create_model if library == "timm" else peer.get_model
    model = create_model(name, num_classes=10)
    torch.manual_seed(0)
    net = randomized(create(name, num_classes=10))
    variables = load_weights(save(net, tmp_path, kind), model)
    assert relative_error(model, variables, net) < 1e-5
    assert_returns(tmp_path / "ours.safetensors", model, variables, net)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_vgg_nets_compute_the_same_and_come_back(tmp_path, batch_norm):
    model = VGG(**NARROW_VGG, batch_norm=batch_norm, num_classes=4)
    torch.manual_seed(0)
    net = randomized(TorchVGG(model))
    path = save(net, tmp_path, "pth")
    variables = load_weights(path, model)
    # More pixels than 7x7 before the classifier, so that the order of pooling counts.
    assert relative_error(model, variables, net) < 1e-5
    assert_returns(tmp_path / "ours.safetensors", model, variables, net)
    features = load_weights(path, model.clone(num_classes=None))
    assert set(features["params"]) == {"stage1", "stage2", "stage3"}
    # For new classes the other dense layers are kept.
    tuned = load_weights(path, model.clone(num_classes=9), new_head=True)
    assert tuned["params"]["head"]["kernel"].shape == (12, 9)
    np.testing.assert_array_equal(
        tuned["params"]["fc1"]["kernel"], variables["params"]["fc1"]["kernel"]
    )


def test_a_grey_net_without_a_classifier(tmp_path):
    net = torch_reference.TorchResNet(**REFERENCE["cifar_resnet20"], num_classes=10)
    net.conv1 = torch.nn.Conv2d(1, 16, 3, padding=1, bias=False)
    net.fc = torch.nn.Identity()
    net = randomized(net)
    model = create_model("cifar_resnet20", num_classes=None)
    variables = load_weights(save(net, tmp_path, "pth"), model)
    assert variables["params"]["stem"]["conv"]["kernel"].shape == (3, 3, 1, 16)
    assert relative_error(model, variables, net, 32, channels=1) < 1e-5
    assert_returns(tmp_path / "ours.safetensors", model, variables, net)


def test_a_scanned_net_takes_and_gives_the_same_files(tmp_path):
    net = torch_reference.TorchResNet(**REFERENCE["cifar_resnet20_b"], num_classes=10)
    path = save(randomized(net), tmp_path, "pth")
    unrolled = load_weights(path, create_model("cifar_resnet20_b", scan=False))
    model = create_model("cifar_resnet20_b", scan=True)
    scanned = load_weights(path, model)
    same = jax.tree.map(np.array_equal, scanned, stack_blocks(unrolled))
    assert jax.tree.all(same)
    assert_returns(tmp_path / "ours.safetensors", model, scanned, net)
