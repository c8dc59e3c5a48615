"""Gradient norms against torch, differences and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from resnet_jax.analysis.gradients import gradient_norms
from resnet_jax.errors import UserError
from resnet_jax.models import CifarStem, ResNet, shortcuts
from resnet_jax.models.highway import HighwayNet
from resnet_jax.models.trees import stack_blocks

LABELS = np.array([0, 2, 1, 1])


def make_net(shortcut, stage_sizes=(1, 3), **options):
    return ResNet(
        stage_sizes,
        shortcut=shortcuts.BY_NAME[shortcut],
        stem=CifarStem,
        width=4,
        num_classes=3,
        **options,
    )


def images_of(count=4):
    rng = np.random.default_rng(0)
    return rng.normal(0.0, 1.0, (count, 12, 12, 3)).astype(np.float32)


def init(net):
    return jax.jit(lambda key: net.init(key, images_of(1), train=False))(
        jax.random.key(0)
    )


def torch_norms(variables, images, train, **options):
    """By torch's names: the norms at kernels, and at output maps."""
    torch = pytest.importorskip("torch")
    from tests import torch_reference

    net = torch_reference.make_net(variables, width=4, num_classes=3, **options)
    net.train(train)
    convs = {
        name: module
        for name, module in net.named_modules()
        if isinstance(module, torch.nn.Conv2d)
    }
    outputs = {}

    def keep(name):
        def hook(module, inputs, output):
            output.retain_grad()
            outputs[name] = output

        return hook

    for name, module in convs.items():
        module.register_forward_hook(keep(name))
    with torch_reference.one_torch_thread():
        logits = net(torch.tensor(images.transpose(0, 3, 1, 2), dtype=torch.float64))
        torch.nn.functional.cross_entropy(logits, torch.tensor(LABELS)).backward()
    return (
        [convs[name].weight.grad.norm().item() for name in outputs],
        [output.grad.norm().item() for output in outputs.values()],
    )


@pytest.mark.parametrize("shortcut", ["none", "A", "C"])
@pytest.mark.parametrize("train", [True, False])
def test_torch_has_the_same_norms(shortcut, train):
    net, images = make_net(shortcut), images_of()
    variables = init(net)
    expected = torch_norms(
        variables,
        images,
        train,
        stage_sizes=(1, 3),
        stem="cifar",
        shortcut=shortcut,
    )
    for of, norms in zip(("kernels", "outputs"), expected):
        found = gradient_norms(net, variables, images, LABELS, of=of, train=train)
        assert [layer for layer, _ in found[:3]] == [
            "stem/conv",
            "stage1/block1/conv1",
            "stage1/block1/conv2",
        ]
        np.testing.assert_allclose([norm for _, norm in found], norms, rtol=1e-3)


@pytest.mark.parametrize("of", ["kernels", "outputs"])
@pytest.mark.parametrize("remat", [False, True])
def test_a_scanned_net_has_the_norms_of_the_unrolled_one(of, remat):
    net = make_net("B")
    variables, images = init(net), images_of()
    expected = gradient_norms(net, variables, images, LABELS, of=of)
    found = gradient_norms(
        net.clone(scan=True, remat=remat),
        stack_blocks(variables),
        images,
        LABELS,
        of=of,
    )
    assert [layer for layer, _ in found] == [layer for layer, _ in expected]
    # One projection and 1 + 2 x 4 convolutions.
    assert len(found) == 10
    np.testing.assert_allclose(
        [norm for _, norm in found], [norm for _, norm in expected], rtol=1e-3
    )


def test_the_norm_is_the_steepest_slope_of_the_loss():
    net, images = HighwayNet((4, 8), (1, 1), 3, bottleneck_features=6), images_of()
    variables = init(net)

    @jax.jit
    def loss(kernel):
        params = variables["params"] | {
            "bottleneck": variables["params"]["bottleneck"] | {"kernel": kernel}
        }
        logits = net.apply({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()

    kernel = variables["params"]["bottleneck"]["kernel"]
    direction = jax.grad(loss)(kernel)
    direction /= jnp.linalg.norm(direction)
    step = 1e-2
    slope = (loss(kernel + step * direction) - loss(kernel - step * direction)) / (
        2 * step
    )
    norms = dict(gradient_norms(net, variables, images, LABELS))
    assert norms["bottleneck"] == pytest.approx(float(slope), rel=1e-2)


class Chain(nn.Module):
    """Convolutions of one channel that scale, and a mean as the only logit but one."""

    depth: int

    @nn.compact
    def __call__(self, x, train):
        for _ in range(self.depth):
            x = nn.Conv(1, (1, 1), use_bias=False)(x)
        logit = x.mean((1, 2, 3))
        return jnp.stack([logit, jnp.zeros_like(logit)], -1)


@pytest.mark.parametrize("scale", [1e-4, 1.0])
def test_norms_too_small_to_square_are_not_zero(scale):
    net = Chain(9)
    params = {
        f"Conv_{index}": {"kernel": np.full((1, 1, 1, 1), scale, np.float32)}
        for index in range(9)
    }
    images = np.ones((1, 1, 1, 1), np.float32)
    found = gradient_norms(
        net, {"params": params}, images, np.array([0]), of="outputs", train=False
    )
    # d loss / d logit is sigmoid(logit) - 1; each layer below scales it once more.
    top = 1 - 1 / (1 + np.exp(-(scale**9)))
    expected = [top * scale ** (8 - index) for index in range(9)]
    np.testing.assert_allclose([norm for _, norm in found], expected, rtol=1e-5)


def test_other_gradients_are_refused():
    net = make_net("A", (1,))
    with pytest.raises(UserError, match="kernels or outputs, not 'weights'"):
        gradient_norms(net, init(net), images_of(), LABELS, of="weights")

    class Dense(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Dense(3)(x.reshape(len(x), -1))

    variables = init(Dense())
    with pytest.raises(UserError, match="Dense has no convolution"):
        gradient_norms(Dense(), variables, images_of(), LABELS)
