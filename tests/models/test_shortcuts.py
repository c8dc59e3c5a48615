"""The shortcut options by themselves (section 3.3 and Table 3)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from resnet_jax.models import BasicBlock, BatchNorm, Conv, shortcuts


class Shortcut(nn.Module):
    """Calls a shortcut inside a compact scope, as a block does."""

    shortcut: shortcuts.Shortcut
    strides: int

    @nn.compact
    def __call__(self, x, like):
        norm = functools.partial(BatchNorm, use_running_average=True)
        return self.shortcut(x, like, self.strides, Conv, norm)


def call(letter, x, like_shape, strides):
    """The result, and the names and shapes of the parameters."""
    module = Shortcut(shortcuts.BY_NAME[letter], strides)
    y, variables = module.init_with_output(jax.random.key(0), x, np.zeros(like_shape))
    return y, jax.tree.map(np.shape, variables.get("params", {}))


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(size=(2, 5, 4, 3)).astype(np.float32)


def test_option_a_keeps_every_strides_th_pixel_and_appends_zeros(x):
    y, params = call("A", x, (2, 3, 2, 7), 2)
    assert params == {}
    assert y.shape == (2, 3, 2, 7)
    for i in range(3):
        for j in range(2):
            np.testing.assert_array_equal(y[:, i, j, :3], x[:, 2 * i, 2 * j])
    assert (np.asarray(y[..., 3:]) == 0).all()


def test_option_a_keeps_the_dtype(x):
    y, _ = call("A", x.astype("bfloat16"), (2, 3, 2, 7), 2)
    assert y.dtype == "bfloat16"


def test_option_a_cannot_remove_channels(x):
    with pytest.raises(ValueError, match=r"from 3 to 2 channels.*projection"):
        call("A", x, (2, 5, 4, 2), 1)


@pytest.mark.parametrize("letter", ["A", "B"])
def test_the_identity_where_the_shape_stays(x, letter):
    y, params = call(letter, x, x.shape, 1)
    assert params == {}
    np.testing.assert_array_equal(y, x)


@pytest.mark.parametrize(
    ("letter", "strides", "like"),
    [("B", 2, (2, 3, 2, 7)), ("B", 1, (2, 5, 4, 7)), ("C", 1, (2, 5, 4, 3))],
)
def test_projections_are_a_1x1_convolution_and_its_norm(x, letter, strides, like):
    y, params = call(letter, x, like, strides)
    assert y.shape == like
    assert params == {
        "shortcut_conv": {"kernel": (1, 1, 3, like[-1])},
        "shortcut_norm": {"scale": (like[-1],), "bias": (like[-1],)},
    }


@pytest.mark.parametrize(("strides", "like"), [(1, (2, 5, 4, 3)), (2, (2, 3, 2, 7))])
def test_plain_nets_add_nothing(x, strides, like):
    assert call("none", x, like, strides) == (None, {})


def test_what_a_projection_creates_does_not_depend_on_the_size_of_the_image():
    """On a 1x1 map a stride changes no shape; the parameters must be there still."""
    norm = functools.partial(BatchNorm, use_running_average=True)
    block = BasicBlock(8, 2, norm, shortcuts.Projection())
    trees = [
        jax.tree.structure(block.init(jax.random.key(0), jnp.ones((1, side, side, 8))))
        for side in (1, 4)
    ]
    assert trees[0] == trees[1]
