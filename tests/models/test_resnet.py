"""The whole net: its maps, names, dtypes, initialisation and options."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from resnet_jax.analysis.complexity import abstract_variables
from resnet_jax.models import create_model


def images_of(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def variables():
    """Of cifar_resnet8 for 10 classes: random kernels, the rest as they start."""
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        if path[-1].key == "kernel":
            std = np.sqrt(2 / np.prod(leaf.shape[:-1]))
            return rng.normal(0, std, leaf.shape).astype(np.float32)
        fill = 1 if path[-1].key in ("scale", "var") else 0
        return np.full(leaf.shape, fill, np.float32)

    return jax.tree_util.tree_map_with_path(
        draw, abstract_variables(create_model("cifar_resnet8"), (8, 8, 3))
    )


def train_pass(model, variables, images):
    """Logits and new statistics."""
    apply = functools.partial(model.apply, train=True, mutable=["batch_stats"])
    logits, updated = jax.jit(apply)(variables, images)
    return logits, updated["batch_stats"]


def features(model, variables, images):
    return jax.jit(functools.partial(model.apply, method="features"))(variables, images)


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("resnet34", 224, [(112, 64), (56, 64), (28, 128), (14, 256), (7, 512)]),
        ("resnet50", 224, [(112, 64), (56, 256), (28, 512), (14, 1024), (7, 2048)]),
        ("resnet50", 225, [(113, 64), (57, 256), (29, 512), (15, 1024), (8, 2048)]),
        ("plain18", 97, [(49, 64), (25, 64), (13, 128), (7, 256), (4, 512)]),
        ("cifar_resnet20", 32, [(32, 16), (32, 16), (16, 32), (8, 64)]),
    ],
)
@pytest.mark.parametrize("stride_version", ["v1", "v1.5"])
def test_features_are_the_maps_of_table_1(name, size, expected, stride_version):
    model = create_model(name, stride_version=stride_version)
    maps = jax.eval_shape(
        lambda v, x: model.apply(v, x, method="features"),
        abstract_variables(model, (size, size, 3)),
        jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32),
    )
    assert [m.shape for m in maps] == [(2, side, side, c) for side, c in expected]


def test_features_of_an_oblong_image():
    model = create_model("resnet18")
    maps = jax.eval_shape(
        lambda v, x: model.apply(v, x, method="features"),
        abstract_variables(model, (224, 224, 3)),
        jax.ShapeDtypeStruct((1, 96, 130, 3), jnp.float32),
    )
    sides = [m.shape[1:3] for m in maps]
    assert sides == [(48, 65), (24, 33), (12, 17), (6, 9), (3, 5)]


def test_pooled_features_and_logits_follow_from_the_last_map(variables):
    images = images_of((3, 8, 8, 3))
    model = create_model("cifar_resnet8")
    last_map = np.asarray(features(model, variables, images)[-1])
    pooled = last_map.mean((1, 2), dtype=np.float64)
    head = variables["params"]["head"]
    logits = pooled @ np.asarray(head["kernel"]) + np.asarray(head["bias"])

    headless = create_model("cifar_resnet8", num_classes=None)
    body = {name: p for name, p in variables["params"].items() if name != "head"}
    shapes = abstract_variables(headless, (8, 8, 3))["params"]
    assert jax.tree.structure(shapes) == jax.tree.structure(body)
    np.testing.assert_allclose(
        jax.jit(headless.apply)({**variables, "params": body}, images),
        pooled,
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        jax.jit(model.apply)(variables, images), logits, rtol=1e-4, atol=1e-5
    )


def names(model):
    params = abstract_variables(model, (32, 32, 3))["params"]
    return set(traverse_util.flatten_dict(params, sep="/"))


def test_parameter_names_of_a_net_of_basic_blocks():
    expected = {"stem/conv/kernel", "head/kernel", "head/bias"}
    norms = ["stem/norm"]
    for stage in (1, 2, 3):
        block = f"stage{stage}/block1"
        expected |= {f"{block}/conv1/kernel", f"{block}/conv2/kernel"}
        norms += [f"{block}/norm1", f"{block}/norm2"]
        if stage > 1:
            expected.add(f"{block}/shortcut_conv/kernel")
            norms.append(f"{block}/shortcut_norm")
    expected |= {f"{norm}/{leaf}" for norm in norms for leaf in ("scale", "bias")}
    assert names(create_model("cifar_resnet8", shortcut="B")) == expected


def test_parameter_names_of_a_bottleneck_net():
    found = names(create_model("resnet50"))
    blocks = {tuple(name.split("/")[:2]) for name in found if name[:5] == "stage"}
    sizes = {1: 3, 2: 4, 3: 6, 4: 3}
    assert blocks == {
        (f"stage{stage}", f"block{block}")
        for stage, size in sizes.items()
        for block in range(1, size + 1)
    }
    last = {name for name in found if name.startswith("stage2/block3/")}
    assert last == {
        f"stage2/block3/{layer}"
        for i in (1, 2, 3)
        for layer in (f"conv{i}/kernel", f"norm{i}/scale", f"norm{i}/bias")
    }


def test_statistics_bear_the_names_of_their_norms():
    variables = abstract_variables(create_model("resnet18"), (32, 32, 3))
    paths = {
        collection: {
            path[:-1]
            for path in traverse_util.flatten_dict(variables[collection])
            if path[-1] in ("scale", "mean")
        }
        for collection in ("params", "batch_stats")
    }
    assert paths["params"] == paths["batch_stats"]


def test_bfloat16_keeps_parameters_statistics_and_logits_in_float32(variables):
    images = images_of((4, 8, 8, 3))
    single = create_model("cifar_resnet8")
    half = create_model("cifar_resnet8", dtype=jnp.bfloat16)
    created = jax.eval_shape(half.init, jax.random.key(0), images)
    assert {leaf.dtype for leaf in jax.tree.leaves(created)} == {jnp.dtype("float32")}

    logits, stats = train_pass(half, variables, images)
    expected, expected_stats = train_pass(single, variables, images)
    assert logits.dtype == jnp.float32
    # bfloat16 has 8 bits: close to the float32 net, and not the float32 net.
    error = np.abs(logits - expected).max() / np.abs(expected).max()
    assert 1e-5 < error < 0.1
    for ours, reference in zip(
        jax.tree.leaves(stats), jax.tree.leaves(expected_stats), strict=True
    ):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, reference, rtol=0.05, atol=0.02)

    maps = jax.eval_shape(
        lambda v, x: half.apply(v, x, method="features"), variables, images
    )
    assert {m.dtype for m in maps} == {jnp.dtype("bfloat16")}
    pooled = create_model("cifar_resnet8", num_classes=None, dtype=jnp.bfloat16)
    assert jax.eval_shape(pooled.apply, variables, images).dtype == jnp.float32


def test_evaluation_leaves_the_statistics_alone(variables):
    model = create_model("cifar_resnet8")
    images = images_of((4, 8, 8, 3))
    apply = jax.jit(functools.partial(model.apply, mutable=["batch_stats"]))
    together, updated = apply(variables, images)
    jax.tree.map(
        np.testing.assert_array_equal,
        updated.get("batch_stats", variables["batch_stats"]),
        variables["batch_stats"],
    )
    one_by_one = np.concatenate([apply(variables, x[None])[0] for x in images])
    np.testing.assert_allclose(together, one_by_one, rtol=1e-4, atol=1e-5)


def test_the_classifier_starts_uniform_within_the_fan_in():
    model = create_model("cifar_resnet8", num_classes=1000)
    images = jnp.zeros((1, 8, 8, 3))
    head = jax.jit(lambda key: model.init(key, images)["params"]["head"])(
        jax.random.key(1)
    )
    kernel, bound = np.asarray(head["kernel"]), 1 / np.sqrt(64)
    assert kernel.shape == (64, 1000)
    assert 0.999 * bound < np.abs(kernel).max() <= bound
    assert kernel.var() == pytest.approx(bound**2 / 3, rel=0.02)
    assert abs(kernel.mean()) < 5 * bound / np.sqrt(3 * kernel.size)
    assert (np.asarray(head["bias"]) == 0).all()


def test_groups_normalise_each_part_of_the_batch_by_itself(variables):
    images = images_of((4, 8, 8, 3))
    logits, stats = train_pass(
        create_model("cifar_resnet8", batch_norm_groups=2), variables, images
    )
    model = create_model("cifar_resnet8")
    parts = [train_pass(model, variables, part) for part in (images[:2], images[2:])]
    np.testing.assert_allclose(
        logits, np.concatenate([part[0] for part in parts]), rtol=1e-3, atol=1e-4
    )
    jax.tree.map(
        lambda ours, a, b: np.testing.assert_allclose(
            ours, (a + b) / 2, rtol=1e-4, atol=1e-5
        ),
        stats,
        parts[0][1],
        parts[1][1],
    )


def test_momentum_option(variables):
    images = images_of((4, 8, 8, 3))
    for momentum in (0.9, 0.25):
        model = create_model("cifar_resnet8", batch_norm_momentum=momentum)
        stats = jax.jit(lambda v, x, m=model: train_pass(m, v, x)[1]["stem"])(
            variables, images
        )
        kernel = np.asarray(variables["params"]["stem"]["conv"]["kernel"], np.float64)
        # The map's mean is linear in the image: sum over taps of the padded image.
        padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0))).astype(np.float64)
        mean = sum(
            padded[:, i : i + 8, j : j + 8].mean((0, 1, 2)) @ kernel[i, j]
            for i in range(3)
            for j in range(3)
        )
        np.testing.assert_allclose(
            stats["norm"]["mean"], (1 - momentum) * mean, rtol=1e-3, atol=1e-6
        )


def test_epsilon_option(variables):
    def stem_map(epsilon):
        model = create_model("cifar_resnet8", batch_norm_epsilon=epsilon)
        return features(model, variables, images_of((1, 8, 8, 3)))[0]

    # With a running variance of 1 the map is divided by sqrt(1 + epsilon).
    np.testing.assert_allclose(2 * stem_map(3.0), stem_map(0.0), rtol=1e-6)
