"""Weights through files and back; needs no torch."""

import io
import os
import pickle
import re
import zipfile

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from resnet_jax.analysis.complexity import abstract_variables
from resnet_jax.errors import UserError
from resnet_jax.models import (
    BasicBlock,
    HighwayNet,
    OverlappingStage,
    ResNet,
    create_model,
    stack_blocks,
    unstack_blocks,
)
from resnet_jax.models.trees import is_stacked
from resnet_jax.models.vgg import VGG
from resnet_jax.weights import load_weights, save_weights, shapes
from resnet_jax.weights.files import read_arrays, write_safetensors

LAYOUTS = ("flax", "torch")
NETS = {
    "basic": create_model("cifar_resnet8_b"),
    "bottleneck": create_model("cifar_bottleneck_resnet11"),
    "preactivation": create_model("cifar_preact_resnet8"),
    "wide": create_model("cifar_wide_resnet10_1"),
    "highway": HighwayNet(widths=(4, 6), highway_layers=(1, 2)),
    "vgg": VGG(stage_convs=(1, 1), widths=(3, 4), hidden_features=5, num_classes=2),
    "overlapping": ResNet((1, 1), BasicBlock, stage=OverlappingStage, width=4),
    "without a classifier": create_model("cifar_resnet8", num_classes=None),
}


class Mlp(nn.Module):
    """Not an image net, and no residual one."""

    @nn.compact
    def __call__(self, x):
        self.variable("counters", "calls", lambda: jnp.zeros((), jnp.int32))
        scale = self.param("scale", nn.initializers.ones, (3,), jnp.bfloat16)
        return nn.Dense(2, name="head")(nn.Dense(4)(x) * scale[0])


def random_variables(model, channels=3, seed=0):
    rng = np.random.default_rng(seed)

    def draw(leaf):
        return jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)

    arrays = shapes.abstract_arrays(model, channels)
    return shapes.unflatten({name: draw(leaf) for name, leaf in arrays.items()}, model)


def assert_same(found, expected):
    """The same tree, and the same bits."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected)
    ):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), path
        assert a.tobytes() == b.tobytes(), path


def complaint(path, model, **options):
    with pytest.raises(UserError) as error:
        load_weights(path, model, **options)
    sentence = str(error.value)
    assert str(path) in sentence
    assert "\n" not in sentence
    return sentence


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.safetensors"


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return request.param


@pytest.fixture(scope="module")
def model():
    return create_model("cifar_resnet8_b")


@pytest.fixture(scope="module")
def variables(model):
    return random_variables(model)


@pytest.fixture
def change(path, model, variables, layout):
    """Saves the variables with their arrays changed by a function, and gives the path.

    The function gets the arrays by their names in the file, and a function that
    translates: of ("fc.bias", "params/head/bias") the one of this layout.
    """

    def save(function):
        save_weights(path, variables, model, layout=layout)
        arrays, metadata = read_arrays(path)
        function(arrays, lambda torch, flax: torch if layout == "torch" else flax)
        write_safetensors(path, arrays, metadata)
        return path

    return save


# What is expected of a net


@pytest.mark.parametrize(
    ("name", "scan"),
    [*((name, False) for name in NETS), ("basic", True), ("preactivation", True)],
)
def test_the_arrays_are_those_of_init(name, scan):
    model = NETS[name]
    if isinstance(model, ResNet) and name != "overlapping":
        model = model.clone(scan=scan, stage_sizes=(1, 3, 2))
    expected = abstract_variables(model, (32, 32, 1))
    if scan:
        expected = jax.eval_shape(unstack_blocks, expected)
    found = shapes.abstract_arrays(model, channels=1)
    assert found == flax.traverse_util.flatten_dict(expected, sep="/")
    if scan:
        example = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
        assert shapes.abstract_arrays(model, example=example) == found
    assert not any("/blocks/" in name for name in found)


# There and back


@pytest.mark.parametrize("name", NETS)
def test_the_flax_layout_comes_back_bit_for_bit(path, name):
    model = NETS[name]
    variables = random_variables(model)
    written = save_weights(path, variables, model, name="the name")
    assert_same(load_weights(path, model), variables)
    arrays, metadata = read_arrays(path)
    assert metadata == {
        "format": "resnet_jax",
        "format_version": "1",
        "model": "the name",
        "model_options": "{}",
    }
    assert arrays.keys() == written.keys()
    assert all(name.startswith(("params/", "batch_stats/")) for name in arrays)


@pytest.mark.parametrize("name", ["basic", "bottleneck", "vgg", "without a classifier"])
def test_the_torch_layout_comes_back_bit_for_bit(path, name):
    model = NETS[name]
    variables = random_variables(model)
    written = save_weights(path, variables, model, layout="torch")
    assert_same(load_weights(path, model), variables)
    counters = [name for name in written if name.endswith("num_batches_tracked")]
    norms = [name for name in written if name.endswith("running_mean")]
    assert len(counters) == len(norms)
    assert all(written[name].dtype == np.int64 for name in counters)
    arrays, metadata = read_arrays(path)
    assert metadata == {"format": "pt"}
    assert "params" not in "".join(arrays)


def test_scanned_and_unrolled_nets_exchange_files(path, layout):
    unrolled = create_model("cifar_resnet20_b", scan=False)
    scanned = create_model("cifar_resnet20_b", scan=True)
    variables = random_variables(unrolled)
    save_weights(path, variables, unrolled, layout=layout)
    first, _ = read_arrays(path)
    loaded = load_weights(path, scanned)
    assert is_stacked(loaded)
    assert_same(loaded, stack_blocks(variables))
    save_weights(path, loaded, scanned, layout=layout)
    assert_same(read_arrays(path)[0], first)
    assert_same(unstack_blocks(load_weights(path, scanned)), variables)


def test_variables_on_several_devices_and_frozen_ones(path, model, variables, layout):
    mesh = jax.make_mesh((8,), ("data",))
    everywhere = jax.NamedSharding(mesh, jax.P())
    placed = flax.core.freeze(jax.device_put(variables, everywhere))
    save_weights(path, placed, model, layout=layout)
    assert_same(load_weights(path, model), variables)


def test_nets_that_compute_in_bfloat16_have_float32_variables(path, variables, layout):
    model = create_model("cifar_resnet8_b", dtype=jnp.bfloat16)
    save_weights(path, variables, model, layout=layout)
    assert_same(load_weights(path, model), variables)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_floating_point_files_become_float32(change, model, variables, dtype):
    narrow = jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype), variables)

    def convert(arrays, name_of):
        for name, array in arrays.items():
            if array.dtype == np.float32:
                arrays[name] = array.astype(dtype)

    expected = jax.tree.map(lambda leaf: leaf.astype(np.float32), narrow)
    assert_same(load_weights(change(convert), model), expected)


def test_the_input_channels_are_those_of_the_file(path, model, layout):
    variables = random_variables(model, channels=1)
    save_weights(path, variables, model, layout=layout)
    assert_same(load_weights(path, model), variables)


def test_any_other_module_with_an_example(path):
    model = Mlp()
    example = np.ones((1, 3), np.float32)
    variables = model.init(jax.random.key(3), example)
    save_weights(path, variables, model)
    shape = jax.ShapeDtypeStruct((7, 3), np.float32)
    assert_same(load_weights(path, model, example=shape), variables)
    tuned = load_weights(
        path, model, example=example, new_head=True, rng=jax.random.key(5)
    )
    fresh = model.init(jax.random.key(5), example)
    expected = variables | {
        "params": variables["params"] | {"head": fresh["params"]["head"]}
    }
    assert_same(tuned, expected)
    with pytest.raises(UserError, match="input of a Mlp is unknown; give example"):
        load_weights(path, model)
    with pytest.raises(UserError, match="have no net like Mlp"):
        save_weights(path, variables, model, layout="torch")
    other = jax.ShapeDtypeStruct((1, 5), np.float32)
    assert "params/Dense_0/kernel of shape (3, 4) instead of (5, 4)" in complaint(
        path, model, example=other
    )


# The classifier


def test_a_net_without_a_classifier_ignores_the_files(path, model, variables, layout):
    save_weights(path, variables, model, layout=layout)
    features = load_weights(path, create_model("cifar_resnet8_b", num_classes=None))
    params = {k: v for k, v in variables["params"].items() if k != "head"}
    assert_same(features, variables | {"params": params})


@pytest.mark.parametrize(("scan", "rng"), [(False, None), (True, 5)])
def test_a_new_head_is_what_init_draws(path, layout, scan, rng):
    model = create_model("cifar_resnet14_b", num_classes=7, scan=scan)
    before = model.clone(num_classes=10)
    variables = random_variables(before)
    save_weights(path, variables, before, layout=layout)
    key = None if rng is None else jax.random.key(rng)
    tuned = load_weights(path, model, new_head=True, rng=key)
    images = jnp.zeros((1, 8, 8, 3))
    # Compiled: XLA leaves out what is not asked for.
    draw = jax.jit(lambda key: model.init(key, images)["params"]["head"])
    head = draw(jax.random.key(rng or 0))
    params = variables["params"] | {"head": head}
    assert_same(tuned, variables | {"params": params})


def test_a_new_head_needs_none_in_the_file(path, layout):
    features = create_model("cifar_resnet8", num_classes=None)
    save_weights(path, random_variables(features), features, layout=layout)
    model = create_model("cifar_resnet8")
    tuned = load_weights(path, model, new_head=True)
    assert tuned["params"]["head"]["kernel"].shape == (64, 10)
    assert "it has no classifier: create the model with num_classes=None" in complaint(
        path, model
    )
    with pytest.raises(UserError, match="this ResNet has no classifier"):
        load_weights(path, features, new_head=True)


def test_another_number_of_classes(path, model, variables, layout):
    save_weights(path, variables, model, layout=layout)
    sentence = complaint(path, create_model("cifar_resnet8_b", num_classes=100))
    assert "num_classes=10, or pass new_head=True" in sentence


# Files of another net


def test_a_missing_array_is_named(change, model, layout):
    def remove(arrays, name_of):
        del arrays[name_of("layer2.0.bn1.weight", "params/stage2/block1/norm1/scale")]

    sentence = complaint(change(remove), model)
    assert "does not match the ResNet: it lacks " in sentence
    assert ("layer2.0.bn1.weight" in sentence) == (layout == "torch")
    assert ("stage2/block1/norm1/scale" in sentence) == (layout == "flax")


def test_an_array_too_many_is_named(change, model):
    def add(arrays, name_of):
        name = name_of("layer9.0.bn1.weight", "params/stage9/norm1/scale")
        arrays[name] = np.zeros(3, np.float32)
        arrays[name + "1" * 5000] = np.zeros(3, np.float32)
        arrays[name + "\n\x1b[31m"] = np.zeros(3, np.float32)

    sentence = complaint(change(add), model)
    assert "layer9.0.bn1.weight" in sentence or "stage9/norm1/scale" in sentence
    assert "has extra" in sentence
    assert "\x1b" not in sentence


def test_an_array_of_another_shape_is_named_with_both(change, model):
    def widen(arrays, name_of):
        name = name_of("layer1.0.bn2.bias", "params/stage1/block1/norm2/bias")
        arrays[name] = np.zeros(17, np.float32)

    sentence = complaint(change(widen), model)
    assert "of shape (17,) instead of (16,)" in sentence


def test_an_array_with_the_right_count_but_another_order_of_axes(change, model):
    def transpose(arrays, name_of):
        name = name_of("layer1.0.conv1.weight", "params/stage1/block1/conv1/kernel")
        arrays[name] = arrays[name].transpose(2, 3, 0, 1)

    assert "instead of" in complaint(change(transpose), model)


def test_only_the_first_names_of_many_are_shown(change, model):
    def rename(arrays, name_of):
        for name in list(arrays):
            arrays[f"{name}x"] = arrays.pop(name)

    sentence = complaint(change(rename), model)
    assert len(re.findall(r" and \d\d more", sentence)) == 2
    assert len(sentence) < 500


def test_the_net_of_a_file_is_named(path, layout):
    published = create_model("cifar_resnet32_b", num_classes=7)
    save_weights(path, random_variables(published, 1), published, layout=layout)
    sentence = complaint(path, create_model("cifar_resnet20_b", num_classes=7))
    assert "is it a cifar_resnet32_b? create the model" in sentence
    assert sentence.count(" lacks ") == 0
    deeper = create_model("cifar_bottleneck_resnet20", num_classes=7)
    save_weights(path, random_variables(deeper), deeper, layout=layout)
    sentence = complaint(path, create_model("cifar_resnet20_b", num_classes=7))
    assert "is it a cifar_bottleneck_resnet20? create" in sentence
    own = published.clone(width=12)
    save_weights(path, random_variables(own), own, layout=layout)
    sentence = complaint(path, create_model("cifar_resnet20_b", num_classes=7))
    assert "give a file of this model" in sentence
    assert "is it a" not in sentence


def test_torch_files_of_nets_that_torch_lacks(path, variables, model):
    save_weights(path, variables, model, layout="torch")
    sentence = complaint(path, create_model("cifar_preact_resnet8"))
    assert "has torch's layout: torchvision and timm have no net with" in sentence


# Damaged and harmful files


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_number_that_is_not_finite(change, model, value):
    def spoil(arrays, name_of):
        name = name_of("layer3.0.conv2.weight", "params/stage3/block1/conv2/kernel")
        arrays[name] = arrays[name].copy()
        arrays[name][0, 0, 0, 0] = value

    sentence = complaint(change(spoil), model)
    assert "not finite in float32" in sentence
    assert "stage3/block1/conv2" in sentence or "layer3.0.conv2" in sentence


def test_a_number_too_large_for_float32(change, model):
    def spoil(arrays, name_of):
        name = name_of("fc.bias", "params/head/bias")
        arrays[name] = np.full(10, 1e300)

    assert "not finite in float32" in complaint(change(spoil), model)


def test_torchs_counters_are_not_needed(path, model, variables):
    written = save_weights(path, variables, model, layout="torch")
    kept = {name: a for name, a in written.items() if "tracked" not in name}
    write_safetensors(path, kept)
    assert len(kept) < len(written)
    assert_same(load_weights(path, model), variables)


def test_integers_in_place_of_weights(change, model):
    def quantise(arrays, name_of):
        arrays[name_of("fc.bias", "params/head/bias")] = np.zeros(10, np.int8)

    assert "as int8, but the model needs float32" in complaint(change(quantise), model)


def test_a_later_version_of_the_format(path, model, variables):
    save_weights(path, variables, model)
    arrays, metadata = read_arrays(path)
    write_safetensors(path, arrays, metadata | {"format_version": "2"})
    assert "version 2 of the format resnet_jax" in complaint(path, model)


def test_a_file_without_arrays(path, model):
    write_safetensors(path, {})
    assert "holds no arrays" in complaint(path, model)


def test_a_file_cut_short(path, model, variables, layout):
    save_weights(path, variables, model, layout=layout)
    path.write_bytes(path.read_bytes()[:-1])
    assert "damaged or incomplete" in complaint(path, model)


def test_a_file_with_another_ending_is_read_by_its_content(
    path, tmp_path, model, variables, layout
):
    save_weights(path, variables, model, layout=layout)
    assert_same(load_weights(path.rename(tmp_path / "net.pth"), model), variables)


def test_a_file_that_is_not_there(tmp_path, model):
    assert "there is no file of weights" in complaint(tmp_path / "none", model)


class Harm:
    """Unpickled, it makes a folder."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (self.trace,)


@pytest.mark.parametrize("as_zip", [False, True])
def test_a_malicious_pickle_is_refused_and_nothing_is_run(tmp_path, model, as_zip):
    trace = tmp_path / "trace"
    content = pickle.dumps({"conv1.weight": Harm(str(trace))}, 2)
    if as_zip:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("net/data.pkl", content)
        content = file.getvalue()
    else:
        parts = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
        content = b"".join(pickle.dumps(part, 2) for part in parts) + content
    path = tmp_path / "net.pth"
    path.write_bytes(content)
    assert "refused, nothing was run" in complaint(path, model)
    assert not trace.exists()
    # The pickle does what it is made for.
    pickle.loads(pickle.dumps(Harm(str(trace))))
    assert trace.exists()


# Saving what is no net's


def refusal(*args, **options):
    with pytest.raises(UserError) as error:
        save_weights(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_variables_of_another_net_are_not_written(path, model, variables, layout):
    other = random_variables(create_model("cifar_resnet8"))
    sentence = refusal(path, other, model, layout=layout)
    assert "do not match this ResNet: it lacks" in sentence
    assert "shortcut_conv" in sentence
    params = {"params": variables["params"]}
    assert "it lacks batch_stats/" in refusal(path, params, model, layout=layout)
    more = variables | {"intermediates": {"x": jnp.zeros(3)}}
    assert "it has extra intermediates/x" in refusal(path, more, model)
    assert not path.exists()


def test_variables_that_are_not_finite_are_not_written(path, model, variables, layout):
    spoilt = jax.tree.map(
        lambda leaf: leaf.at[(0,) * leaf.ndim].set(jnp.nan), variables
    )
    assert "is not finite" in refusal(path, spoilt, model, layout=layout)
    assert not path.exists()


def test_names_with_a_slash_are_not_written(path):
    model = nn.Dense(2)
    assert "without a slash" in refusal(path, {"params": {"a/b": np.ones(2)}}, model)


def test_unknown_layouts_endings_and_nets_are_refused(path, model, variables):
    assert "unknown layout 'jax'" in refusal(path, variables, model, layout="jax")
    assert "ends in .safetensors" in refusal(path.with_suffix(".pth"), variables, model)
    preact = NETS["preactivation"]
    sentence = refusal(path, random_variables(preact), preact, layout="torch")
    assert "no net with pre-activation" in sentence
    assert "there is no folder" in refusal(
        path.parent / "none" / path.name, variables, model
    )
