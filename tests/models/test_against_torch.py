"""Whole nets against the same nets in torch.

The reference (tests/torch_reference.py) computes in float64. Ours is compared twice:
its forward passes as they are, in float32, and a whole training pass in float64. A
gradient jumps where rounding carries the input of one ReLU across zero, so that in
float32 the gradients of two faithful nets of this depth differ by percents, whichever
library computes them; in float64 they agree to 12 digits.
"""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.analysis.complexity import abstract_variables
from resnet_jax.models import create_model

torch = pytest.importorskip("torch", reason="torch is the reference of these tests")

from tests import torch_reference  # noqa: E402  (needs torch)

BATCH = 2
NUM_CLASSES = 10
EIGHTEEN = {"stage_sizes": (2, 2, 2, 2), "stem": "imagenet"}
FIFTY = {"stage_sizes": (3, 4, 6, 3), "stem": "imagenet", "bottleneck": True}
CIFAR = {"stage_sizes": (3, 3, 3), "stem": "cifar"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One net, by its name in the catalog and as the reference's arguments."""

    name: str
    reference: dict
    size: int
    options: dict = dataclasses.field(default_factory=dict)

    def __str__(self):
        return "-".join([self.name, *self.options.values(), f"{self.size}px"])


CASES = [
    Case("cifar_resnet20", CIFAR | {"shortcut": "A"}, 32),
    Case("cifar_resnet20", CIFAR | {"shortcut": "B"}, 32, {"shortcut": "B"}),
    Case("cifar_resnet20", CIFAR | {"shortcut": "C"}, 33, {"shortcut": "C"}),
    Case("cifar_plain20", CIFAR | {"shortcut": "none"}, 32),
    Case("resnet18", EIGHTEEN, 64),
    Case("resnet18", EIGHTEEN | {"shortcut": "A"}, 97, {"shortcut": "A"}),
    Case("resnet50", FIFTY | {"stride_version": "v1"}, 64, {"stride_version": "v1"}),
    Case("resnet50", FIFTY, 65),
]


def random_variables(model, size, rng):
    """Variables without the zeros and ones behind which a mistake could hide."""

    def draw(path, leaf):
        name = path[-1].key
        if name == "kernel":
            fan_in = np.prod(leaf.shape[:-1])
            return rng.normal(0, np.sqrt(2 / fan_in), leaf.shape)
        if name in ("scale", "var"):
            return rng.uniform(0.5, 1.5, leaf.shape)
        return rng.normal(0, 0.1, leaf.shape)

    shapes = abstract_variables(model, (size, size, 3))
    return jax.tree_util.tree_map_with_path(draw, shapes)


@contextlib.contextmanager
def one_torch_thread():
    """Torch's pool and XLA's, on few cores, wait for each other: tenfold the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextlib.contextmanager
def double_precision():
    """Float64 in place of float32, also where the library asks for it by name."""
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(jnp, "float32", jnp.float64)
        yield


def ours_in_float32(model, variables, batch):
    """Logits of one batch: with the running statistics, and with the batch's own."""

    @jax.jit
    def forward(variables, images):
        train_logits, _ = model.apply(
            variables, images, train=True, mutable=["batch_stats"]
        )
        return model.apply(variables, images, train=False), train_logits

    variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), variables)
    with jax.default_matmul_precision("highest"):
        eval_logits, train_logits = forward(variables, jnp.asarray(batch, jnp.float32))
    assert eval_logits.dtype == train_logits.dtype == np.float32
    return {"eval_logits": eval_logits, "train_logits": train_logits}


def ours_in_float64(model, variables, batches, cotangent):
    """Logits and gradients of the first batch, running statistics after all."""

    @jax.jit
    def train_pass(params, stats, images):
        def loss(params, images):
            logits, updated = model.apply(
                {"params": params, "batch_stats": stats},
                images,
                train=True,
                mutable=["batch_stats"],
            )
            return jnp.vdot(logits, cotangent), (logits, updated["batch_stats"])

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, images)

    params, stats = variables["params"], variables["batch_stats"]
    passes = []
    with double_precision():
        for images in batches:
            passes.append(train_pass(params, stats, images))
            stats = passes[-1][1][1]
    (params_gradient, images_gradient), (train_logits, _) = passes[0]
    assert train_logits.dtype == images_gradient.dtype == np.float64
    return {
        "train_logits": train_logits,
        "images_gradient": images_gradient,
        "params_gradient": torch_reference.to_state_dict({"params": params_gradient}),
        "batch_stats": torch_reference.to_state_dict({"batch_stats": stats}),
    }


def theirs(net, batches, cotangent):
    """The same of the torch net, with its unbiased running variance made biased."""
    norms = {
        name: module
        for name, module in net.named_modules()
        if isinstance(module, torch.nn.BatchNorm2d)
    }
    initial_var = {name: norm.running_var.clone() for name, norm in norms.items()}
    counts = {}

    def count(name, module, args, output):
        counts[name] = output.numel() // output.shape[1]

    for name, norm in norms.items():
        norm.register_forward_hook(functools.partial(count, name))

    inputs = [torch.tensor(images.transpose(0, 3, 1, 2)) for images in batches]
    inputs[0].requires_grad_(True)
    with torch.no_grad():
        eval_logits = net.eval()(inputs[0])
    train_logits = net.train()(inputs[0])
    (train_logits * torch.from_numpy(cotangent)).sum().backward()
    with torch.no_grad():
        for images in inputs[1:]:
            net(images)

    stats = {}
    for name, norm in norms.items():
        # v_t = 0.9 v_{t-1} + 0.1 n/(n-1) b_t, b the biased variance of n numbers: all
        # but what is left of the first value is n/(n-1) times the biased average.
        left = 0.9 ** len(batches) * initial_var[name]
        biased = left + (norm.running_var - left) * (counts[name] - 1) / counts[name]
        stats[f"{name}.running_mean"] = norm.running_mean.numpy()
        stats[f"{name}.running_var"] = biased.numpy()
    return {
        "eval_logits": eval_logits.numpy(),
        "train_logits": train_logits.detach().numpy(),
        "images_gradient": inputs[0].grad.numpy().transpose(0, 2, 3, 1),
        "params_gradient": {n: p.grad.numpy() for n, p in net.named_parameters()},
        "batch_stats": stats,
    }


@dataclasses.dataclass(frozen=True)
class Results:
    """What one net computes: ours in single and in double precision, and torch's."""

    case: Case
    single: dict
    double: dict
    expected: dict


@pytest.fixture(scope="module", params=CASES, ids=str)
def results(request):
    case = request.param
    rng = np.random.default_rng(0)
    create = functools.partial(
        create_model, case.name, num_classes=NUM_CLASSES, **case.options
    )
    model = create()
    # Numbers that float32 holds exactly, so that both precisions see the same ones.
    variables = jax.tree.map(
        lambda leaf: leaf.astype(np.float32).astype(np.float64),
        random_variables(model, case.size, rng),
    )
    shape = (3, BATCH, case.size, case.size, 3)
    batches = rng.normal(0.3, 1, shape).astype(np.float32).astype(np.float64)
    cotangent = rng.normal(size=(BATCH, NUM_CLASSES))

    net = torch_reference.TorchResNet(**case.reference, num_classes=NUM_CLASSES)
    torch_reference.load_variables(net.double(), variables)
    with one_torch_thread():
        expected = theirs(net, batches, cotangent)
    return Results(
        case,
        ours_in_float32(model, variables, batches[0]),
        ours_in_float64(create(dtype=jnp.float64), variables, batches, cotangent),
        expected,
    )


def relative_error(ours, expected):
    """The largest difference over the largest magnitude."""
    ours = np.asarray(ours, np.float64)
    assert ours.shape == expected.shape
    return np.abs(ours - expected).max() / np.abs(expected).max()


def worst_error(ours, expected):
    """The largest relative error of two dictionaries of arrays, with its name."""
    assert ours.keys() == expected.keys()
    return max((relative_error(ours[name], expected[name]), name) for name in ours)


def test_logits_with_running_statistics(results):
    error = relative_error(
        results.single["eval_logits"], results.expected["eval_logits"]
    )
    assert error < 1e-5


def test_logits_with_batch_statistics(results):
    expected = results.expected["train_logits"]
    # Float32 alone loses more digits through 53 normalisations by statistics of a few
    # numbers each (8 or 18 in the last stage): the double-precision error shows it.
    tolerance = 5e-4 if results.case.name == "resnet50" else 1e-5
    assert relative_error(results.single["train_logits"], expected) < tolerance
    assert relative_error(results.double["train_logits"], expected) < 1e-10


def test_gradient_of_the_images(results):
    error = relative_error(
        results.double["images_gradient"], results.expected["images_gradient"]
    )
    assert error < 1e-10


def test_gradients_of_the_parameters(results):
    error, name = worst_error(
        results.double["params_gradient"], results.expected["params_gradient"]
    )
    assert error < 1e-10, name


def test_running_statistics_after_three_passes(results):
    error, name = worst_error(
        results.double["batch_stats"], results.expected["batch_stats"]
    )
    assert error < 1e-10, name
