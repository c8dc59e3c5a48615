"""Names of weights, against servers of our own: the network is never asked."""

import ast
import contextlib
import functools
import hashlib
import http.server
import importlib.util
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from resnet_jax.errors import UserError
from resnet_jax.weights import hub
from resnet_jax.weights.files import read_arrays, write_safetensors
from resnet_jax.weights.hub import TORCHVISION_ADDRESS, TORCHVISION_FILES, locate

CONTENT = b"weights" * 10_000
CHECKSUM = hashlib.sha256(CONTENT).hexdigest()[:8]


class Server(http.server.ThreadingHTTPServer):
    """Answers by ``answers[path]``, (status, headers, content), and counts requests."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers = {}
        self.requests = []
        self.address = f"http://127.0.0.1:{self.server_address[1]}/"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append((self.command, self.path))
        status, headers, content = self.server.answers.get(self.path, (404, {}, b""))
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            # A client may have gone away.
            with contextlib.suppress(OSError):
                self.wfile.write(content)

    do_HEAD = do_GET  # http.server finds it by this name

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder of downloaded files, of this test alone; and no other address."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "TORCHVISION_ADDRESS", "http://127.0.0.1:1/")
    return tmp_path / "cache" / "resnet_jax"


@pytest.fixture
def published(server, monkeypatch):
    """A server that has resnet50-XXXXXXXX.pth; gives the name of that file."""
    file_name = f"resnet50-{CHECKSUM}.pth"
    monkeypatch.setitem(TORCHVISION_FILES, "resnet50", {"IMAGENET1K_V1": file_name})
    monkeypatch.setattr(hub, "TORCHVISION_ADDRESS", f"{server.address}models/")
    server.answers[f"/models/{file_name}"] = (200, {}, CONTENT)
    return file_name


def complaint(name):
    with pytest.raises(UserError) as error:
        locate(name)
    sentence = str(error.value)
    assert "\n" not in sentence
    return sentence


# Paths


def test_the_path_of_a_file_is_itself(tmp_path, monkeypatch):
    file = tmp_path / "torchvision:resnet50"
    file.write_bytes(b"")
    assert locate(file) == file
    assert locate(str(file)) == file
    monkeypatch.chdir(tmp_path)
    assert locate("torchvision:resnet50") == Path("torchvision:resnet50")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~/torchvision:resnet50") == file


def test_what_is_neither_a_file_nor_a_name(tmp_path):
    assert "is a folder; give the path of a file in it" in complaint(tmp_path)
    forms = "hf-hub:OWNER/NAME[@REVISION] or torchvision:MODEL[.WEIGHTS]"
    for name in ("nowhere.pth", "timm:resnet50"):
        sentence = complaint(name)
        assert repr(name) in sentence
        assert forms in sentence
    assert "must not be empty" in complaint("")
    assert "NUL character" in complaint("a\0b")
    assert "knows no home folder" in complaint("~nobody-here/x")
    assert "did you mean torchvision:resnet50?" in complaint("resnet50")
    name = "resnet50.IMAGENET1K_V2"
    assert f"did you mean torchvision:{name}?" in complaint(name)


def test_a_misspelt_name_of_torchvision_is_hinted_at():
    assert "did you mean resnet50?" in complaint("torchvision:resnet_50")
    assert "did you mean wide_resnet50_2?" in complaint("torchvision:wideresnet50_2")
    sentence = complaint("torchvision:resnet50.IMAGENET1K_V3")
    assert "resnet50 has no weights 'IMAGENET1K_V3'" in sentence
    assert "did you mean IMAGENET1K_V" in sentence
    assert "valid are resnet18" in complaint("torchvision:")


# torchvision


def test_the_table_is_torchvisions():
    """Read from its source, which need not fit the torch that is installed."""
    found = importlib.util.find_spec("torchvision")
    if found is None:
        pytest.skip("torchvision is the source of the table")
    folder = Path(found.submodule_search_locations[0], "models")
    published = {}
    for file in ("resnet.py", "vgg.py"):
        for node in ast.parse((folder / file).read_text()).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("_Weights"):
                model = node.name.removesuffix("_Weights").lower()
                published[model] = dict(weights_of(node))
    assert len(published) > len(TORCHVISION_FILES)
    for model, versions in TORCHVISION_FILES.items():
        addresses = {k: TORCHVISION_ADDRESS + v for k, v in versions.items()}
        expected = dict(published[model])
        expected.pop("IMAGENET1K_FEATURES", None)
        assert addresses == expected
    resnets = {model for model in published if "res" in model}
    assert resnets <= TORCHVISION_FILES.keys()


def weights_of(node):
    """(version, address) of the body of one of torchvision's enumerations."""
    for entry in node.body:
        if isinstance(entry, ast.Assign) and isinstance(entry.value, ast.Call):
            (address,) = (k.value for k in entry.value.keywords if k.arg == "url")
            yield entry.targets[0].id, address.value


def test_every_file_name_tells_its_checksum():
    for versions in TORCHVISION_FILES.values():
        assert "IMAGENET1K_V1" in versions
        for file_name in versions.values():
            assert len(hub._expected_checksum(file_name)) == 8
    assert hub._expected_checksum("resnet50-11ad3fa6.pth") == "11ad3fa6"


def test_a_file_is_downloaded_once(server, published, cache, capfd):
    for name in ("torchvision:resnet50", "torchvision:resnet50.IMAGENET1K_V1"):
        path = locate(name)
        assert path == cache / published
        assert path.read_bytes() == CONTENT
    assert server.requests == [("GET", f"/models/{published}")]
    server.answers.clear()
    assert locate("torchvision:resnet50").read_bytes() == CONTENT
    assert os.listdir(cache) == [published]
    assert capfd.readouterr() == ("", "")


def test_a_damaged_file_of_the_cache_is_downloaded_again(server, published, cache):
    locate("torchvision:resnet50")
    (cache / published).write_bytes(CONTENT[:-1])
    assert locate("torchvision:resnet50").read_bytes() == CONTENT
    assert len(server.requests) == 2


@pytest.mark.parametrize("content", [CONTENT[:-1], b"x" + CONTENT, b"", b"<html>"])
def test_a_file_of_another_checksum_is_not_kept(server, published, cache, content):
    server.answers[f"/models/{published}"] = (200, {}, content)
    sentence = complaint("torchvision:resnet50")
    assert f"SHA-256 begins {hashlib.sha256(content).hexdigest()[:8]}" in sentence
    assert f"not {CHECKSUM}" in sentence
    assert os.listdir(cache) == []


def test_a_download_that_breaks_off_leaves_nothing(server, published, cache):
    headers = {"Content-Length": str(len(CONTENT) + 5)}
    server.answers[f"/models/{published}"] = (200, headers, CONTENT[:-9])
    complaint("torchvision:resnet50")
    assert os.listdir(cache) == []


@pytest.mark.parametrize("failure", [KeyboardInterrupt, ConnectionResetError])
def test_an_interrupted_download_leaves_nothing(
    server, published, cache, monkeypatch, failure
):
    class Breaking:
        def __init__(self, *arguments, **options):
            self.chunks = [CONTENT[:1000]]

        def __enter__(self):
            return self

        def __exit__(self, *arguments):
            pass

        def read(self, size):
            if not self.chunks:
                # What is there so far would not be taken for the file.
                assert published not in os.listdir(cache)
                assert len(os.listdir(cache)) == 1
                raise failure
            return self.chunks.pop()

    monkeypatch.setattr("urllib.request.urlopen", Breaking)
    expected = UserError if failure is ConnectionResetError else failure
    with pytest.raises(expected):
        locate("torchvision:resnet50")
    assert os.listdir(cache) == []


def test_a_server_without_the_file_and_no_server(server, published, cache):
    server.answers.clear()
    sentence = complaint("torchvision:resnet50")
    assert f"{server.address}models/{published}" in sentence
    assert "404" in sentence
    assert "give the file's path" in sentence
    sentence = complaint("torchvision:resnet18")
    assert "resnet18-f37072fd.pth" in sentence
    assert os.listdir(cache) == []


def test_no_server_at_all(cache):
    sentence = complaint("torchvision:resnet50")
    assert "cannot be downloaded from http://127.0.0.1:1/" in sentence
    assert "refused" in sentence


def test_a_cache_that_cannot_be_written_to(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    sentence = complaint("torchvision:resnet50")
    assert f"to {tmp_path / 'file' / 'resnet_jax'} (" in sentence
    assert "Not a directory" in sentence


def test_the_cache_of_the_home_folder(tmp_path, monkeypatch, published):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    found = locate("torchvision:resnet50")
    assert found == tmp_path / ".cache" / "resnet_jax" / published


# Hugging Face


COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture
def hugging_face(server, tmp_path, monkeypatch):
    """huggingface_hub itself, before a server of ours and an empty cache."""
    # Its submodule, which imports what it depends on too.
    pytest.importorskip("huggingface_hub.file_download")
    import huggingface_hub

    download = functools.partial(
        huggingface_hub.hf_hub_download,
        endpoint=server.address.rstrip("/"),
        cache_dir=tmp_path / "hub",
        token=False,
    )
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    # It waits before it tries again.
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    return server


def publish(server, name, content, repository="timm/resnet50", revision="main"):
    headers = {"X-Repo-Commit": COMMIT, "ETag": hashlib.sha256(content).hexdigest()}
    server.answers[f"/{repository}/resolve/{revision}/{name}"] = (200, headers, content)


def deny(server, code, status=404, names=("model.safetensors", "pytorch_model.bin")):
    for name in names:
        headers = {"X-Error-Code": code, "X-Repo-Commit": COMMIT}
        path = f"/timm/resnet50/resolve/main/{name}"
        server.answers[path] = (status, headers, b"")


def test_the_safetensors_file_of_a_repository(hugging_face, tmp_path, capfd):
    write_safetensors(tmp_path / "weights", {"a": np.arange(3.0)})
    publish(hugging_face, "model.safetensors", (tmp_path / "weights").read_bytes())
    publish(hugging_face, "pytorch_model.bin", b"the other")
    path = locate("hf-hub:timm/resnet50")
    assert path.name == "model.safetensors"
    np.testing.assert_array_equal(read_arrays(path)[0]["a"], np.arange(3.0))
    assert capfd.readouterr() == ("", "")
    # Again, with no server at the address.
    hugging_face.answers.clear()
    hugging_face.shutdown()
    hugging_face.socket.close()
    assert locate("hf-hub:timm/resnet50") == path


def test_a_revision_of_a_repository(hugging_face):
    publish(hugging_face, "model.safetensors", b"new")
    publish(hugging_face, "model.safetensors", b"old", revision="v1.0")
    assert locate("hf-hub:timm/resnet50@v1.0").read_bytes() == b"old"


def test_the_older_file_where_the_newer_is_missing(hugging_face):
    deny(hugging_face, "EntryNotFound", names=["model.safetensors"])
    publish(hugging_face, "pytorch_model.bin", CONTENT)
    path = locate("hf-hub:timm/resnet50")
    assert path.name == "pytorch_model.bin"
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("code", "status", "words"),
    [
        ("EntryNotFound", 404, "neither model.safetensors nor pytorch_model.bin"),
        ("RepoNotFound", 404, "Repository Not Found"),
        ("GatedRepo", 403, "Cannot access gated repo"),
        ("RevisionNotFound", 404, "Revision Not Found"),
        ("", 500, "cannot be reached"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(hugging_face, code, status, words):
    deny(hugging_face, code, status)
    name = "hf-hub:timm/resnet50" + ("@main" if "Revision" in code else "")
    assert words in complaint(name)
    if status == 500:
        # It waits long enough for the first file.
        assert {path.rpartition("/")[2] for _, path in hugging_face.requests} == {
            "model.safetensors"
        }


def test_no_hub_at_all(hugging_face, capfd):
    hugging_face.shutdown()
    hugging_face.socket.close()
    assert "cannot be reached" in complaint("hf-hub:timm/resnet50")
    assert capfd.readouterr() == ("", "")


def test_the_older_file_in_the_cache_without_a_hub(hugging_face):
    deny(hugging_face, "EntryNotFound", names=["model.safetensors"])
    publish(hugging_face, "pytorch_model.bin", CONTENT)
    path = locate("hf-hub:timm/resnet50")
    hugging_face.shutdown()
    hugging_face.socket.close()
    assert locate("hf-hub:timm/resnet50") == path


def test_an_error_that_nobody_expects_is_one_sentence(hugging_face, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("a strange\nend")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    assert "(a strange end)" in complaint("hf-hub:timm/resnet50")


def test_names_that_no_repository_has(hugging_face):
    for name in ("", "resnet50", "timm/", "/resnet50", "a/b/c", "a/b c", "@main"):
        assert "OWNER/NAME" in complaint(f"hf-hub:{name}")
    assert "cannot be downloaded" in complaint("hf-hub:-timm-/..resnet50")
    assert hugging_face.requests == []


def test_the_hub_is_quiet_and_then_as_loud_as_before(hugging_face, monkeypatch):
    from huggingface_hub import hf_hub_download, utils

    def loudness():
        return utils.are_progress_bars_disabled(), utils.logging.get_verbosity()

    def download(*arguments, **options):
        during.append(loudness())
        return hf_hub_download(*arguments, **options)

    during = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    utils.enable_progress_bars()
    utils.logging.set_verbosity_warning()
    before = loudness()
    publish(hugging_face, "model.safetensors", CONTENT)
    locate("hf-hub:timm/resnet50")
    assert loudness() == before
    complaint("hf-hub:timm/nothing")
    assert loudness() == before
    assert set(during) == {(True, utils.logging.ERROR)}


def test_a_workdir_is_no_file_of_weights(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text("{}")
    command = r"resnet-jax convert \S+ run\.safetensors writes its weights"
    with pytest.raises(UserError, match=command):
        locate(tmp_path / "run")
