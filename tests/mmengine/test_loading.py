"""mmengine renames the keys of a checkpoint before it loads it."""

import logging
from types import SimpleNamespace

import mmengine.runner.checkpoint
import pytest
import torch
import torch.nn as nn
from loading_matrix import NETWORKS, build, by_mmengine, outcome
from mmengine.model import PretrainedInit
from mmengine.runner import CheckpointLoader, load_checkpoint

import coconv_surgery as cs
from coconv_surgery.mmengine import CoConvPlanHook


def of_a_parallel_network(source, network, folder):
    """The prefix that is taken off by default."""
    by_mmengine(nn.DataParallel(source), network, folder)


def by_revise_keys(source, network, folder):
    torch.save({"state_dict": nn.ModuleDict({"backbone": source}).state_dict()}, folder / "net.pth")
    load_checkpoint(network, str(folder / "net.pth"), revise_keys=[(r"^backbone\.", "")])


def by_init_cfg(source, network, folder):
    torch.save({"state_dict": nn.ModuleDict({"backbone": source, "neck": source}).state_dict()}, folder / "net.pth")
    PretrainedInit(str(folder / "net.pth"), prefix="backbone.", map_location="cpu")(network)


def into_a_part(source, network, folder):
    torch.save({"state_dict": source.state_dict()}, folder / "net.pth")
    load_checkpoint(nn.ModuleDict({"net": network}), str(folder / "net.pth"), revise_keys=[(r"^", "net.")])


WAYS = [of_a_parallel_network, by_revise_keys, by_init_cfg, into_a_part]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("source", ["plain", "A"])
@pytest.mark.parametrize("network", NETWORKS)
def test_levels_are_compared_as_without_renaming(way, source, network, tmp_path):
    expected = outcome(by_mmengine, source, network, tmp_path / "same")
    assert outcome(way, source, network, tmp_path / "renamed") == expected


def test_names_that_change_places_take_their_levels_along(tmp_path):
    def pair(*dilations):
        return nn.ModuleDict({name: cs.CoConv2d(8, 8, 3, dilations=d) for name, d in zip("ab", dilations, strict=True)})

    torch.save({"state_dict": pair((1, 2), (1, 3)).state_dict()}, tmp_path / "net.pth")
    keys = [("^a", "c"), ("^b", "a"), ("^c", "b")]
    load_checkpoint(pair((1, 3), (1, 2)), str(tmp_path / "net.pth"), revise_keys=keys)
    with pytest.raises(cs.PlanError, match="a: dilations"):
        load_checkpoint(pair((1, 2), (1, 3)), str(tmp_path / "net.pth"), revise_keys=keys)


def test_levels_are_forgotten_of_averages_too(tmp_path):
    """EMAHook puts the tensors of one state dict under the names of the other."""
    source, network = build("A"), build("B")
    state, average = source.state_dict(), nn.DataParallel(source).state_dict()
    meta = {"coconv_plan": cs.get_plan(source).to_json()}
    torch.save({"state_dict": state, "ema_state_dict": average, "meta": meta}, tmp_path / "net.pth")
    checkpoint = CheckpointLoader.load_checkpoint(str(tmp_path / "net.pth"), map_location="cpu")
    checkpoint["state_dict"].update({key: checkpoint["ema_state_dict"][f"module.{key}"] for key in state})
    with pytest.raises(cs.PlanError):
        mmengine.runner.checkpoint.load_state_dict(network, checkpoint["state_dict"])
    runner = SimpleNamespace(model=network, logger=logging.getLogger())
    CoConvPlanHook(strict=False).after_load_checkpoint(runner, checkpoint)
    with pytest.warns(cs.PlainWeightsWarning):
        mmengine.runner.checkpoint.load_state_dict(network, checkpoint["state_dict"])
    assert torch.equal(network.conv1[0].weight, source.conv1[0].weight)
