"""How arrays and batches lie on the devices."""

import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from resnet_jax import parallel
from resnet_jax.errors import UserError


def test_at_most_about_a_second_of_work_waits_on_the_devices(monkeypatch):
    """Steps of 0.1 s, dispatched at once, and then steps of 0.01 s."""
    clock, seconds, dispatched, done = 0.0, 0.1, 0, 0
    monkeypatch.setattr(time, "perf_counter", lambda: clock)

    class Step:
        def __init__(self):
            self.number = dispatched

        def block_until_ready(self):
            nonlocal clock, done
            clock, done = clock + seconds * (self.number - done), self.number

    in_flight, waiting = parallel.InFlight(seconds=0.5), []
    for dispatched in range(1, 201):
        if dispatched == 101:
            seconds = 0.01
        in_flight.add(Step)
        waiting.append(dispatched - done)
    assert waiting[0] == 1
    assert max(waiting[:100]) == waiting[99] == 5
    # Only some of the quick steps are waited for.
    assert 40 <= waiting[199] <= max(waiting) <= 60


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((3, 3, 256, 512), PartitionSpec(None, None, None, "data")),
        ((3, 3, 512, 256), PartitionSpec(None, None, "data")),
        ((2048, 1001), PartitionSpec("data")),
        ((64, 64), PartitionSpec("data")),  # the first of equal ones
        ((63, 64), PartitionSpec()),  # small: 4032 of 4096
        ((7, 7, 3, 100), PartitionSpec()),  # eight divides none of its axes
        ((), PartitionSpec()),
    ],
)
def test_the_largest_axis_that_divides_is_cut(shape, spec):
    mesh = parallel.data_mesh(8)
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    assert parallel.fully_sharded(leaf, mesh).spec == spec


def test_whole_arrays_are_placed_as_they_were():
    mesh = parallel.data_mesh(8)
    tree = {"kernel": np.arange(64 * 128.0).reshape(64, 128), "bias": np.ones(3)}
    placed = parallel.place_whole(tree, parallel.fully_sharded(tree, mesh))
    shards = placed["kernel"].addressable_shards
    assert {shard.data.shape for shard in shards} == {(64, 16)}
    for name, array in tree.items():
        np.testing.assert_array_equal(placed[name], array)


@pytest.mark.parametrize(
    ("batch", "micro_batches", "groups", "choices"),
    [
        (20, 1, 1, "are 16 and 24"),
        (48, 4, 1, "are 32 and 64"),
        (5, 1, 1, "does is 8"),
        (60, 2, 6, "are 48 and 96"),  # of 16, and of 6
    ],
)
def test_an_uneven_batch_is_refused_with_those_that_do(
    batch, micro_batches, groups, choices
):
    with pytest.raises(UserError, match=f"={batch} does not divide .*{choices}$"):
        parallel.check_divides(batch, 8, micro_batches, groups)


def test_an_even_batch_is_accepted():
    parallel.check_divides(64, 8, 4, 4)


def test_processes_of_unequal_devices_are_refused():
    devices = [SimpleNamespace(process_index=index) for index in (0, 0, 0, 1)]
    mesh = SimpleNamespace(size=4, devices=np.array(devices))
    with pytest.raises(UserError, match="the processes have 3, 1 devices"):
        parallel.check_processes(mesh)


@pytest.mark.parametrize(("devices", "waits"), [(8, True), (2, True), (1, False)])
def test_several_devices_of_one_cpu_are_waited_for(devices, waits, monkeypatch):
    """On one device, as on accelerators, programs run while others are prepared."""
    waited = []
    monkeypatch.setattr(jax, "block_until_ready", waited.append)
    sharding = parallel.batch_sharding(parallel.data_mesh(devices))
    tree = {"sums": jax.device_put(np.arange(8.0), sharding)}
    assert parallel.settled(tree) is tree
    assert waited == ([tree] if waits else [])
