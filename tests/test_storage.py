"""A run in a store: gcsfs, Orbax and tensorstore against a server of the GCS API."""

import json
import os
import socket
import subprocess
import sys

import pytest

from resnet_jax.workdir import Workdir
from tests.conftest import REPOSITORY


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


def python(environment, code, *arguments):
    """What a program prints, a fresh process that knows the store."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


TRAIN = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 1)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
from resnet_jax import storage
storage.SETTLE_SECONDS = 0.1
from resnet_jax.training.train import train
from tests.conftest import make_tiny_config
config = make_tiny_config(sys.argv[2])
for name in sys.argv[3:]:
    exec(name)
train(config, sys.argv[1])
"""
READ = """
import json, sys
from etils import epath
from resnet_jax.workdir import Workdir
folder = Workdir(sys.argv[1])
files = sorted(str(file.relative_to(folder.path)) for file in folder.path.iterdir())
steps = sorted(path.name for path in folder.checkpoints.iterdir())
boards = [len(path.read_bytes()) for path in folder.tensorboard.iterdir()]
cache = len(list((folder.path / "cache").iterdir()))
print(json.dumps([files, steps, boards, cache, folder.read_rows(),
    folder.read_result()]))
"""


def test_a_run_in_a_store_is_the_run_on_the_disk(bucket, tfds_dir, tmp_path):
    python(bucket, TRAIN, "gs://bucket/run", tfds_dir, "config.profile.steps = '3:4'")
    python(bucket, TRAIN, tmp_path / "run", tfds_dir)
    files, steps, boards, cache, rows, result = json.loads(
        python(bucket, READ, "gs://bucket/run")
    )
    here = Workdir(tmp_path / "run")
    assert files == sorted([*(path.name for path in here.path.iterdir()), "profile"])
    assert steps == sorted(path.name for path in here.checkpoints.iterdir())
    assert boards == [
        pytest.approx(path.stat().st_size, abs=200)
        for path in here.tensorboard.iterdir()
    ]
    assert cache > 0

    def exact(rows):
        measured = ("seconds", "images_per_second", "input_wait")
        return [
            {k: v for k, v in r.items() if not k.startswith(measured)} for r in rows
        ]

    assert exact(rows) == exact(here.read_rows())
    assert result["test_errors"] == here.read_result()["test_errors"]
