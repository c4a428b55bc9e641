"""The configs of ProGAN and CoProGAN, and what their trainings cost."""

import sys

import pytest
import torch
import yaml
from launching import python
from mmengine.config import Config
from mmengine.registry import MODELS

import coconv_surgery as cs
from coconv_surgery.generation.__main__ import main
from coconv_surgery.generation.cost import training_cost
from coconv_surgery.mmengine.paths import config_path
from coconv_surgery.paper.tables import TABLES
from coconv_surgery.zoo.progan import Discriminator, Generator, coprogan

FOLDER = config_path("progan/progan_shapes-32x32.py").parent
DATA = ("shapes-32x32", "cifar10-32x32", "celeba-128x128")
NAMES = [f"{network}_{data}" for data in DATA for network in ("progan", "coprogan")]


def config(name):
    return Config.fromfile(FOLDER / f"{name}.py")


def build(name):
    with torch.device("meta"):
        return MODELS.build(config(name).model)


def test_these_are_all_configs():
    assert {path.stem for path in FOLDER.glob("*.py")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_generator_is_progan_or_coprogan_and_the_discriminator_plain(name):
    model, given = build(name), config(name).model
    sizes = {"fmap_base": given.fmap_base, "fmap_max": given.fmap_max}
    with torch.device("meta"):
        expected = cs.get_plan(coprogan(given.resolution, **sizes))
    found = [(row.name, row.dilations, row.splits) for row in cs.get_plan(model.generator).converted]
    levels = [(row.name, row.dilations, row.splits) for row in expected.converted]
    assert found == (levels if name.startswith("coprogan") else [])
    assert not cs.get_plan(model.discriminator).converted
    assert model.generator.resolution == model.discriminator.resolution == given.resolution


@pytest.mark.parametrize("data", DATA)
def test_both_networks_differ_in_their_levels_alone(data):
    plain, contextual = (config(f"{network}_{data}") for network in ("progan", "coprogan"))
    del contextual.model["surgery"]
    assert plain.to_dict() == contextual.to_dict()


@pytest.mark.parametrize("data", DATA[1:])
def test_the_recipe_is_the_papers(data):
    for name in ("generator", "discriminator"):
        optimizer = config(f"coprogan_{data}").optim_wrapper[name].optimizer
        assert optimizer == {"type": "Adam", "lr": 1e-3, "betas": (0.0, 0.99), "eps": 1e-8}
    model = build(f"coprogan_{data}")
    assert model.growth.images == 12_000_000
    assert model.weights == {"penalty": 10, "target": 750 if "cifar" in data else 1, "drift": 0.001}
    assert model.generator.latent == 512


def test_table_7_names_configs_that_are_there():
    for row in TABLES[7].rows:
        assert (FOLDER.parent / row.config).exists()
        assert ("coprogan" in row.config) == row.network.startswith("Co")


def test_the_metafile_has_every_config_with_its_parameters():
    found = yaml.safe_load((FOLDER / "metafile.yml").read_text())["Models"]
    counts = {model["Name"]: model["Metadata"]["Parameters"] for model in found}
    assert counts == {name: sum(p.numel() for p in build(name).generator.parameters()) for name in NAMES}
    assert all(model["Config"] == f"configs/progan/{model['Name']}.py" for model in found)


def test_the_cost_of_a_step_is_that_of_its_passes():
    growth = {"images": 10, "batches": {4: 4}}
    with torch.device("meta"):
        model = MODELS.build({"type": "ProGAN", "resolution": 4, "fmap_base": 64, "growth": growth})
    (cost,) = training_cost(model)
    assert isinstance(model.generator, Generator)
    assert isinstance(model.discriminator, Discriminator)
    dense, conv, colours = 64 * 32 * 16, 32 * 32 * 9 * 16, 32 * 3 * 16
    generator = dense + conv + colours
    critic = 3 * 32 * 16 + 33 * 32 * 9 * 16 + 32 * 16 * 64 + 64
    # The generator: forward twice, backward once, which counts twice. The discriminator: forward four times; backward
    # for its weights from real and generated images, for a gradient's norm and through that, and for the generator.
    assert cost.resolution == 4
    assert cost.images == 10
    assert 4 * generator - dense + 12 * critic <= cost.each <= 4 * generator + 15 * critic


def test_the_cost_is_printed_without_training(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["generation", str(FOLDER / "progan_shapes-32x32.py"), "--cost"])
    main()
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert header.split("  ")[0] == "resolution"
    assert [row.split()[0] for row in rows[:4]] == ["4×4", "8×8", "16×16", "32×32"]
    assert "TFLOP/s" in rows[-1]


def test_the_command_says_what_to_install_without_mmengine():
    done = python("import coconv_surgery.generation.training", mmengine=None)
    assert "needs mmengine: pip install" in done.stderr
