"""Names of torch with the prefixes of training code, and images of other channels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.errors import UserError
from resnet_jax.models import create_model
from resnet_jax.weights import load_weights, save_weights
from resnet_jax.weights.files import read_arrays, write_safetensors
from resnet_jax.weights.load_save import load_named_model

MODEL = create_model("cifar_resnet8_b")


def drawn(channels=3, model=MODEL):
    images = jnp.zeros((1, 32, 32, channels))
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: rng.uniform(0.5, 1, a.shape).astype(a.dtype), shapes)


@pytest.fixture(scope="module")
def variables():
    return drawn()


@pytest.fixture(scope="module")
def torch_arrays(variables, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "plain.safetensors"
    return save_weights(path, variables, MODEL, layout="torch")


@pytest.fixture
def prefixed(torch_arrays, tmp_path):
    """Writes the arrays once for each prefix, with others, as safetensors or .pth."""

    def write(*prefixes, extra=(), ending="safetensors"):
        path = tmp_path / f"net.{ending}"
        arrays = {p + name: a for p in prefixes for name, a in torch_arrays.items()}
        arrays |= {name: np.zeros(2, np.float32) for name in extra}
        if ending == "safetensors":
            write_safetensors(path, arrays)
        else:
            torch = pytest.importorskip("torch")
            state = {name: torch.from_numpy(a.copy()) for name, a in arrays.items()}
            torch.save({"state_dict": state, "epoch": 3}, path)
        return path

    return write


def assert_same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "module._orig_mod.", "model.", "net.", "model.backbone."],
)
def test_known_prefixes_are_removed(prefixed, variables, prefix, ending):
    path = prefixed(prefix, extra=["n_averaged"], ending=ending)
    assert_same(load_weights(path, MODEL), variables)


def test_without_a_model_too(prefixed):
    named = load_named_model(prefixed("module."), "cifar_resnet8_b")
    assert named.model.num_classes == 10


def test_part_of_a_net_loses_its_prefix_before_the_names_are_compared(tmp_path):
    path = tmp_path / "net.safetensors"
    write_safetensors(path, {"module.fc.weight": np.zeros((10, 64), np.float32)})
    with pytest.raises(UserError, match=r"it lacks bn1\.bias, bn1\.weight and"):
        load_weights(path, MODEL)


def test_a_foreign_name_beside_the_net_is_named(prefixed):
    with pytest.raises(UserError, match=r"it has extra loss\.centre;"):
        load_weights(prefixed("model.", extra=["loss.centre"]), MODEL)


@pytest.mark.parametrize("new_head", [False, True])
def test_several_nets_or_unknown_prefixes_are_named_with_the_remedy(prefixed, new_head):
    moco = prefixed("module.encoder_q.", "module.encoder_k.", extra=["module.queue"])
    with pytest.raises(UserError) as error:
        load_weights(moco, MODEL, new_head=new_head)
    assert str(error.value).endswith(
        "its names begin with module.encoder_k., module.encoder_q.: save the arrays of "
        "module.encoder_k. or module.encoder_q. alone, without the prefix, and they "
        "fit this model"
    )
    other = create_model("cifar_resnet14_b")
    with pytest.raises(UserError, match=r"begin with student\.: .*cifar_resnet8_b"):
        load_weights(prefixed("student."), other)


@pytest.mark.parametrize("layout", ["flax", "torch"])
@pytest.mark.parametrize(("before", "after"), [(3, 1), (1, 3)])
def test_grey_and_rgb_weights_adapt_so_that_grey_images_give_the_same(
    tmp_path, layout, before, after
):
    path = tmp_path / "net.safetensors"
    save_weights(path, drawn(before), MODEL, layout=layout)
    sentences = []
    example = jax.ShapeDtypeStruct((1, 32, 32, after), jnp.float32)
    adapted = load_weights(path, MODEL, example=example, notify=sentences.append)
    assert ["first convolution's kernels" in text for text in sentences] == [True]
    grey = np.random.default_rng(1).normal(size=(2, 32, 32, 1)).astype(np.float32)
    given = (np.repeat(grey, n, -1) for n in (before, after))
    expected, found = (
        MODEL.apply(values, images)
        for values, images in zip((drawn(before), adapted), given, strict=True)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_without_an_example_the_file_sets_the_channels(tmp_path):
    path = tmp_path / "net.safetensors"
    save_weights(path, drawn(1), MODEL)
    grey = {"example": jnp.zeros((1, 32, 32, 1)), "notify": pytest.fail}
    for options in ({}, grey):
        assert_same(load_weights(path, MODEL, **options), drawn(1))


def test_other_numbers_of_channels_are_refused(prefixed):
    example = jnp.zeros((1, 32, 32, 4))
    with pytest.raises(UserError, match=r"of 3 channels, but these have 4.*\(16, 3"):
        load_weights(prefixed(""), MODEL, example=example)


def test_the_arrays_on_disk_keep_their_prefix(prefixed):
    arrays, _ = read_arrays(prefixed("module."))
    assert all(name.startswith("module.") for name in arrays)
