"""Trackers: each row once, however often a run starts; faults cost a warning alone."""

import importlib.util
import json
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

import resnet_jax
from resnet_jax import distributed, storage
from resnet_jax.config import Config, resolve
from resnet_jax.errors import Preempted, UserError
from resnet_jax.models.trees import stack_blocks
from resnet_jax.training import tracking
from resnet_jax.training.tensorboard import TensorBoard
from resnet_jax.training.tracking import InBackground, TrackedRun, Trackers
from resnet_jax.workdir import Workdir
from tests.conftest import make_console
from tests.test_checkpoints import same
from tests.training.helpers import final_state


def config_with(*trackers):
    return resolve({"tracking": {"trackers": trackers}, "training": {"steps": 12}})


SERVICES = pytest.mark.filterwarnings("default::DeprecationWarning")


@pytest.fixture
def told():
    return []


@pytest.fixture
def make_run(tmp_path, told):
    def make(steps=(), trackers=("tensorboard",)):
        config = config_with(*trackers)
        folder = Workdir(tmp_path / "runs" / "mine")
        folder.create()
        rows = [row(step) for step in steps]
        return TrackedRun(folder, config, rows, max(steps, default=0), told.append)

    return make


def row(step):
    values = {"train_error": 1 / step, "learning_rate": 0.1, "seconds": 3.0}
    return {"step": step, "epoch": step / 10, **values}


class Recorder:
    """A service that remembers its calls; ``fault`` is called in each ``add``."""

    def __init__(self, fault=lambda: None):
        self.calls, self._fault = [], fault

    def start(self):
        self.calls.append("start")

    def add(self, row):
        self._fault()
        self.calls.append(row["step"])

    def finish(self, ending):
        self.calls.append(ending)


@pytest.mark.parametrize(
    ("error", "ending"),
    [(None, "finished"), (Preempted("saved"), "stopped"), (ValueError(), "failed")],
)
def test_a_service_gets_all_calls_in_order_and_how_the_run_ended(
    make_run, told, error, ending
):
    service = Recorder(lambda: time.sleep(0.001))
    try:
        with InBackground("mine", lambda _: service, make_run()) as tracker:
            for step in range(1, 50):
                tracker.add(row(step))
            if error:
                raise error
    except (Preempted, ValueError):
        pass
    assert service.calls == ["start", *range(1, 50), ending]
    assert told == []


def test_a_fault_costs_one_warning(make_run, told):
    def full():
        raise OSError("no space\nleft")

    service = Recorder(full)
    with InBackground("mine", lambda _: service, make_run()) as tracker:
        for step in range(1, 50):
            tracker.add(row(step))
    assert service.calls == ["start"]
    assert len(told) == 1
    assert told[0].startswith("warning: mine lacks the newest rows")
    assert "(no space left)" in told[0]


def test_a_service_that_hangs_holds_neither_a_row_nor_the_end(
    make_run, told, monkeypatch
):
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 0.2)
    free = threading.Event()
    began = time.monotonic()
    with InBackground("mine", lambda _: Recorder(free.wait), make_run()) as tracker:
        for step in range(1, 1000):
            tracker.add(row(step))
    assert time.monotonic() - began < 5
    free.set()
    assert len(told) == 1
    assert "within 0.2 s" in told[0]


def test_a_missing_package_is_refused_before_anything_else(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()  # as a run of wandb leaves it; no package
    monkeypatch.syspath_prepend(tmp_path)
    find_spec = tracking.importlib.util.find_spec
    monkeypatch.setattr(
        tracking.importlib.util,
        "find_spec",
        lambda name: None if name == "mlflow" else find_spec(name),
    )
    config = config_with("tensorboard", "mlflow")
    with pytest.raises(UserError, match=r"mlflow, which is not .*pip install .*mlflow"):
        resnet_jax.train(config, tmp_path / "run", make_console())
    assert not (tmp_path / "run").exists()


def test_a_folder_is_not_a_package(tmp_path, monkeypatch):
    namespace = type("Spec", (), {"origin": None})
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: namespace)
    with pytest.raises(UserError, match="wandb, which is not installed"):
        tracking.check_installed(config_with("wandb"))


@pytest.mark.parametrize(
    ("trackers", "sentence"),
    [(("wanbd",), "did you mean wandb"), (("mlflow", "mlflow"), "names a .* twice")],
)
def test_trackers_are_checked_with_the_config(trackers, sentence):
    with pytest.raises(UserError, match=sentence):
        config_with(*trackers)


def test_only_the_primary_process_tracks(make_run, monkeypatch):
    run = make_run(trackers=("tensorboard",))
    monkeypatch.setattr(distributed, "is_primary", lambda: False)
    with Trackers(run, None, None) as trackers:
        trackers.add(row(1))
    assert not run.folder.tensorboard.exists()


def test_histograms_are_named_by_part_and_layer_in_scanned_nets_too():
    model = resnet_jax.create_model("cifar_resnet20")
    params = jax.eval_shape(
        lambda: model.init(jax.random.key(0), np.zeros((1, 32, 32, 3)), train=False)
    )["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: rng.normal(size=p.shape), params)
    found = tracking.histograms(params)
    assert len(found) == len(jax.tree.leaves(params))
    counts, edges = found["stage2/block1/conv2/kernel"]
    kernel = params["stage2"]["block1"]["conv2"]["kernel"]
    assert counts.sum() == kernel.size
    assert (edges[0], edges[-1]) == (kernel.min(), kernel.max())
    broken = params | {"stem": jax.tree.map(lambda p: p * np.nan, params["stem"])}
    left = tracking.histograms(broken)
    assert {name for name in found if name not in left} == {
        name for name in found if name.startswith("stem/")
    }
    stacked = tracking.histograms(stack_blocks(params))
    assert {k: c.tolist() for k, (c, _) in stacked.items()} == {
        k: c.tolist() for k, (c, _) in found.items()
    }


def board(folder):
    """(step, tag, kind) of each value of TensorBoard's files, by the format."""
    found = []
    for file in sorted(folder.tensorboard.iterdir()):
        data = file.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            for value in event.summary.value:
                found.append((event.step, value.tag, value.WhichOneof("value")))
            data = data[length + 16 :]
    return found


PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes([0, 0, 0, 5, 0, 0, 0, 7])


def test_tensorboard_keeps_the_pictures_of_steps_that_are_not_run_again(make_run):
    run = make_run()
    histogram = np.histogram(np.arange(10.0), 5)
    with TensorBoard(run) as tracker:
        for step in (2, 4, 6):
            tracker.add(row(step))
            tracker.add_images(step, {"batch": PNG})
            tracker.add_histograms(step, {"stem/conv/kernel": histogram})
    with TensorBoard(make_run((2, 4))) as tracker:
        tracker.add(row(6))
        tracker.add_images(6, {"batch": PNG})
    values = board(run.folder)
    assert [s for s, tag, _ in values if tag == "error/train"] == [2, 4, 6]
    assert [s for s, tag, k in values if k == "image"] == [2, 4, 6]
    assert [s for s, tag, k in values if tag == "parameters/stem/conv/kernel"] == [2, 4]
    assert len(list(run.folder.tensorboard.iterdir())) == 1


def wandb_records(file):
    """The records of a .wandb file, which has LevelDB's log format.

    After a header of 7 bytes come blocks of 32 KiB with parts of records: checksum,
    length, and whether it is whole (1), first (2), middle (3) or last (4).
    """
    data, place, record = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length = int.from_bytes(data[place + 4 : place + 6], "little")
        record += data[place + 7 : place + 7 + length]
        if data[place + 6] in (1, 4):
            yield record
            record = b""
        place += 7 + length


def wandb_history(folder):
    """(step, values) of each entry in wandb's offline files, oldest first."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for file in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        for data in wandb_records(file):
            record = Record.FromString(data)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                keys = ["/".join(i.nested_key) or i.key for i in items]
                values = dict(zip(keys, (json.loads(i.value_json) for i in items)))
                found.append((values["_step"], values))
    return found


@pytest.fixture
def wandb():
    """wandb reads its environment once, unless it is torn down."""
    module = pytest.importorskip("wandb")
    module.teardown()
    yield module
    module.teardown()


@SERVICES
@pytest.mark.parametrize("remote", [False, True])
def test_wandb_gets_each_row_once(make_run, told, wandb, monkeypatch, remote):
    from resnet_jax.training.wandb_tracker import Wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    where = make_run().folder.path
    if remote:
        # A store's mirror: a temporary folder, copied to the workdir.
        store = storage.Store()
        monkeypatch.setattr(
            Workdir, "mirror", lambda self, folder: store.mirror(folder)
        )
        make_folders(monkeypatch)
    for before, after in (((), (2, 4, 6)), ((2, 4), (6, 8))):  # killed after step 6
        time.sleep(1.1 - time.time() % 1)  # wandb names its folders by the second
        with InBackground("wandb", Wandb, make_run(before)) as tracker:
            for step in after:
                tracker.add(row(step))
            tracker.add_histograms(after[-1], {"stem": np.histogram(np.ones(3), 2)})
            tracker.add_result({"test_error": 0.25})
    sentence = f"wandb: offline; send it with wandb sync {where}/wandb/off*"
    assert told == [sentence] * 2
    rows = [(step, v) for step, v in wandb_history(where) if "error/train" in v]
    assert [step for step, _ in rows] == [2, 4, 6, 8]
    assert [v["error/train"] for _, v in rows] == [1 / 2, 1 / 4, 1 / 6, 1 / 8]
    assert rows[-1][1]["parameters/stem/values"] == [0, 3]
    record = json.loads((where / "wandb.json").read_text())
    assert record["step"] == 8
    assert len(list((where / "wandb").glob("offline-run-*"))) == 2
    names = {path.name for path in (where / "wandb").glob("offline-run-*/*.wandb")}
    assert names == {f"run-{record['id']}.wandb"}


def make_folders(monkeypatch):
    """Lets a folder stand for a store, which makes folders by itself."""
    write_bytes = Path.write_bytes

    def write(self, data):
        self.parent.mkdir(parents=True, exist_ok=True)
        return write_bytes(self, data)

    monkeypatch.setattr(Path, "write_bytes", write)


@SERVICES
def test_wandb_without_a_login_asks_nothing(
    make_run, told, wandb, tmp_path, monkeypatch
):
    from resnet_jax.training.wandb_tracker import Wandb

    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with InBackground("wandb", Wandb, make_run()):
        pass
    assert len(told) == 1
    assert "call `wandb login`, or set WANDB_MODE=offline" in told[0]


@pytest.fixture
def mlflow_store(tmp_path, monkeypatch):
    """An MLflow client on a store of files, the quickest one; None without MLflow."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/store")
    if importlib.util.find_spec("mlflow") is None:
        yield None
        return
    import mlflow

    mlflow.set_tracking_uri(f"file://{tmp_path}/store")
    yield mlflow.MlflowClient()
    mlflow.set_tracking_uri(None)


def only_run(client, project="resnet_jax"):
    experiment = client.get_experiment_by_name(project)
    (run,) = client.search_runs([experiment.experiment_id])
    return run


def history(client, run, name):
    found = client.get_metric_history(run.info.run_id, name)
    return [(metric.step, metric.value) for metric in found]


class Killed(Exception):
    pass


@SERVICES
def test_a_run_with_trackers_is_the_run_without_them(
    tiny_config, mlflow_store, tmp_path, console, monkeypatch
):
    """It is killed in between; rows after its checkpoint were tracked before."""
    tiny_config.checkpoint.every_steps = 4
    resnet_jax.train(tiny_config, tmp_path / "plain", console)
    tiny_config.tracking.trackers = ("tensorboard",)
    if mlflow_store is not None:
        tiny_config.tracking.trackers += ("mlflow",)
    tiny_config.tracking.images_every_steps = 6
    workdir = tmp_path / "run"
    append_row = Workdir.append_row

    def kill(self, row):
        if row["step"] == 8:
            raise Killed
        append_row(self, row)

    with monkeypatch.context() as patch:
        patch.setattr(Workdir, "append_row", kill)
        with pytest.raises(Killed):
            resnet_jax.train(tiny_config, workdir, console)
    if mlflow_store is not None:
        assert only_run(mlflow_store).info.status == "FAILED"
    result = resnet_jax.train(tiny_config, workdir, console)

    assert "warning" not in console.file.getvalue()
    same(
        final_state(tiny_config, workdir)[0],
        final_state(tiny_config, tmp_path / "plain")[0],
    )
    values = board(Workdir(workdir))
    assert [step for step, _, kind in values if kind == "image"] == [6, 12]
    kernels = [
        s for s, tag, _ in values if tag == "parameters/stage3/block1/conv1/kernel"
    ]
    assert kernels == [6, 12]
    if mlflow_store is not None:
        check_mlflow(mlflow_store, workdir, result)


def check_mlflow(mlflow_store, workdir, result):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
    run = only_run(mlflow_store)
    assert run.info.status == "FINISHED"
    assert history(mlflow_store, run, "error/train") == [
        (row["step"], pytest.approx(row["train_error"])) for row in rows
    ]
    assert [step for step, _ in history(mlflow_store, run, "error/test")] == [6, 12]
    assert run.data.params["model.name"] == "cifar_resnet8"
    assert len(run.data.params) == len(resnet_jax.config.flatten(Config()))
    assert run.data.metrics["result/test_error"] == result["test_error"]
    files = mlflow_store.list_artifacts(run.info.run_id, "images")
    assert [file.path for file in files] == [
        "images/batch-000000006.png",
        "images/batch-000000012.png",
    ]


@SERVICES
def test_mlflow_starts_anew_in_a_store_that_lacks_the_run(
    make_run, mlflow_store, told, tmp_path
):
    pytest.importorskip("mlflow")
    from resnet_jax.training.mlflow_tracker import MLflow

    folder = make_run().folder
    folder.write_json("mlflow.json", {"id": "0" * 32})
    with InBackground("mlflow", MLflow, make_run((2, 4))) as tracker:
        tracker.add(row(6))
    assert told == []
    run = only_run(mlflow_store)
    assert [step for step, _ in history(mlflow_store, run, "error/train")] == [2, 4, 6]
    assert json.loads((folder.path / "mlflow.json").read_text()) == {
        "id": run.info.run_id
    }
