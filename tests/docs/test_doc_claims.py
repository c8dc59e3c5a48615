"""What docs/from_pytorch.md and docs/from_flax.md say of the other libraries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from resnet_jax.config.schema import OptimizerConfig
from resnet_jax.models import BatchNorm, Conv
from resnet_jax.training.optimizer import make_optimizer


def running_variance(norm, x):
    variables = norm.init(jax.random.key(0), x)
    _, updates = norm.apply(variables, x, mutable=["batch_stats"])
    return float(updates["batch_stats"]["var"][0])


def test_variance_far_from_zero():
    random = np.random.default_rng(0)
    x = (1000 + 0.01 * random.normal(size=(64, 8, 8, 1))).astype(np.float32)
    theirs = nn.BatchNorm(use_running_average=False, momentum=0.0)
    ours = BatchNorm(use_running_average=False, momentum=0.0)
    assert running_variance(theirs, x) == pytest.approx(0.06, abs=0.01)
    assert running_variance(ours, x) == pytest.approx(1e-4, rel=0.02)


def test_running_variance_is_torchs_and_flax_is_biased():
    x = np.random.default_rng(0).normal(size=(2, 3, 3, 1)).astype(np.float32)
    options = {"use_running_average": False, "momentum": 0.0}
    assert running_variance(BatchNorm(**options), x) == pytest.approx(x.var(ddof=1))
    biased = BatchNorm(**options, unbiased=False)
    for norm in (nn.BatchNorm(**options), biased):
        assert running_variance(norm, x) == pytest.approx(x.var())


def test_padding_at_stride_2():
    corner = jnp.zeros((1, 8, 8, 1)).at[0, 0, 0, 0].set(1)
    kernel = {"params": {"kernel": jnp.arange(9.0).reshape(3, 3, 1, 1)}}
    same = nn.Conv(1, (3, 3), strides=2, use_bias=False, padding="SAME")
    ours = Conv(1, (3, 3), strides=2)
    assert same.apply(kernel, corner)[0, 0, 0, 0] == 0  # the first tap: nothing before
    assert ours.apply(kernel, corner)[0, 0, 0, 0] == 4  # the middle one


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_torchs_from_the_first_step(nesterov):
    torch = pytest.importorskip("torch")
    start = np.array([1.0, -2.0, 3.0], np.float32)
    tensor = torch.tensor(start, requires_grad=True)
    options = {"momentum": 0.9, "weight_decay": 0.01, "nesterov": nesterov}
    theirs = torch.optim.SGD([tensor], lr=0.1, **options)
    ours = make_optimizer(OptimizerConfig(**options))
    params = {"head": {"kernel": jnp.array(start)}}
    state = ours.init(params)
    for step, rate in enumerate((0.1, 0.1, 0.01, 0.01)):
        gradient = np.sin(np.arange(3) + step).astype(np.float32)
        theirs.param_groups[0]["lr"] = rate
        tensor.grad = torch.tensor(gradient)
        theirs.step()
        update, state = ours.update({"head": {"kernel": gradient}}, state, params)
        params = jax.tree.map(lambda p, u, rate=rate: p - rate * u, params, update)
        np.testing.assert_allclose(
            params["head"]["kernel"], tensor.detach().numpy(), rtol=1e-6
        )
