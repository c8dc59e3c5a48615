"""What the tests of the models share: layers in NumPy, and variables at random."""

import contextlib
import functools

import jax
import numpy as np
import pytest

EPSILON = 1e-5

KEY = jax.random.key(0, impl="unsafe_rbg")
"""Of a generator that compiles in half the time; the library takes any."""


def convolution(x, kernel, strides=1, dilation=1, groups=1):
    """A convolution padded by half the kernel on every side, as nested loops."""
    size, _, _, features = kernel.shape
    reach = size // 2 * dilation
    height, width = x.shape[1:3]
    padded = np.pad(x, ((0, 0), (reach, reach), (reach, reach), (0, 0)))
    y = np.zeros((len(x), -(-height // strides), -(-width // strides), features))
    taps = np.arange(size) * dilation
    for i in range(y.shape[1]):
        for j in range(y.shape[2]):
            window = padded[:, i * strides + taps][:, :, j * strides + taps]
            parts = zip(
                np.split(window, groups, axis=-1),
                np.split(kernel, groups, axis=-1),
                strict=True,
            )
            products = [np.tensordot(part, weights, 3) for part, weights in parts]
            y[:, i, j] = np.concatenate(products, -1)
    return y


def batch_norm(x, params, stats):
    """By the running statistics."""
    unit = (x - stats["mean"]) / np.sqrt(stats["var"] + EPSILON)
    return unit * params["scale"] + params["bias"]


def relu(x):
    return np.maximum(x, 0)


def max_pool(x):
    """3x3 maxima of stride 2, the map framed by one pixel of minus infinity."""
    frame = ((0, 0), (1, 1), (1, 1), (0, 0))
    padded = np.pad(x, frame, constant_values=-np.inf)
    height, width = (-(-side // 2) for side in x.shape[1:3])
    windows = [
        padded[:, i : i + 2 * height - 1 : 2, j : j + 2 * width - 1 : 2]
        for i in range(3)
        for j in range(3)
    ]
    return np.max(windows, 0)


class Layers:
    """A block's layers, in NumPy, by the names of its variables."""

    def __init__(self, variables):
        self.params = variables["params"]
        self.stats = variables["batch_stats"]

    def conv(self, x, name, strides=1, dilation=1, groups=1):
        kernel = np.asarray(self.params[name]["kernel"])
        return convolution(x, kernel, strides, dilation, groups)

    def norm(self, x, name):
        return batch_norm(x, self.params[name], self.stats[name])


def random_variables(module, x, seed=0, dtype=np.float32):
    """Variables without the zeros and ones behind which a mistake could hide."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        if name in ("scale", "var"):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(dtype)
        # Such that maps keep their size, whatever the number of channels.
        std = np.sqrt(2 / np.prod(leaf.shape[-4:-1])) if name == "kernel" else 0.3
        return rng.normal(0, std, leaf.shape).astype(dtype)

    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    return jax.tree_util.tree_map_with_path(draw, shapes)


def apply(module, variables, x, **options):
    """The output, convolved in full float32 on every device."""
    call = functools.partial(module.apply, mutable=["batch_stats"], **options)
    with jax.default_matmul_precision("highest"):
        return jax.jit(call)(variables, x)[0]


@contextlib.contextmanager
def double_precision():
    """Float64 arrays stay float64: for exact comparisons of whole nets."""
    with jax.enable_x64(True):
        yield


def assert_trees_equal(ours, expected):
    """The same tree, bit for bit."""
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(ours),
        jax.tree.leaves(expected),
        strict=True,
    ):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype, path
        assert a.shape == b.shape, path
        assert a.tobytes() == b.tobytes(), path


def assert_trees_close(ours, expected, error=1e-9):
    """The same tree, each leaf within ``error`` of its largest magnitude."""
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(ours),
        jax.tree.leaves(expected),
        strict=True,
    ):
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape, path
        scale = max(np.abs(b).max(), 1e-3)
        assert np.abs(a - b).max() <= error * scale, jax.tree_util.keystr(path)


def torch_or_skip():
    return pytest.importorskip("torch", reason="torch is the reference of this test")
