import json
import os
import random
import shutil
import subprocess
import sys
import time

import pytest

from tests.conftest import REPOSITORY
from tests.soak import __main__ as soak
from tests.soak import runs


def rows(*steps):
    return [
        {"step": step, "train_loss": 1 / step, "images_per_second": 9.0, "seconds": at}
        for at, step in enumerate(steps)
    ]


def changed(index, **values):
    found = rows(1, 2, 3)
    found[index] |= values
    return found


def test_rows_may_differ_in_what_the_clock_says_alone():
    expected = rows(1, 2, 3)
    runs.compare_rows(expected, expected)
    runs.compare_rows(changed(1, images_per_second=1.0, seconds=1.5), expected)
    for found, sentence in (
        (rows(1, 3), r"has steps \[1, 3\]"),
        (rows(1, 2, 2, 3), r"has steps \[1, 2, 2, 3\]"),
        (changed(1, train_loss=0.25), "train_loss of step 2 is 0.25, not 0.5"),
        (changed(2, test_error=0.5), "test_error of step 3 is 0.5, not None"),
        (changed(1, seconds=2), "do not increase"),
    ):
        with pytest.raises(runs.Failed, match=sentence):
            runs.compare_rows(found, expected)


@pytest.fixture
def checkpoint(tmp_path):
    """Files as a checkpoint has them: arrays, JSON in JSON, and empty marks."""
    folder = tmp_path / "4"
    content = json.dumps({"rows": rows(1, 2)})
    for name, data in (
        ("state/d/arrays", bytes(range(256)) * 8),
        ("state/manifest", b"manifest"),
        ("meta/metadata", json.dumps({"content": content}).encode()),
        ("commit_success.txt", b""),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_damages_change_what_they_say_and_no_more(checkpoint):
    before = contents(checkpoint)
    arrays = before["state/d/arrays"]
    intact = shutil.copytree(checkpoint, checkpoint.with_name("intact"))

    def after(damage, seed):
        shutil.rmtree(checkpoint)
        shutil.copytree(intact, checkpoint)
        damage(checkpoint, random.Random(seed))
        return contents(checkpoint)

    for seed in range(20):
        cut = after(runs.truncate, seed)["state/d/arrays"]
        assert len(cut) < len(arrays)
        assert arrays.startswith(cut)
        flipped = after(runs.flip_bit, seed)["state/d/arrays"]
        difference = int.from_bytes(flipped) ^ int.from_bytes(arrays)
        assert difference.bit_count() == 1
        assert set(after(runs.empty, seed)) == set(before)
        assert set(after(runs.empty, seed).values()) == {b""}
        left = after(runs.delete_half, seed)
        assert len(left) == 2
        assert "state/d/arrays" not in left
        text = after(runs.cut_json, seed)["meta/metadata"]
        assert before["meta/metadata"].startswith(text)
        assert text != before["meta/metadata"]
        meta = json.loads(after(runs.change_json, seed)["meta/metadata"])
        losses = {row["train_loss"] for row in json.loads(meta["content"])["rows"]}
        assert losses in ({2.0, 0.5}, {1.0, 1.5})


def test_a_process_is_judged_by_its_status_and_output(tmp_path):
    def started(program):
        command = [sys.executable, "-c", program]
        return runs.Process(command, tmp_path / "log", dict(os.environ))

    assert started("print('done')").ends(0) == "done\n"
    with pytest.raises(runs.Failed, match="exit status 3, not 0: late"):
        started("print('late'); raise SystemExit(3)").ends(0)
    with pytest.raises(runs.Failed, match=r"a traceback: .*ValueError: broken"):
        started("raise ValueError('broken')").ends(1)
    sleeping = started("import time; time.sleep(60)")
    assert sleeping.wait_for(0.01)
    with pytest.raises(runs.Failed, match="still running after 0 s"):
        sleeping.ends(0, seconds=0.1)
    start = time.monotonic()
    assert not started("pass").wait_for(60)
    assert time.monotonic() - start < 30


def test_a_fault_has_one_sentence():
    fault = "resnet-jax: error: no room\n"
    assert runs.the_error("step 1\n" + fault) == "no room"
    for output in ("step 1\n", fault + fault):
        with pytest.raises(runs.Failed, match="sentences of a fault"):
            runs.the_error(output)


def test_a_fault_that_cannot_be_tried_is_no_pass(tmp_path, monkeypatch, capsys):
    def no_mount(_):
        raise runs.Skipped("mount is not allowed")
        yield

    def broken(_):
        yield "first try"
        raise runs.Failed(f"{tmp_path}/run ended")

    monkeypatch.setattr(soak, "SCENARIOS", {"disk": no_mount, "broken": broken})
    outcomes = {
        name: soak.attempt(name, runs.Runs(tmp_path, [], 0)) for name in soak.SCENARIOS
    }
    assert outcomes["disk"].status == "skipped"
    assert outcomes["disk"].reason == "mount is not allowed"
    assert outcomes["broken"].status == "failed"
    assert outcomes["broken"].seen == ["first try"]
    assert outcomes["broken"].reason == "SOAK/run ended"
    assert "first try" in capsys.readouterr().out


def test_a_used_folder_is_refused(tmp_path, capsys):
    (tmp_path / "old").touch()
    assert soak.main(["--workdir", str(tmp_path)]) == 1
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.slow
def test_every_fault_once_or_twice(tmp_path, tfds_dir):
    result = subprocess.run(
        [
            *(sys.executable, "-m", "tests.soak", "--seed", "0"),
            *("--kills", "3", "--terminations", "4", "--tries", "1", "--steps", "30"),
            *("--workdir", str(tmp_path / "soak"), "--data-dir", tfds_dir),
            *("--json", str(tmp_path / "soak.json")),
        ],
        capture_output=True,
        text=True,
        env=dict(os.environ, PYTHONPATH=str(REPOSITORY)),
        cwd=REPOSITORY,
        timeout=3000,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    outcomes = json.loads((tmp_path / "soak.json").read_text())["outcomes"]
    status = {outcome["name"]: outcome["status"] for outcome in outcomes}
    assert set(status) == set(soak.SCENARIOS)
    assert {name for name in status if status[name] == "skipped"} <= {"disk-full"}
