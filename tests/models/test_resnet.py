"""The whole net: its maps, names, dtypes, initialisation and options."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from resnet_jax.analysis.complexity import abstract_variables
from resnet_jax.models import (
    BatchNorm,
    CifarStem,
    Conv,
    DeepStem,
    ImageNetStem,
    PreActBasicBlock,
    ResNet,
    create_model,
    shortcuts,
)
from resnet_jax.models.resnet import plan_strides
from tests.models.reference import (
    KEY,
    Layers,
    apply,
    batch_norm,
    max_pool,
    random_variables,
    relu,
)


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
        ("resnet50_v1", 225, [(113, 64), (57, 256), (29, 512), (15, 1024), (8, 2048)]),
        ("resnet34", 224, [(112, 64), (56, 64), (28, 128), (14, 256), (7, 512)]),
        ("resnet50", 224, [(112, 64), (56, 256), (28, 512), (14, 1024), (7, 2048)]),
        ("resnet50", 225, [(113, 64), (57, 256), (29, 512), (15, 1024), (8, 2048)]),
        ("plain18", 97, [(49, 64), (25, 64), (13, 128), (7, 256), (4, 512)]),
        ("cifar_resnet20", 32, [(32, 16), (32, 16), (16, 32), (8, 64)]),
    ],
)
def test_features_are_the_maps_of_table_1(name, size, expected):
    model = create_model(name)
    maps = jax.eval_shape(
        lambda v, x: model.apply(v, x, method="features"),
        abstract_variables(model, (size, size, 3)),
        jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32),
    )
    assert [m.shape for m in maps] == [(2, side, side, c) for side, c in expected]
    assert [m.array.shape for m in maps] == [m.shape for m in maps]
    assert [m.name for m in maps] == [f"C{i}" for i in range(1, len(expected) + 1)]
    first = [1, 1, 2, 4] if name.startswith("cifar") else [2, 4, 8, 16, 32]
    assert [m.stride for m in maps] == first


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
    last_map = np.asarray(features(model, variables, images)[-1].array)
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
    assert {m.array.dtype for m in maps} == {jnp.dtype("bfloat16")}
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
    head = jax.jit(lambda key: model.init(key, images)["params"]["head"])(KEY)
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
        stats = train_pass(model, variables, images)[1]["stem"]
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
        return features(model, variables, images_of((1, 8, 8, 3)))[0].array

    # With a running variance of 1 the map is divided by sqrt(1 + epsilon).
    np.testing.assert_allclose(1.25 * stem_map(0.5625), stem_map(0.0), rtol=1e-6)


def test_no_statistics_move_where_the_momentum_is_one(variables):
    model = create_model("cifar_resnet8").clone(
        norm=functools.partial(BatchNorm, momentum=1.0)
    )
    _, stats = train_pass(model, variables, images_of((4, 8, 8, 3)))
    jax.tree.map(np.testing.assert_array_equal, stats, variables["batch_stats"])


# Stems


@pytest.mark.parametrize(
    ("stem_class", "options", "convs"),
    [
        (ImageNetStem, {}, [("conv", "norm", 2)]),
        (CifarStem, {}, [("conv", "norm", 1)]),
        (
            DeepStem,
            {"inner": (4, 6)},
            [("conv1", "norm1", 2), ("conv2", "norm2", 1), ("conv3", "norm3", 1)],
        ),
    ],
)
@pytest.mark.parametrize("sides", [(12, 9), (7, 10)])
def test_stems(stem_class, options, convs, sides):
    norm = functools.partial(BatchNorm, use_running_average=True)
    stem = stem_class(8, conv=Conv, norm=norm, **options)
    x = images_of((2, *sides, 3))
    variables = random_variables(stem, x)
    layers, y = Layers(variables), x
    for conv, normalisation, strides in convs:
        y = relu(layers.norm(layers.conv(y, conv, strides), normalisation))
    c1, pooled = apply(stem, variables, x)
    np.testing.assert_allclose(c1, y, rtol=1e-4, atol=1e-4)
    if stem_class is not CifarStem:
        y = max_pool(y)
    np.testing.assert_allclose(pooled, y, rtol=1e-4, atol=1e-4)
    assert c1.shape[1:3] == tuple(-(-side // stem.strides[0]) for side in sides)
    assert pooled.shape[1:3] == tuple(-(-side // stem.strides[1]) for side in sides)
    kernels = [layers.params[conv]["kernel"].shape for conv, _, _ in convs]
    if stem_class is DeepStem:
        assert kernels == [(3, 3, 3, 4), (3, 3, 4, 6), (3, 3, 6, 8)]


def test_a_stem_may_have_a_width_of_its_own():
    """That of wide nets, and of timm's ResNet-S."""
    model = create_model("cifar_wide_resnet10_4")
    params = abstract_variables(model, (8, 8, 3))["params"]
    assert params["stem"]["conv"]["kernel"].shape == (3, 3, 3, 16)
    assert params["stage1"]["block1"]["conv1"]["kernel"].shape == (3, 3, 16, 64)
    assert params["stage3"]["block1"]["conv2"]["kernel"].shape == (3, 3, 256, 256)


def test_a_preactivation_net_in_numpy():
    """He et al. 2016: the stem activates for the first block, and the end once more."""
    bare = shortcuts.Projection(normalized=False)
    model = ResNet((1, 1), PreActBasicBlock, bare, CifarStem, width=4, num_classes=3)
    images = images_of((2, 6, 7, 3))
    variables = random_variables(model, images)
    params, stats = variables["params"], variables["batch_stats"]

    def block(stage):
        collections = {"params": params[stage], "batch_stats": stats[stage]}
        return Layers({name: tree["block1"] for name, tree in collections.items()})

    stem = Layers({"params": params["stem"], "batch_stats": stats["stem"]})
    x = relu(stem.norm(stem.conv(images, "conv"), "norm"))
    layers = block("stage1")
    y = layers.conv(x, "conv1")
    x = x + layers.conv(relu(layers.norm(y, "norm2")), "conv2")
    layers = block("stage2")
    branch = relu(layers.norm(x, "norm1"))
    y = layers.conv(branch, "conv1", 2)
    y = layers.conv(relu(layers.norm(y, "norm2")), "conv2")
    x = layers.conv(branch, "shortcut_conv", 2) + y
    last = relu(batch_norm(x, params["norm"], stats["norm"]))
    head = params["head"]
    expected = last.mean((1, 2)) @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(
        apply(model, variables, images), expected, rtol=1e-4, atol=1e-4
    )
    maps = features(model, variables, images)
    np.testing.assert_allclose(maps[-1].array, last, rtol=1e-4, atol=1e-4)


# The stride of the last map


@pytest.mark.parametrize(
    ("stem_stride", "output_stride", "plan"),
    [
        (4, None, [(1, 1, 1, 4), (2, 1, 1, 8), (2, 1, 1, 16), (2, 1, 1, 32)]),
        (4, 32, [(1, 1, 1, 4), (2, 1, 1, 8), (2, 1, 1, 16), (2, 1, 1, 32)]),
        (4, 16, [(1, 1, 1, 4), (2, 1, 1, 8), (2, 1, 1, 16), (1, 1, 2, 16)]),
        (4, 8, [(1, 1, 1, 4), (2, 1, 1, 8), (1, 1, 2, 8), (1, 2, 4, 8)]),
        (4, 4, [(1, 1, 1, 4), (1, 1, 2, 4), (1, 2, 4, 4), (1, 4, 8, 4)]),
        (1, None, [(1, 1, 1, 1), (2, 1, 1, 2), (2, 1, 1, 4)]),
        (1, 1, [(1, 1, 1, 1), (1, 1, 2, 1), (1, 2, 4, 1)]),
    ],
)
def test_dilation_doubles_where_a_stride_is_left_out(stem_stride, output_stride, plan):
    """Each stage's stride, spacing of taps before and behind, and output's stride."""
    ours = plan_strides(len(plan), stem_stride, output_stride)
    assert [(strides, *spacing, out) for strides, spacing, out in ours] == plan


@pytest.mark.parametrize("output_stride", [1, 2, 12, 64, -8])
def test_output_strides_that_a_net_does_not_pass_are_refused(output_stride):
    match = rf"one of 4, 8, 16, 32, not {output_stride}$"
    with pytest.raises(ValueError, match=match):
        plan_strides(4, 4, output_stride)


SMALLER = {"width": 4, "num_classes": None}


@pytest.mark.parametrize(
    ("name", "sides"),
    [
        ("resnet18", (97, 64)),
        ("resnet50_v1", (64, 97)),
        ("resnet50", (97, 64)),
        ("resnet50d", (64, 97)),
    ],
)
def test_a_dilated_net_sees_at_each_place_what_the_ordinary_one_sees(name, sides):
    """The a-trous identity: the ordinary map is the dilated one's every n-th pixel."""
    model = create_model(name).clone(stage_sizes=(1, 1, 2, 1), **SMALLER)
    images = images_of((1, *sides, 3))
    variables = random_variables(model, images)

    @jax.jit
    def all_maps(variables, images):
        return {
            stride: model.clone(output_stride=stride).apply(
                variables, images, method="features"
            )
            for stride in (32, 16, 8)
        }

    with jax.default_matmul_precision("highest"):
        maps = all_maps(variables, images)
    ordinary = maps.pop(32)
    for output_stride, dilated in maps.items():
        assert [m.stride for m in dilated] == [
            min(m.stride, output_stride) for m in ordinary
        ]
        for sparse, dense in zip(ordinary, dilated, strict=True):
            step = sparse.stride // dense.stride
            sides_of = [-(-side // dense.stride) for side in sides]
            assert list(dense.shape[1:3]) == sides_of
            expected = np.asarray(sparse.array)
            assert expected.std() > 0.05
            np.testing.assert_allclose(
                dense.array[:, ::step, ::step],
                expected,
                atol=1e-5 * np.abs(expected).max(),
            )


# Options of the whole net


def test_zero_init_last_reaches_every_block():
    for name, last, other in (
        ("cifar_resnet14", "norm2", "norm1"),
        ("cifar_bottleneck_resnet20", "norm3", "norm2"),
    ):
        model = create_model(name, zero_init_last=True)
        images = jnp.zeros((1, 4, 4, 3))
        params = jax.jit(lambda m=model, x=images: norms_only(m.init(KEY, x)))()
        blocks = [b for s in (1, 2, 3) for b in params[f"stage{s}"].values()]
        assert len(blocks) == 6
        for block in blocks:
            np.testing.assert_array_equal(block[last]["scale"], 0)
            np.testing.assert_array_equal(block[other]["scale"], 1)


def norms_only(variables):
    flat = traverse_util.flatten_dict(variables["params"])
    return traverse_util.unflatten_dict(
        {path: leaf for path, leaf in flat.items() if path[-1] == "scale"}
    )


@pytest.mark.parametrize("option", ["dropout_rate", "stochastic_depth_rate"])
def test_what_training_leaves_out_at_random_evaluation_does_not(option, variables):
    images = images_of((4, 8, 8, 3))
    model = create_model("cifar_resnet8", **{option: 0.5})
    plain = create_model("cifar_resnet8")

    @jax.jit
    def logits(variables, images):
        def train(seed):
            return model.apply(
                variables,
                images,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.fold_in(KEY, seed)},
            )[0]

        evaluated = [net.apply(variables, images) for net in (model, plain)]
        return evaluated, [train(0), train(0), train(1)]

    (ours, expected), draws = logits(variables, images)
    np.testing.assert_array_equal(ours, expected)
    np.testing.assert_array_equal(draws[0], draws[1])
    assert np.abs(draws[0] - draws[2]).max() > 0.01
    shapes = jax.eval_shape(model.init, KEY, images)
    assert jax.tree.structure(shapes) == jax.tree.structure(variables)


def test_the_net_computes_in_float64_where_told(variables):
    """So that comparisons may tell a mistake from rounding."""
    with jax.enable_x64(True):
        model = create_model("cifar_resnet8", dtype=jnp.float64)
        wide = jax.tree.map(lambda leaf: leaf.astype(np.float64), variables)
        images = images_of((2, 8, 8, 3)).astype(np.float64)
        logits, stats = jax.eval_shape(
            functools.partial(model.apply, train=True, mutable=["batch_stats"]),
            wide,
            images,
        )
    assert logits.dtype == np.float64
    assert {leaf.dtype for leaf in jax.tree.leaves(stats)} == {np.dtype("float64")}


def test_the_parts_of_a_net_are_the_whole_net():
    net = create_model("resnet18d", num_classes=None)
    images = jax.random.normal(jax.random.key(0), (2, 64, 64, 3))
    variables = jax.jit(net.init)(jax.random.key(1), images)
    trunk, last = net.clone(stages=(0, 3)), net.clone(stages=(3, 4))
    c4 = trunk.apply(variables, images, method="features")[-1]
    assert (c4.name, c4.stride) == ("C4", 16)
    whole = net.apply(variables, images, method="features")[-2].array
    np.testing.assert_array_equal(c4.array, whole)
    np.testing.assert_array_equal(
        last.apply(variables, c4.array), net.apply(variables, images)
    )
    names = set()
    for part, example in ((trunk, images), (last, c4.array)):
        names |= set(jax.eval_shape(part.init, jax.random.key(1), example)["params"])
    assert names == set(variables["params"])
