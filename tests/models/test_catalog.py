"""The named nets against the published and the counted sizes (Tables 1 and 6)."""

import functools

import jax
import jax.numpy as jnp
import pytest

from resnet_jax.analysis.complexity import (
    abstract_variables,
    count_multiply_adds,
    count_parameters,
)
from resnet_jax.errors import UserError
from resnet_jax.models import (
    BasicBlock,
    BottleneckBlock,
    catalog_entry,
    create_model,
    list_models,
    shortcuts,
)

IMAGENET_PARAMETERS = {
    ("resnet18", "A"): 11_515_688,
    ("resnet18", "B"): 11_689_512,
    ("resnet34", "A"): 21_623_848,
    ("resnet34", "B"): 21_797_672,
    ("resnet34", "C"): 22_716_840,
    ("resnet50", "B"): 25_557_032,
    ("resnet101", "B"): 44_549_160,
    ("resnet152", "B"): 60_192_808,
    ("plain18", "none"): 11_515_688,
    ("plain34", "none"): 21_623_848,
}
CIFAR_PARAMETERS = {  # depth: (A, B)
    20: (269_722, 272_474),
    32: (464_154, 466_906),
    44: (658_586, 661_338),
    56: (853_018, 855_770),
    110: (1_727_962, 1_730_714),
    1202: (19_421_274, 19_424_026),
}
PUBLISHED_CIFAR_MILLIONS = {
    20: 0.27,
    32: 0.46,
    44: 0.66,
    56: 0.85,
    110: 1.7,
    1202: 19.4,
}
GIGA_MULTIPLY_ADDS = {  # net, shortcut, stride version, to the digits given
    ("resnet18", "A", "v1"): "1.795",
    ("resnet18", "B", "v1"): "1.814",
    ("resnet34", "A", "v1"): "3.644",
    ("resnet34", "B", "v1"): "3.664",
    ("resnet34", "C", "v1"): "3.831",
    ("resnet50", "B", "v1"): "3.858",
    ("resnet101", "B", "v1"): "7.570",
    ("resnet152", "B", "v1"): "11.282",
    ("resnet50", "B", "v1.5"): "4.09",
    ("resnet101", "B", "v1.5"): "7.80",
    ("resnet152", "B", "v1.5"): "11.51",
    ("plain18", "none", "v1.5"): "1.795",
    ("plain34", "none", "v1.5"): "3.644",
}


@functools.cache
def parameters(name, **options):
    size = catalog_entry(name).image_size
    variables = abstract_variables(create_model(name, **options), (size, size, 3))
    return count_parameters(variables["params"])


@functools.cache
def multiply_adds(name, **options):
    size = catalog_entry(name).image_size
    return count_multiply_adds(create_model(name, **options), (size, size, 3))


def cifar_multiply_adds(n, projections=False):
    """3x3 convolutions: every one but the first of a stage costs 9 * 16^2 * 32^2."""
    stem = 9 * 3 * 16 * 32**2
    equal = 9 * 16 * 16 * 32**2
    first_of_stage_2_and_3 = 9 * 16 * 32 * 16**2 + 9 * 32 * 64 * 8**2
    classifier = 64 * 10
    total = stem + (6 * n - 2) * equal + first_of_stage_2_and_3 + classifier
    return total + projections * (16 * 32 * 16**2 + 32 * 64 * 8**2)


def test_the_catalog_holds_the_nets_of_the_paper():
    imagenet = {f"resnet{depth}" for depth in (18, 34, 50, 101, 152)}
    imagenet |= {"plain18", "plain34"}
    cifar = {f"cifar_resnet{depth}" for depth in CIFAR_PARAMETERS}
    cifar |= {f"cifar_plain{depth}" for depth in (20, 32, 44, 56, 110)}
    assert set(list_models()) >= imagenet | cifar


@pytest.mark.parametrize(("name", "shortcut"), IMAGENET_PARAMETERS)
def test_imagenet_parameters(name, shortcut):
    expected = IMAGENET_PARAMETERS[name, shortcut]
    assert parameters(name, shortcut=shortcut) == expected
    if shortcut == catalog_entry(name).shortcut:
        assert catalog_entry(name).parameters == expected


@pytest.mark.parametrize("name", ["resnet50", "resnet101", "resnet152"])
def test_striding_costs_no_parameters(name):
    assert parameters(name, stride_version="v1") == IMAGENET_PARAMETERS[name, "B"]


@pytest.mark.parametrize("depth", CIFAR_PARAMETERS)
def test_cifar_parameters(depth):
    option_a, option_b = CIFAR_PARAMETERS[depth]
    name = f"cifar_resnet{depth}"
    assert parameters(name) == catalog_entry(name).parameters == option_a
    published = PUBLISHED_CIFAR_MILLIONS[depth]
    assert option_a / 1e6 == pytest.approx(published, abs=0.05 if depth > 56 else 0.005)
    if depth < 1202:
        assert parameters(name, shortcut="B") == option_b
        assert parameters(f"cifar_plain{depth}") == option_a
        assert catalog_entry(f"cifar_plain{depth}").parameters == option_a


@pytest.mark.parametrize("n", [3, 9])
def test_cifar_option_c_adds_a_projection_to_every_block(n):
    # A 1x1 convolution from i to o channels and its normalisation: i*o + 2*o.
    extra = n * (16 * 16 + 32)
    extra += 16 * 32 + 64 + (n - 1) * (32 * 32 + 64)
    extra += 32 * 64 + 128 + (n - 1) * (64 * 64 + 128)
    depth = 6 * n + 2
    expected = CIFAR_PARAMETERS[depth][0] + extra
    assert parameters(f"cifar_resnet{depth}", shortcut="C") == expected


@pytest.mark.parametrize("case", GIGA_MULTIPLY_ADDS, ids="-".join)
def test_imagenet_multiply_adds(case):
    name, shortcut, stride_version = case
    published = GIGA_MULTIPLY_ADDS[case]
    count = multiply_adds(name, shortcut=shortcut, stride_version=stride_version)
    decimals = len(published.partition(".")[2])
    assert f"{count / 1e9:.{decimals}f}" == published
    entry = catalog_entry(name)
    if shortcut == entry.shortcut and (
        stride_version == "v1.5" or create_model(name).block is BasicBlock
    ):
        assert entry.multiply_adds == count


@pytest.mark.parametrize("depth", [20, 56, 110])
def test_cifar_multiply_adds(depth):
    n = (depth - 2) // 6
    assert multiply_adds(f"cifar_resnet{depth}") == cifar_multiply_adds(n)
    if depth < 110:
        assert multiply_adds(f"cifar_plain{depth}") == cifar_multiply_adds(n)
        with_projections = multiply_adds(f"cifar_resnet{depth}", shortcut="B")
        assert with_projections == cifar_multiply_adds(n, projections=True)


@pytest.mark.parametrize("depth", CIFAR_PARAMETERS)
def test_cifar_multiply_adds_in_the_catalog(depth):
    expected = cifar_multiply_adds((depth - 2) // 6)
    assert catalog_entry(f"cifar_resnet{depth}").multiply_adds == expected
    if depth < 1202:
        assert catalog_entry(f"cifar_plain{depth}").multiply_adds == expected


@pytest.mark.parametrize(
    ("plain", "residual"), [("plain18", "resnet18"), ("plain34", "resnet34")]
)
def test_option_a_costs_nothing(plain, residual):
    assert parameters(plain) == parameters(residual, shortcut="A")
    assert multiply_adds(plain) == multiply_adds(residual, shortcut="A")


@pytest.mark.parametrize(("depth", "n"), [(8, 1), (14, 2), (26, 4)])
def test_cifar_nets_of_other_depths(depth, n):
    residual, plain = create_model(f"cifar_resnet{depth}"), f"cifar_plain{depth}"
    assert residual.stage_sizes == (n, n, n)
    assert residual.shortcut == shortcuts.ZeroPad()
    assert create_model(plain).shortcut == shortcuts.NoShortcut()
    # Table 6's counts lie on a line: 97,216 parameters for each further n.
    assert parameters(plain) == CIFAR_PARAMETERS[20][0] + (n - 3) * 97_216


@pytest.mark.parametrize("depth", [0, 2, 7, 9, 21, 55, 57, 1201])
@pytest.mark.parametrize("kind", ["resnet", "plain"])
def test_cifar_depths_that_are_not_6n_plus_2_are_refused(kind, depth):
    with pytest.raises(UserError, match=rf"cifar_{kind}{depth}.*6n\+2.*not {depth}$"):
        create_model(f"cifar_{kind}{depth}")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("resnet-50", "resnet50"),
        ("resnt101", "resnet101"),
        ("ResNet18", "resnet18"),
        ("plain-34", "plain34"),
        ("cifar-resnet110", "cifar_resnet110"),
        ("cifar_resnet_56", "cifar_resnet56"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(name, near):
    with pytest.raises(UserError, match=rf"{name}.*did you mean {near}\?"):
        create_model(name)


def test_a_name_near_to_none_is_refused_with_all():
    with pytest.raises(UserError, match=r"'zzz'.*valid are .*resnet18.*cifar_plain110"):
        create_model("zzz")


def test_unknown_options_are_refused():
    with pytest.raises(UserError, match=r"shortcut 'D'.*A, B, C, none"):
        create_model("resnet18", shortcut="D")
    with pytest.raises(UserError, match=r"stride_version 'v2'.*v1, v1\.5"):
        create_model("resnet50", stride_version="v2")


@pytest.mark.parametrize(
    ("name", "shortcut", "block", "num_classes"),
    [
        ("resnet18", shortcuts.Projection(), BasicBlock, 1000),
        ("resnet50", shortcuts.Projection(), BottleneckBlock, 1000),
        ("plain34", shortcuts.NoShortcut(), BasicBlock, 1000),
        ("cifar_resnet20", shortcuts.ZeroPad(), BasicBlock, 10),
        ("cifar_plain20", shortcuts.NoShortcut(), BasicBlock, 10),
    ],
)
def test_defaults(name, shortcut, block, num_classes):
    model = create_model(name)
    assert model.shortcut == shortcut
    assert model.block is block
    assert model.num_classes == num_classes
    assert model.stride_version == "v1.5"
    assert (model.batch_norm_momentum, model.batch_norm_epsilon) == (0.9, 1e-5)
    assert model.batch_norm_groups == 1
    assert model.dtype == jnp.float32


@pytest.mark.parametrize(
    ("letter", "shortcut"),
    [
        ("A", shortcuts.ZeroPad()),
        ("B", shortcuts.Projection(everywhere=False)),
        ("C", shortcuts.Projection(everywhere=True)),
        ("none", shortcuts.NoShortcut()),
    ],
)
def test_shortcut_option(letter, shortcut):
    assert create_model("resnet34", shortcut=letter).shortcut == shortcut


def test_num_classes_option():
    def output_shape(num_classes):
        model = create_model("resnet50", num_classes=num_classes)
        variables = abstract_variables(model, (32, 32, 3))
        images = jax.ShapeDtypeStruct((3, 32, 32, 3), jnp.float32)
        return jax.eval_shape(model.apply, variables, images).shape

    assert output_shape(7) == (3, 7)
    assert output_shape(None) == (3, 2048)
