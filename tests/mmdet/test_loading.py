"""Checkpoints of converted detectors in mmdet's own entry points, where a config has no hook."""

import pytest
import torch
from mmdet.apis import DetInferencer, init_detector
from mmdet.registry import MODELS
from mmengine.runner import load_checkpoint

import coconv_surgery as cs

WORDS = r"(?s)backbone\.layer1\.0\.conv1: plain, the weights come from dilations .*surgery=dict.*strict=False"


@pytest.fixture
def plain_config(tiny_ssd, tmp_path):
    """The tiny SSD without levels and without the hook; it imports us."""
    del tiny_ssd.default_hooks["coconv_plan"]
    tiny_ssd.model.backbone.levels = (1, 1, 1)
    tiny_ssd.dump(tmp_path / "plain.py")
    return str(tmp_path / "plain.py")


@pytest.fixture
def checkpoint(tiny_ssd, tmp_path):
    model = MODELS.build({**tiny_ssd.model, "backbone": {**tiny_ssd.model.backbone, "levels": (4, 3, 2)}})
    torch.save({"state_dict": model.state_dict(), "meta": {}}, tmp_path / "converted.pth")
    return str(tmp_path / "converted.pth")


@pytest.mark.parametrize(
    "load",
    [
        lambda config, checkpoint: init_detector(config, checkpoint, device="cpu"),
        lambda config, checkpoint: DetInferencer(config, checkpoint, device="cpu", show_progress=False),
    ],
    ids=["init_detector", "DetInferencer"],
)
def test_a_plain_config_refuses_a_converted_checkpoint(plain_config, checkpoint, load):
    with pytest.raises(cs.PlanError, match=WORDS):
        load(plain_config, checkpoint)


def test_so_does_mmdets_test_tool(tool, plain_config, checkpoint, tmp_path):
    with pytest.raises(cs.PlanError, match=WORDS):
        tool("test.py", plain_config, checkpoint, "--work-dir", tmp_path / "work")


def test_nothing_has_changed_when_it_is_refused(plain_config, tiny_ssd, checkpoint):
    model = MODELS.build(tiny_ssd.model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(cs.PlanError):
        load_checkpoint(model, checkpoint, map_location="cpu")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_convolution_that_was_plain_in_a_converted_detector_is_refused_too(tiny_ssd, checkpoint):
    model = MODELS.build({**tiny_ssd.model, "backbone": {**tiny_ssd.model.backbone, "levels": (4, 3, 2)}})
    cs.to_coconv_(model.neck.extra_layers[0][1].conv, (1, 2))
    with pytest.raises(cs.PlanError, match=r"neck\.extra_layers\.0\.1\.conv: .* the weights come from a plain one"):
        load_checkpoint(model, checkpoint, map_location="cpu")


def test_within_unchecked_levels_it_loads(plain_config, tiny_ssd, checkpoint):
    model = MODELS.build(tiny_ssd.model)
    with cs.unchecked_levels():
        load_checkpoint(model, checkpoint, map_location="cpu")
    assert torch.equal(model.backbone.conv1.weight, torch.load(checkpoint)["state_dict"]["backbone.conv1.weight"])


def test_a_wrapper_of_the_network_makes_no_difference(plain_config, tiny_ssd, checkpoint):
    wrapper = torch.nn.DataParallel(MODELS.build(tiny_ssd.model))
    with pytest.raises(cs.PlanError, match=WORDS):
        load_checkpoint(wrapper, checkpoint, map_location="cpu")
