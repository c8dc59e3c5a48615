import gc
import json
import re
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from resnet_jax.checkpoints import Checkpoints, DivergedError
from resnet_jax.config.schema import CheckpointConfig
from resnet_jax.errors import UserError
from tests.conftest import make_tiny_config
from tests.training.helpers import parts, plain_arrays


@pytest.fixture(scope="module")
def setup(tfds_dir):
    config = make_tiny_config(tfds_dir)
    config.optimizer.ema_decay = 0.9
    return parts(config)


def at_step(state, step):
    return state.replace(
        step=jnp.int32(step), params=jax.tree.map(lambda p: p + step, state.params)
    )


def save_steps(directory, setup, steps, holdout_errors=None, clean=False, **config):
    state = setup.fresh_state()
    errors = holdout_errors or [None] * len(steps)
    with Checkpoints(directory, CheckpointConfig(**config), clean) as checkpoints:
        for step, error in zip(steps, errors):
            checkpoints.save(at_step(state, step), {"rows": [{"step": step}]}, error)
            checkpoints.wait()
    return state


def same(a, b):
    def words(leaf):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf)

    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        np.testing.assert_array_equal(words(x), words(y))


def test_everything_comes_back_bit_for_bit(tmp_path, setup):
    state = save_steps(tmp_path, setup, [3])
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        restored, content = checkpoints.restore(3, setup.learner.abstract_state())
    same(restored, at_step(state, 3))
    assert content == {"rows": [{"step": 3}]}
    assert len(restored.params["head"]["kernel"].sharding.device_set) == 8


def test_plain_orbax_reads_the_state(tmp_path, setup):
    """As docs/weights.md shows it, on the devices that saved and as NumPy arrays."""
    state = save_steps(tmp_path, setup, [3])
    folder = tmp_path / "3" / "state"
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(folder)
    same(tree["params"], at_step(state, 3).params)
    same(tree["batch_stats"], state.batch_stats)
    assert int(tree["step"]) == 3
    arrays = plain_arrays(folder)
    same(arrays["params"], at_step(state, 3).params)
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(arrays["params"]))


def test_what_lamb_remembers_comes_back_beside_a_frozen_part(tmp_path, tfds_dir):
    config = make_tiny_config(tfds_dir)
    config.model.frozen = ("stem",)
    config.optimizer.kind = "lamb"
    config.optimizer.weight_decay_scope = "kernels"
    config.optimizer.max_grad_norm = 1.0
    setup = parts(config)
    state = save_steps(tmp_path, setup, [3])
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        restored, _ = checkpoints.restore(3, setup.learner.abstract_state())
    same(restored, at_step(state, 3))


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        ({"keep_last": 1}, [6]),
        ({"keep_last": 2}, [5, 6]),
        ({"keep_last": 1, "keep_every_steps": 2}, [2, 4, 6]),
        ({"keep_last": 1, "best": True}, [3, 6]),
    ],
)
def test_keeps_what_the_config_says(tmp_path, setup, config, kept):
    errors = [0.5, 0.4, 0.1, 0.3, 0.2, 0.2]
    save_steps(tmp_path, setup, [1, 2, 3, 4, 5, 6], errors, **config)
    with Checkpoints(tmp_path, CheckpointConfig(**config)) as checkpoints:
        assert checkpoints.steps() == kept
        assert checkpoints.best_step() == (3 if config.get("best") else None)


def test_a_damaged_error_chooses_no_best_checkpoint(tmp_path, setup):
    save_steps(tmp_path, setup, [1, 2, 3], [0.3, 0.2, 0.1], keep_last=3, best=True)
    file = tmp_path / "2" / "meta" / "metadata"
    file.write_text(file.read_text().replace("0.2", "0.0"))
    with (
        Checkpoints(tmp_path, CheckpointConfig(best=True)) as checkpoints,
        pytest.raises(UserError, match="2 is damaged: its content differs"),
    ):
        checkpoints.best_step()


def largest_file(folder):
    return max(
        (f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size
    )


def truncate(folder):
    file = largest_file(folder)
    file.write_bytes(file.read_bytes()[:100])


def flip_bits(folder):
    """A byte in the middle of the arrays' own file."""
    file = largest_file(folder)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0xFF
    file.write_bytes(bytes(data))


def empty(folder):
    for file in folder.rglob("*"):
        if file.is_file():
            file.write_bytes(b"")


def delete_arrays(folder):
    largest_file(folder).unlink()


def change_rows(folder):
    file = folder / "meta" / "metadata"
    text = file.read_text()
    assert '\\"step\\": 2' in text
    file.write_text(text.replace('\\"step\\": 2', '\\"step\\": 7'))


def rename_checksums(folder):
    file = folder / "meta" / "metadata"
    file.write_text(file.read_text().replace('"checksums"', '"checksumz"'))


def rename_an_array(folder):
    file = folder / "meta" / "metadata"
    file.write_text(file.read_text().replace(".params.head.bias", ".params.head.bibs"))


def list_instead_of_checksums(folder):
    file = folder / "meta" / "metadata"
    meta = json.loads(file.read_text())
    file.write_text(json.dumps(meta | {"checksums": [1, 2]}))


def rename_for_orbax(folder):
    file = folder / "state" / "_METADATA"
    file.write_text(file.read_text().replace("stage1", "stage9"))


@pytest.mark.parametrize(
    "damage",
    [
        *(truncate, flip_bits, empty, delete_arrays, change_rows, rename_checksums),
        *(rename_an_array, list_instead_of_checksums, rename_for_orbax),
    ],
)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(
    tmp_path, setup, damage, monkeypatch
):
    printed = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)
    state = save_steps(tmp_path, setup, [1, 2])
    damage(tmp_path / "2")
    warnings = []
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        restored, content = checkpoints.restore_newest(
            setup.learner.abstract_state(), warnings.append
        )
        same(restored, at_step(state, 1))
        assert content["rows"] == [{"step": 1}]
        assert f"checkpoint {tmp_path / '2'} is damaged" in warnings[0]
        assert "\n" not in warnings[0]
        gc.collect()
        assert not printed
        # The step can be saved again, and the damaged one is still there to look at.
        checkpoints.save(at_step(state, 2), {"rows": []}, None)
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2]
        same(
            checkpoints.restore(2, setup.learner.abstract_state())[0], at_step(state, 2)
        )
    assert (tmp_path / "damaged-2").is_dir()


def with_double_step(state):
    return state.replace(learning_rate=state.learning_rate.update(dtype=jnp.float64))


def without_head(state):
    params = {name: tree for name, tree in state.params.items() if name != "head"}
    return state.replace(params=params)


def with_a_class_more(state):
    head = state.params["head"] | {"bias": state.step.update(shape=(11,))}
    return state.replace(params=state.params | {"head": head})


OTHER_STATES = {
    "learning_rate is float32[] in it and float64[] in this run": with_double_step,
    "params.head.bias is float32[10] in it and absent in this run": without_head,
    "params.head.bias is float32[10] in it and int32[11] in this": with_a_class_more,
}


@pytest.mark.parametrize("difference", OTHER_STATES)
def test_a_checkpoint_of_another_net_is_no_damaged_one(tmp_path, setup, difference):
    save_steps(tmp_path, setup, [1, 2])
    other = OTHER_STATES[difference](setup.learner.abstract_state())
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        with pytest.raises(UserError, match=re.escape(difference)) as caught:
            checkpoints.restore_newest(other, pytest.fail)
        assert "damaged" not in str(caught.value)
        assert checkpoints.steps() == [1, 2]


def test_what_a_killed_save_left_goes_at_the_next_start(tmp_path, setup):
    save_steps(tmp_path, setup, [1])
    left = tmp_path / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "1", left)
    with Checkpoints(tmp_path, CheckpointConfig()) as reader:
        assert reader.steps() == [1]
    assert left.exists(), "only the process that saves may delete"
    save_steps(tmp_path, setup, [2], clean=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_all_damaged_is_said_and_nothing_deleted(tmp_path, setup):
    save_steps(tmp_path, setup, [1, 2])
    for step in ("1", "2"):
        truncate(tmp_path / step)
    with (
        Checkpoints(tmp_path, CheckpointConfig()) as checkpoints,
        pytest.raises(UserError, match=r"all checkpoints in .* are damaged"),
    ):
        checkpoints.restore_newest(setup.learner.abstract_state(), lambda text: None)
    assert (tmp_path / "1").is_dir()
    assert (tmp_path / "2").is_dir()


def test_a_state_that_is_not_finite_is_never_saved(tmp_path, setup):
    state = setup.fresh_state()
    kernel = state.params["head"]["kernel"].at[0, 0].set(jnp.inf)
    head = {**state.params["head"], "kernel": kernel}
    bad = state.replace(params={**state.params, "head": head})
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        with pytest.raises(DivergedError, match=r"params\.head\.kernel is not finite"):
            checkpoints.save(bad, {}, None)
        assert checkpoints.steps() == []


def test_content_is_json_with_a_checksum(tmp_path, setup):
    save_steps(tmp_path, setup, [1])
    meta = json.loads((tmp_path / "1" / "meta" / "metadata").read_text())
    assert set(meta) == {"content", "content_crc32", "checksums"}
