import pytest

from resnet_jax.cli import main
from tests.conftest import REPOSITORY

PLAN = ["plan", "--config", "none.py"]
PAPER = ["paper", "run", "figure6", "--workdir", "runs"]
PROCESSES = ["train", "--workdir", "runs"]
NUMBERS = [
    (["benchmark", "step"], "--batch", "from 1 to 1,048,576"),
    (["benchmark", "step"], "--image-size", "from 1 to 8,192"),
    (["benchmark", "step"], "--steps", "from 1 to 1,000,000"),
    (["benchmark", "input", "--config", "none.py"], "--batches", "from 1 to"),
    (["benchmark", "input", "--config", "none.py"], "--rounds", "from 1 to"),
    (["summary", "resnet18"], "--image-size", "from 1 to 8,192"),
    (["summary", "resnet18"], "--num-classes", "from 1 to 10,000,000"),
    (["summary", "resnet50"], "--output-stride", "from 1 to 32"),
    (PLAN, "--devices", "from 1 to 1,000,000"),
    (PLAN, "--hosts", "from 1 to 1,000,000"),
    (PLAN, "--rate", "a number above 0"),
    (PLAN, "--images-per-core", "a number above 0"),
    (PLAN, "--examples", "from 1 to 10,000,000,000"),
    (PLAN, "--classes", "from 1 to 10,000,000"),
    (PLAN, "--image-size", "from 1 to 8,192"),
    (PAPER, "--seeds", "from 1 to 10,000"),
    (["prepare", "a", "b"], "--shorter-side", "from 1 to 8,192"),
    (["prepare", "a", "b"], "--quality", "from 1 to 100"),
    (["prepare", "a", "b"], "--shards", "from 1 to"),
    (["prepare", "a", "b"], "--shard-mib", "from 1 to"),
    (["prepare", "a", "b"], "--threads", "from 1 to 1,024"),
    (PROCESSES, "--processes", "from 1 to"),
    (PROCESSES, "--process-id", "from 0 to"),
]


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("command", "option", "limits"), NUMBERS)
def test_numbers_have_limits(capsys, command, option, limits):
    for value in ("-1", "1e30", "9" * 20_000, "nan", "inf", "-" * 20_000, "x", ""):
        sentence = refusal(capsys, *command, f"{option}={value}")
        assert f"argument {option}: must be" in sentence
        assert limits in sentence
        assert len(sentence) < 200


@pytest.mark.parametrize("command", [["benchmark", "step"], PLAN, ["summary", "vgg16"]])
def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    tmp_path, capsys, command
):
    for name, sentence in (
        ("", "must not be empty"),
        ("a\0b", "NUL character"),
        ("~nobody-here/a.json", "knows no home folder"),
        ("/nowhere/a.json", "folder /nowhere does not exist"),
        (str(tmp_path), "is a folder"),
        ("a" * 5000, "File name too long"),
    ):
        assert sentence in refusal(capsys, *command, "--json", name)


def test_numbers_of_processes_from_the_environment_have_limits(monkeypatch, capsys):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "9" * 5000)
    assert main([*PROCESSES, "--config", "configs/digits.py"]) == 1
    sentence = capsys.readouterr().err
    assert "JAX_NUM_PROCESSES must be an integer from 1 to 1,000,000" in sentence


def test_a_grid_of_too_many_combinations_is_refused(capsys):
    values = ",".join(map(str, range(1, 1001)))
    grid = [
        f"--grid={name}={values}"
        for name in ("data.num_threads", "model.block_convs", "training.steps")
    ]
    config = str(REPOSITORY / "configs" / "digits.py")
    assert main(["sweep", "--config", config, "--workdir", "runs", *grid]) == 1
    assert "1,000,000,000 combinations; give at most" in capsys.readouterr().err


def test_control_characters_are_not_printed(capsys):
    escape = "\x1b[31mred\x07\x9b\udc80"
    main(["train", "--workdir", "runs", "--config", escape])
    sentence = capsys.readouterr().err
    assert r"\x1b[31mred\x07\x9b\udc80" in sentence
    assert sentence.rstrip("\n").isprintable()
    assert refusal(capsys, "summary", f"--{escape}").isprintable()
