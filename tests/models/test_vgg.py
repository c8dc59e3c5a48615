"""VGG nets against torch, torchvision and their published sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from resnet_jax.analysis.complexity import (
    abstract_variables,
    count_multiply_adds,
    count_parameters,
)
from resnet_jax.models import BatchNorm
from resnet_jax.models.pooling import adaptive_average_pool
from resnet_jax.models.vgg import VGG

VGG19 = {"stage_convs": (2, 2, 4, 4, 4)}
NARROW = {
    "stage_convs": (2, 2, 3, 3, 3),
    "widths": (8, 6, 9, 12, 10),
    "hidden_features": 16,
    "num_classes": 7,
}
TINY = {
    "stage_convs": (1, 2),
    "widths": (4, 5),
    "hidden_features": 6,
    "num_classes": 3,
}
SIZES = [(64, 64), (97, 81), (224, 224)]


@pytest.fixture
def torch():
    """Torch with one thread: on few cores its pool and XLA's wait for each other."""
    torch = pytest.importorskip("torch", reason="torch is the reference of this test")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch
    torch.set_num_threads(threads)


@pytest.fixture
def torchvision_vgg(torch):
    # Imported here: it needs torch itself.
    from tests.torch_peers import import_peer

    return import_peer("torchvision").models.vgg


def random_variables(model, side=32):
    """Variables without the zeros and ones behind which a mistake could hide."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name = path[-1].key
        if name == "kernel":
            fan_in = np.prod(leaf.shape[:-1])
            return rng.normal(0, np.sqrt(2 / fan_in), leaf.shape).astype(np.float32)
        if name in ("scale", "var"):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        return rng.normal(0, 0.1, leaf.shape).astype(np.float32)

    shapes = abstract_variables(model, (side, side, 3))
    return jax.tree_util.tree_map_with_path(draw, shapes)


def torch_layout(path, kernel, channels):
    """A kernel as torch stores it; there fc1 reads (channels, 7, 7)."""
    if kernel.ndim == 4:
        return kernel.transpose(3, 2, 0, 1)
    if path[0] == "fc1":
        kernel = kernel.reshape(7, 7, channels, -1).transpose(2, 0, 1, 3)
        kernel = kernel.reshape(7 * 7 * channels, -1)
    return kernel.T


def layer_paths(stage_convs, batch_norm):
    """The layers with variables in the order in which they are applied."""
    for stage, size in enumerate(stage_convs, 1):
        for index in range(1, size + 1):
            yield f"stage{stage}", f"conv{index}"
            if batch_norm:
                yield f"stage{stage}", f"norm{index}"
    yield from (("fc1",), ("fc2",), ("head",))


def at(tree, path):
    return functools.reduce(lambda node, name: node[name], path, tree)


def load(torch, net, model, variables):
    """Copies the variables into the torch net's layers, which have the same order."""
    kinds = (torch.nn.Conv2d, torch.nn.BatchNorm2d, torch.nn.Linear)
    layers = [module for module in net.modules() if isinstance(module, kinds)]
    paths = list(layer_paths(model.stage_convs, model.batch_norm))
    assert len(layers) == len(paths)
    for layer, path in zip(layers, paths):
        params = at(variables["params"], path)
        state = {"bias": params["bias"]}
        if isinstance(layer, torch.nn.BatchNorm2d):
            stats = at(variables["batch_stats"], path)
            state["weight"] = params["scale"]
            state |= {f"running_{name}": stats[name] for name in ("mean", "var")}
            state["num_batches_tracked"] = np.array(0)
        else:
            state["weight"] = torch_layout(path, params["kernel"], model.widths[-1])
        # Strict: no name may be missing, and every shape must agree.
        layer.load_state_dict(
            {name: torch.tensor(np.ascontiguousarray(a)) for name, a in state.items()}
        )
    return net.double().eval()


def torch_classifier(torch, model):
    return torch.nn.Sequential(
        torch.nn.Linear(7 * 7 * model.widths[-1], model.hidden_features),
        torch.nn.ReLU(),
        torch.nn.Dropout(model.dropout_rate),
        torch.nn.Linear(model.hidden_features, model.hidden_features),
        torch.nn.ReLU(),
        torch.nn.Dropout(model.dropout_rate),
        torch.nn.Linear(model.hidden_features, model.num_classes),
    )


def torch_net(torch, model):
    """The net in torch alone."""
    layers, before = [], 3
    for size, width in zip(model.stage_convs, model.widths):
        for _ in range(size):
            layers.append(torch.nn.Conv2d(before, width, 3, padding=1))
            if model.batch_norm:
                layers.append(torch.nn.BatchNorm2d(width))
            layers.append(torch.nn.ReLU())
            before = width
        layers.append(torch.nn.MaxPool2d(2))
    return torch.nn.Sequential(
        *layers,
        torch.nn.AdaptiveAvgPool2d(7),
        torch.nn.Flatten(),
        torch_classifier(torch, model),
    )


def torchvision_net(torch, vgg, model):
    """torchvision's own net, with narrow layers: its full classifier is never made."""
    config = []
    for size, width in zip(model.stage_convs, model.widths):
        config += [width] * size + ["M"]
    layers = vgg.make_layers(config, batch_norm=model.batch_norm)
    with torch.device("meta"):
        net = vgg.VGG(layers, init_weights=False)
    net.classifier = torch_classifier(torch, model)
    return net


def theirs(torch, net, images):
    with torch.no_grad():
        return net(torch.tensor(images.transpose(0, 3, 1, 2)).double()).numpy()


def ours(model, variables, images):
    """The output, convolved in full precision on every device."""
    with jax.default_matmul_precision("highest"):
        return jax.jit(model.apply)(variables, images)


def random_images(size, seed=1):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(2, *size, 3)).astype(np.float32)


def relative_error(ours, expected):
    """The largest difference over the largest magnitude."""
    assert ours.shape == expected.shape
    return np.abs(np.asarray(ours) - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("batch_norm", [False, True])
def test_logits_are_those_of_torch(torch, batch_norm, size):
    model = VGG(**NARROW, batch_norm=batch_norm)
    variables, images = random_variables(model), random_images(size)
    net = load(torch, torch_net(torch, model), model, variables)
    logits = ours(model, variables, images)
    assert logits.dtype == np.float32
    assert relative_error(logits, theirs(torch, net, images)) < 1e-5


def test_logits_in_float64_are_those_of_torch(torch):
    options = NARROW | {"batch_norm": True}
    model = VGG(**options, dtype="float64")
    variables, images = random_variables(VGG(**options)), random_images((97, 81))
    net = load(torch, torch_net(torch, model), model, variables)
    with jax.enable_x64(True):
        wide = jax.tree.map(np.float64, variables)
        logits = ours(model, wide, images.astype(np.float64))
    assert logits.dtype == np.float64
    assert relative_error(logits, theirs(torch, net, images)) < 1e-12


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("batch_norm", [False, True])
def test_logits_are_those_of_torchvision(torch, torchvision_vgg, batch_norm, size):
    model = VGG(**NARROW, batch_norm=batch_norm)
    variables, images = random_variables(model), random_images(size)
    net = torchvision_net(torch, torchvision_vgg, model)
    load(torch, net, model, variables)
    logits = ours(model, variables, images)
    assert relative_error(logits, theirs(torch, net, images)) < 1e-5


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize(("name", "options"), [("vgg16", {}), ("vgg19", VGG19)])
def test_the_full_nets_have_torchvisions_layers(
    torch, torchvision_vgg, name, options, batch_norm
):
    model = VGG(**options, batch_norm=batch_norm)
    params = abstract_variables(model, (224, 224, 3))["params"]
    shapes = []
    for path in layer_paths(model.stage_convs, batch_norm):
        layer = at(params, path)
        weight = layer["scale"] if "scale" in layer else layer["kernel"]
        shape = weight.shape
        order = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}[len(shape)]
        shapes += [tuple(shape[axis] for axis in order), layer["bias"].shape]
    with torch.device("meta"):
        make = getattr(torchvision_vgg, name + "_bn" * batch_norm)
        net = make(init_weights=False)
    assert shapes == [tuple(parameter.shape) for parameter in net.parameters()]


def test_pooled_features_are_the_last_map_behind_its_pooling(torch):
    model = VGG(**NARROW | {"num_classes": None})
    variables, images = random_variables(model), random_images((97, 81))
    assert set(variables["params"]) == {f"stage{i}" for i in range(1, 6)}
    whole = VGG(**NARROW)
    filled = random_variables(whole)
    filled["params"] |= variables["params"]
    net = load(torch, torch_net(torch, whole), whole, filled)
    convolutions = net[:-3]
    maps = theirs(torch, convolutions, images)
    assert maps.shape == (2, 10, 3, 2)
    features = ours(model, variables, images)
    assert features.dtype == np.float32
    assert relative_error(features, maps.mean((2, 3))) < 1e-5


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ({}, 138_357_544),
        (VGG19, 143_667_240),
        ({"batch_norm": True}, 138_365_992),
        (VGG19 | {"batch_norm": True}, 143_678_248),
    ],
)
def test_parameters_are_those_published(options, parameters):
    variables = abstract_variables(VGG(**options), (224, 224, 3))
    assert count_parameters(variables["params"]) == parameters
    assert ("batch_stats" in variables) == ("batch_norm" in options)


@pytest.mark.parametrize(
    ("options", "published", "published_convolutions"),
    [({}, 15.47e9, 15.35e9), (VGG19, 19.63e9, 19.51e9)],
)
def test_multiply_adds_are_those_published(options, published, published_convolutions):
    model = VGG(**options)
    convolutions, before, side = 0, 3, 224
    for size, width in zip(model.stage_convs, model.widths):
        convolutions += side**2 * 9 * width * (before + (size - 1) * width)
        before, side = width, side // 2
    dense = 7 * 7 * 512 * 4096 + 4096 * 4096 + 4096 * 1000
    count = count_multiply_adds(model, (224, 224, 3))
    assert count == convolutions + dense
    assert count == pytest.approx(published, rel=5e-4)
    without = VGG(**options, num_classes=None)
    assert count_multiply_adds(without, (224, 224, 3)) == convolutions
    assert convolutions == pytest.approx(published_convolutions, rel=5e-4)


@pytest.mark.parametrize("size", [7, 3])
@pytest.mark.parametrize("sides", [(1, 2), (6, 7), (7, 7), (7, 9), (8, 13), (14, 15)])
def test_adaptive_pooling_averages_the_bins_of_its_definition(sides, size):
    x = np.random.default_rng(0).normal(size=(2, *sides, 3)).astype(np.float32)

    def bins(length):
        for i in range(size):
            start = int(np.floor(i * length / size))
            yield slice(start, int(np.ceil((i + 1) * length / size)))

    expected = np.stack(
        [
            np.stack(
                [x[:, rows, columns].mean((1, 2)) for columns in bins(sides[1])], 1
            )
            for rows in bins(sides[0])
        ],
        axis=1,
    )
    y = jax.jit(adaptive_average_pool, static_argnums=1)(x, size)
    assert y.shape == expected.shape == (2, size, size, 3)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_adaptive_pooling_rounds_only_its_result():
    x = np.random.default_rng(0).normal(size=(2, 30, 31, 8)).astype(jnp.bfloat16)
    pool = jax.jit(adaptive_average_pool, static_argnums=1)
    y = pool(x, 2)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, pool(x.astype("float32"), 2).astype("bfloat16"))


@pytest.mark.parametrize("batch_norm", [False, True])
def test_the_names_of_the_variables(batch_norm):
    variables = abstract_variables(VGG(**TINY, batch_norm=batch_norm), (32, 32, 3))
    shapes = jax.tree.map(lambda leaf: leaf.shape, variables)
    assert set(shapes["params"]) == {"stage1", "stage2", "fc1", "fc2", "head"}
    conv = {"conv1": {"kernel": (3, 3, 3, 4), "bias": (4,)}}
    norm = {"norm1": {"scale": (4,), "bias": (4,)}} if batch_norm else {}
    assert shapes["params"]["stage1"] == conv | norm
    assert "conv2" in shapes["params"]["stage2"]
    assert shapes["params"]["fc1"] == {"kernel": (7 * 7 * 5, 6), "bias": (6,)}
    assert shapes["params"]["fc2"] == {"kernel": (6, 6), "bias": (6,)}
    assert shapes["params"]["head"] == {"kernel": (6, 3), "bias": (3,)}
    if batch_norm:
        stats = {"norm1": {"mean": (4,), "var": (4,)}}
        assert shapes["batch_stats"]["stage1"] == stats


def test_initial_values_are_those_of_torchvision():
    model = VGG(stage_convs=(1,), widths=(64,), hidden_features=64)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]

    def check(path, leaf):
        names = [key.key for key in path]
        if names[-1] == "bias":
            assert (leaf == 0).all(), names
            return
        variance = 2 / (9 * leaf.shape[-1]) if leaf.ndim == 4 else 0.01**2
        error = np.sqrt(2 / leaf.size)  # standard deviation of a sampled variance
        assert float(leaf.var()) == pytest.approx(variance, rel=5 * error), names

    jax.tree_util.tree_map_with_path(check, params)


def test_dropout_is_behind_both_hidden_layers_and_in_training_alone():
    model, images = VGG(**TINY), random_images((28, 28))
    variables = random_variables(model)
    evaluated = model.apply(variables, images)
    seen = []

    def record(call, args, kwargs, context):
        if isinstance(context.module, nn.Dropout) and not context.module.deterministic:
            seen.append((context.module.rate, args[0].shape))
        return call(*args, **kwargs)

    trained = functools.partial(model.apply, variables, images, train=True)
    with nn.intercept_methods(record):
        first = trained(rngs={"dropout": jax.random.key(0)})
    assert seen == [(0.5, (2, 6))] * 2
    second = trained(rngs={"dropout": jax.random.key(1)})
    assert not np.allclose(first, second)
    without = VGG(**TINY, dropout_rate=0.0)
    np.testing.assert_array_equal(
        without.apply(variables, images, train=True), evaluated
    )


def test_batch_normalisation_has_its_options_and_trains():
    options = {"groups": 2, "momentum": 0.5, "epsilon": 1e-3}
    norm = functools.partial(BatchNorm, **options)
    model = VGG(**TINY, batch_norm=True, norm=norm)
    images, seen = random_images((8, 8)), []

    def record(call, args, kwargs, context):
        module = context.module
        if isinstance(module, BatchNorm) and context.method_name == "__call__":
            seen.append({name: getattr(module, name) for name in options})
        return call(*args, **kwargs)

    variables = random_variables(model)
    before = variables["batch_stats"]
    with nn.intercept_methods(record):
        _, updated = jax.jit(
            functools.partial(model.apply, train=True, mutable=["batch_stats"])
        )(variables, images, rngs={"dropout": jax.random.key(0)})
    assert seen == [options] * 3
    for path in (("stage1", "norm1"), ("stage2", "norm2")):
        mean = at(updated["batch_stats"], path)["mean"]
        assert (mean != at(before, path)["mean"]).all()


def test_bfloat16_keeps_float32_parameters_and_logits():
    images = random_images((28, 28))
    options = TINY | {"batch_norm": True}
    variables = random_variables(VGG(**options))
    model = VGG(**options, dtype=jnp.bfloat16)
    shapes = abstract_variables(model, (32, 32, 3))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(shapes)} == {"float32"}
    output, captured = jax.jit(
        functools.partial(model.apply, capture_intermediates=True)
    )(variables, images)
    assert output.dtype == np.float32
    dtypes = jax.tree.map(lambda leaf: leaf.dtype.name, captured["intermediates"])
    del dtypes["__call__"], dtypes["head"]
    assert set(jax.tree.leaves(dtypes)) == {"bfloat16"}
    pooled = VGG(**options | {"num_classes": None}, dtype=jnp.bfloat16)
    assert jax.eval_shape(pooled.apply, variables, images).dtype == np.float32
    single = jax.jit(VGG(**options).apply)(variables, images)
    np.testing.assert_allclose(output, single, atol=0.05 * np.abs(single).max())


def test_images_must_outlast_the_poolings():
    with pytest.raises(ValueError, match=r"40x31 pixels.*5 poolings.*32x32"):
        abstract_variables(VGG(), (40, 31, 3))
    assert abstract_variables(VGG(), (32, 32, 3))["params"]


def test_unequal_numbers_of_stages():
    with pytest.raises(ValueError, match="5 widths but 2 stage_convs"):
        abstract_variables(VGG(stage_convs=(1, 1)), (32, 32, 3))


def test_features_are_the_stages_outputs_before_their_poolings():
    model = VGG(**TINY)
    images = np.random.default_rng(1).normal(size=(2, 32, 40, 3)).astype(np.float32)
    variables = random_variables(model)
    maps = model.apply(variables, images, method="features")
    assert [(m.name, m.stride, m.shape) for m in maps] == [
        ("C1", 1, (2, 32, 40, 4)),
        ("C2", 2, (2, 16, 20, 5)),
    ]
    # The classifier starts from the last one, pooled.
    last = np.asarray(maps[-1].array).reshape(2, 8, 2, 10, 2, 5).max((2, 4))
    pooled = model.clone(num_classes=None).apply(variables, images)
    np.testing.assert_allclose(last.mean((1, 2)), pooled, rtol=1e-5)


def test_frozen_stages_keep_their_statistics_in_training():
    model = VGG(**TINY, batch_norm=True, batch_norm_frozen=("stage1",))
    images = np.random.default_rng(1).normal(size=(4, 8, 8, 3)).astype(np.float32)
    variables = jax.jit(model.init)(jax.random.key(0), images)
    _, updated = jax.jit(
        functools.partial(model.apply, train=True, mutable=["batch_stats"])
    )(variables, images, rngs={"dropout": jax.random.key(1)})
    before, after = variables["batch_stats"], updated["batch_stats"]
    for name, is_kept in (("stage1", True), ("stage2", False)):
        same = jax.tree.map(
            lambda a, b: bool((a == b).all()), before[name], after[name]
        )
        assert set(jax.tree.leaves(same)) == {is_kept}
