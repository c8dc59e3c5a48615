"""Locks, and a run in a store: gcsfs, Orbax and tensorstore against a GCS emulator."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time

import pytest

from resnet_jax import storage
from resnet_jax.errors import UserError
from tests.conftest import REPOSITORY


@pytest.fixture
def quick(monkeypatch):
    """Locks in a store that live and die within tenths of a second."""
    monkeypatch.setattr(storage, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(storage, "DEAD_SECONDS", 0.4)
    monkeypatch.setattr(storage, "SETTLE_SECONDS", 0.05)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("kind", [storage.Disk, storage.Store])
def test_a_second_run_is_refused_until_the_first_leaves(kind, tmp_path):
    with (
        kind().lock(tmp_path, print),
        pytest.raises(UserError, match="in use by another run"),
        kind().lock(tmp_path, print),
    ):
        pass
    heard = []
    with kind().lock(tmp_path, heard.append):
        assert not heard
    assert not (tmp_path / storage.LOCK).exists()


@pytest.mark.usefixtures("quick")
def test_the_lock_of_a_dead_run_is_taken_after_a_while(tmp_path):
    storage._renew(tmp_path / storage.LOCK, "a host, process 7")
    heard = []
    with storage.Store().lock(tmp_path, heard.append):
        assert "a host, process 7" in heard[0]


@pytest.mark.usefixtures("quick")
def test_of_two_runs_at_once_the_last_to_write_has_the_lock(tmp_path, monkeypatch):
    def taken_by_another(_):
        storage._renew(tmp_path / storage.LOCK, "a host, process 7")

    monkeypatch.setattr(time, "sleep", taken_by_another)
    with (
        pytest.raises(UserError, match="run on a host, process 7"),
        storage.Store().lock(tmp_path, print),
    ):
        pass


@pytest.mark.usefixtures("quick")
def test_a_run_that_lost_its_lock_writes_no_more(tmp_path):
    store = storage.Store()
    with store.lock(tmp_path, print):
        storage._renew(tmp_path / storage.LOCK, "a host, process 7")
        time.sleep(0.3)
        with pytest.raises(UserError, match="now belongs to a run on a host, process"):
            store.write(tmp_path / "result.json", "{}")
    assert not (tmp_path / "result.json").exists()
    assert "process 7" in (tmp_path / storage.LOCK).read_text()


def test_rows_are_written_at_most_so_often_and_all_on_leaving(tmp_path, quick):
    store, rows = storage.Store(), tmp_path / "rows"
    with store.lock(tmp_path, print):
        store.append(rows, "1\n")
        store.append(rows, "2\n")
        assert rows.read_text() == "1\n"
    assert rows.read_text() == "1\n2\n"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "file"
    file.write_text("old")
    with contextlib.suppress(ZeroDivisionError), storage.replacing(file) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert file.read_text() == "old"
    storage.Disk().write(file, "new")
    assert file.read_text() == "new"


@pytest.fixture(scope="module")
def bucket():
    """The environment in which gs://bucket is a server's on this machine."""
    pytest.importorskip("gcsfs")
    server_of = pytest.importorskip("gcp_storage_emulator.server")
    _tell_generations()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    server = server_of.create_server(
        "localhost", port, in_memory=True, default_bucket="bucket"
    )
    server.start()
    url = f"http://localhost:{port}"
    environment = os.environ | {
        "EPATH_USE_TF": "0",
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "CLOUD_STORAGE_EMULATOR_ENDPOINT": url,
        # tensorstore asks for credentials; the server takes any.
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "test",
        "PYTHONPATH": str(REPOSITORY),
    }
    # The run's own cache of compiled programs is tried, too.
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    yield environment
    server.stop()


def _tell_generations():
    """Adds the header by which tensorstore knows an object's version."""
    from gcp_storage_emulator.handlers import objects

    plain = objects.download

    def download(request, response, storage, *args, **kwargs):
        plain(request, response, storage, *args, **kwargs)
        if response.status.value < 300:
            name = request.params["bucket_name"], request.params["object_id"]
            generation = storage.get_file_obj(*name)["generation"]
            response["x-goog-generation"] = generation

    objects.download = download


RUN = """
import json
import sys

import jax

jax.config.update("jax_num_cpu_devices", 1)
from resnet_jax import storage, train
from resnet_jax.workdir import Workdir
from tests.conftest import make_tiny_config

# The run's own cache, not the one of the tests.
jax.config.update("jax_compilation_cache_dir", None)
storage.SETTLE_SECONDS = 0.1
found = []
for place in sys.argv[2:]:
    config = make_tiny_config(sys.argv[1])
    config.training.steps = 6
    config.evaluation.every_steps = 6
    config.checkpoint.every_steps = 3
    config.profile.steps = "3:4"
    # Compiled once, in the store, and read from there.
    config.compilation_cache = sys.argv[2] + "/cache"
    train(config, place)
    folder = Workdir(place)
    boards = [len(path.read_bytes()) for path in folder.tensorboard.iterdir()]
    found.append({
        "files": sorted(path.name for path in folder.path.iterdir()),
        "steps": sorted(path.name for path in folder.checkpoints.iterdir()),
        "boards": boards,
        "rows": folder.read_rows(),
        "result": folder.read_result(),
    })
print(json.dumps(found))
"""


def test_a_run_in_a_store_is_the_run_on_the_disk(bucket, tfds_dir, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", RUN, tfds_dir, "gs://bucket/run", tmp_path / "run"],
        env=bucket,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    there, here = json.loads(done.stdout.splitlines()[-1])
    assert there["files"] == sorted([*here["files"], "cache"])
    assert there["steps"] == here["steps"] == ["3", "6"]
    assert len(there["boards"]) == 1
    assert there["boards"] == pytest.approx(here["boards"], abs=200)

    def exact(rows):
        measured = ("seconds", "images_per_second", "input_wait")
        return [
            {k: v for k, v in r.items() if not k.startswith(measured)} for r in rows
        ]

    assert exact(there["rows"]) == exact(here["rows"])
    assert there["result"]["test_errors"] == here["result"]["test_errors"]


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_only_regular_files_are_read(tmp_path, kind):
    path = tmp_path / "file"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(OSError, match="not a regular file"):
        storage.read_text(path)


def test_temporary_files_of_killed_writes_go_at_the_next_start(tmp_path):
    (tmp_path / ".0123456789abcdef.part").write_text("half of a file")
    (tmp_path / "kept.part").write_text("")
    with storage.Disk().lock(tmp_path, print):
        assert [path.name for path in tmp_path.iterdir()] == ["kept.part"]


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("", "a path must not be empty"),
        ("a\0b", "NUL character"),
        ("~nobody-here/x", "begins with ~nobody-here, but this machine knows no home"),
        ("http://x", "http://x names no store"),
        ("file:///x", "names no store"),
        ("://x", "names no store"),
    ],
)
def test_what_no_path_can_be_is_refused(path, sentence):
    with pytest.raises(UserError, match=sentence):
        storage.locate(path)


def test_a_link_to_itself_is_no_path_or_cannot_be_read(tmp_path):
    """Python 3.11 and 3.12 refuse to resolve it; later ones find out on reading."""
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises((UserError, OSError), match="link"):
        storage.read_text(storage.locate(tmp_path / "loop"))
