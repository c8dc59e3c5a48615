import json

import pytest

from resnet_jax.cli import summary
from resnet_jax.cli.parser import Parser
from resnet_jax.errors import UserError
from resnet_jax.models import catalog_entry, list_models


def run(capsys, *arguments):
    parser = Parser(prog="resnet-jax")
    summary.add_parser(parser.add_subparsers(metavar="COMMAND"))
    options = parser.parse_args(["summary", *arguments])
    options.run(options)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    return [line.split() for line in text.splitlines()]


def test_one_net(capsys):
    lines = run(capsys, "cifar_resnet20")
    source = catalog_entry("cifar_resnet20").source.split()
    assert lines[0][:4] == ["cifar_resnet20;", "images", "32x32x3;", source[0]]
    assert ["stem", "32x32x16", "1", "3", "464", "442,368"] in lines
    assert ["stage1", "32x32x16", "1", "15", "14,016", "14,155,776"] in lines
    assert ["stage2", "16x16x32", "2", "37", "51,072", "12,976,128"] in lines
    assert ["stage3", "8x8x64", "4", "81", "203,520", "12,976,128"] in lines
    assert ["head", "10", "all", "650", "640"] in lines
    assert ["total", "269,722", "40,551,040"] in lines


def test_options(capsys):
    arguments = ["--image-size", "48", "--num-classes", "7", "--shortcut", "C"]
    lines = run(capsys, "cifar_resnet8", *arguments, "--blocks")
    title = ["cifar_resnet8,", "num", "classes", "7,", "shortcut", "C;", "images"]
    assert lines[0][:8] == [*title, "48x48x3;"]
    assert ["head", "7", "all", "455", "448"] in lines
    assert [line[0] for line in lines if line[:1] == ["block1"]] == ["block1"] * 3
    # Two 3x3 convolutions and the projection, each with its normalisation.
    parameters = 16 * 32 * 9 + 32 * 32 * 9 + 16 * 32 + 3 * 64
    products = 24 * 24 * (parameters - 3 * 64)
    assert [
        "block1", "24x24x32", "2", "13", f"{parameters:,}", f"{products:,}"
    ] in lines  # fmt: skip


def test_stride_version(capsys):
    fields = {}
    for version in ("v1", "v1.5"):
        arguments = ["--stride-version", version, "--image-size", "64"]
        lines = run(capsys, "resnet50", *arguments)
        (fields[version],) = [line[3] for line in lines if line[:1] == ["stage4"]]
    assert fields == {"v1": "483", "v1.5": "427"}


def test_several_nets(capsys):
    lines = run(capsys, "cifar_plain8", "cifar_resnet8")
    totals = [line for line in lines if line[:1] == ["total"]]
    assert len(totals) == 2
    assert totals[0] == totals[1]  # shortcut A has no parameters


@pytest.mark.parametrize(
    "arguments",
    [
        ["resnet18", "--compare", "plain18"],
        ["--compare", "resnet18", "plain18"],
        ["resnet18", "plain18", "--compare"],
    ],
)
def test_two_nets_side_by_side(tmp_path, capsys, arguments):
    file = tmp_path / "summary.json"
    lines = run(capsys, *arguments, "--json", str(file), "--image-size", "32")
    firsts = [line[0] for line in lines if line]
    assert firsts.index("resnet18;") < firsts.index("plain18;") < firsts.index("stem")
    stem = ["8x8x64", "11", "9.54k", "2.41M"]
    assert ["stem", *stem, *stem] in lines
    (sentence,) = [" ".join(line) for line in lines if line[1:3] == ["has", "1.015"]]
    assert sentence.startswith(
        "resnet18 has 1.015 times the parameters of plain18 and 1.011 times"
    )
    result = json.loads(file.read_text())
    assert [net["name"] for net in result["nets"]] == ["resnet18", "plain18"]
    parameters, multiply_adds = result["ratio"].values()
    assert parameters == pytest.approx(11_689_512 / 11_515_688)
    # 1/49 of those at 224 pixels but for the head, and three projections of 2**17.
    total = (1_814_073_344 - 512_000) / 49 + 512_000
    assert multiply_adds == pytest.approx(total / (total - 3 * 2**17))


def test_plain_nets_stay_plain_beside_others(capsys):
    arguments = ["--shortcut", "A", "--image-size", "32"]
    lines = run(capsys, "--compare", "resnet18", "plain18", *arguments)
    assert lines[0][:3] == ["resnet18,", "shortcut", "A;"]
    assert "plain18;" in [line[0] for line in lines if line]
    (total,) = [line for line in lines if line[:1] == ["total"]]
    assert total[1:3] == total[3:5]


def test_json(tmp_path, capsys):
    file = tmp_path / "summary.json"
    run(capsys, "cifar_resnet8", "--json", str(file), "--blocks")
    (net,) = json.loads(file.read_text())["nets"]
    assert net["image_shape"] == [32, 32, 3]
    assert net["source"] == catalog_entry("cifar_resnet8").source
    by_name = {row["name"]: row for row in net["rows"]}
    assert list(by_name)[:4] == ["stem", "stem/conv", "stem/norm", "stage1"]
    block = by_name["stage2/block1"]
    assert block["output_shape"] == [16, 16, 32]
    assert block["receptive_field"] == [13, 13]
    assert block["stride"] == [2, 2]
    assert by_name["head"]["receptive_field"] == [None, None]
    for cost in ("parameters", "multiply_adds"):
        rows = [row for row in net["rows"] if "/" not in row["name"]]
        assert net["total"][cost] == sum(row[cost] for row in rows)


def test_without_a_name_all_nets_are_listed(capsys):
    lines = run(capsys)
    assert set(list_models()) <= {line[0] for line in lines if line}
    resnet50 = next(line for line in lines if line[:1] == ["resnet50"])
    assert resnet50[1:4] == ["224", "25.6M", "4.09G"]
    assert any("6n+2" in line[0] for line in lines if line)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["zzz"], "unknown model 'zzz'; `resnet-jax summary` lists all"),
        (["resnet51"], "unknown model 'resnet51'; did you mean resnet50?"),
        (["cifar_resnet21"], r"cifar.*6n\+2"),
        (["cifar_resnet8", "--compare"], "--compare sets two nets side by side, not 1"),
        (["--compare", "a", "b", "c"], "two nets side by side, not 3"),
        (["cifar_resnet8", "--shortcut", "D"], "shortcut is one of .*, not 'D'"),
        (["resnet50", "--stride-version", "v2"], "v1, v1.5, not 'v2'"),
        (["plain18", "--shortcut", "B"], "plain18: a net without shortcuts takes none"),
    ],
)
def test_mistakes_get_one_sentence(capsys, arguments, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        run(capsys, *arguments)
    assert "\n" not in str(error.value)


def test_images_too_small_for_a_net(capsys, monkeypatch):
    from flax import linen as nn

    from resnet_jax.analysis import summary as analysis

    class Pooling(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            for index in range(3):
                x = nn.max_pool(
                    nn.Conv(4, (3, 3), name=f"conv{index}")(x), (2, 2), (2, 2)
                )
            return nn.Dense(10)(x.reshape(1, -1))

    class Refusing(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            raise ValueError(f"the images have {x.shape[1]} pixels")

    sentence = "images of 3 x 3 pixels are too small for cifar_resnet8"
    for model in (Pooling(), Refusing()):
        monkeypatch.setattr(analysis, "create_model", lambda name, model=model: model)
        with pytest.raises(UserError, match=sentence):
            run(capsys, "cifar_resnet8", "--image-size", "3")
    # A fault of another kind is not hidden.
    with pytest.raises(ValueError, match="the images have 32 pixels"):
        run(capsys, "cifar_resnet8")


def test_help(capsys):
    with pytest.raises(SystemExit):
        run(capsys, "--help")
    assert "resnet-jax summary resnet34 --compare plain34" in capsys.readouterr().out
