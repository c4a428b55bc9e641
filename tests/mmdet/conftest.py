"""What the tests of the MMDetection part share: the registered types, tiny data and a tiny detector."""

import runpy
import sys
from pathlib import Path

import mmdet
import pytest
import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from randomising import randomise_norms

import coconv_surgery.mmdet  # noqa: F401
from coconv_surgery.demo.shapes import write_shapes

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(autouse=True)
def _mmdet_scope():
    with DefaultScope.overwrite_default_scope("mmdet"):
        yield


@pytest.fixture
def configs() -> Path:
    return CONFIGS


@pytest.fixture
def lively():
    """Give a network's norms statistics that make a mistake in folding them show."""

    def enliven(network: nn.Module) -> nn.Module:
        randomise_norms(network)
        network.eval()
        return network

    return enliven


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    """The smallest data set of shapes that trains and evaluates."""
    root = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(root, train=8, val=2, size=96)
    return root


@pytest.fixture
def tiny_ssd(shapes, tmp_path) -> Config:
    """SSD on a very narrow CoResNet-18, with the hook that guards the plan."""
    return _tiny_ssd(shapes, tmp_path)


@pytest.fixture
def tiny_plain_ssd(tiny_ssd) -> Config:
    """The same on a plain ResNet, for one epoch."""
    return _plain(tiny_ssd)


@pytest.fixture(scope="session")
def plain_checkpoint(shapes, tmp_path_factory) -> Path:
    """What the plain one comes to."""
    folder = tmp_path_factory.mktemp("plain")
    config = _plain(_tiny_ssd(shapes, folder))
    config.experiment_name = "plain"  # else it shares the log of a training that starts in the same second
    with DefaultScope.overwrite_default_scope("mmdet"):
        Runner.from_cfg(config).train()
    return folder / "work" / "epoch_1.pth"


def _plain(config: Config) -> Config:
    config.model.backbone.type = "ResNet"
    del config.model.backbone["levels"]
    config.train_cfg.max_epochs = 1
    config.train_cfg.val_interval = 10
    return config


def _tiny_ssd(shapes: Path, folder: Path) -> Config:
    config = Config.fromfile(CONFIGS / "shapes" / "ssd_coresnet18_shapes.py")
    channels = (32, 32, 32)
    options = {
        "work_dir": str(folder / "work"),
        "visualizer.name": str(folder),  # mmengine shares what writes logs among equal names
        "model.backbone.base_channels": 8,
        "model.neck.in_channels": channels[:1],
        "model.neck.out_channels": channels,
        "model.bbox_head.in_channels": channels,
        "train_dataloader.batch_size": 4,
        "train_cfg.max_epochs": 3,
        "train_cfg.val_interval": 3,
        "default_hooks.logger.interval": 1,
        "default_hooks.coconv_plan": {"type": "CoConvPlanHook"},
        "optim_wrapper.optimizer.lr": 0.01,
    }
    for split in ("train", "val", "test"):
        options[f"{split}_dataloader.dataset.data_root"] = f"{shapes}/"
    for split in ("val", "test"):
        options[f"{split}_evaluator.ann_file"] = str(shapes / "annotations" / "val.json")
    config.merge_from_dict(options)
    return config


@pytest.fixture(scope="session")
def tools() -> Path:
    """The folder of mmdet's tools."""
    return Path(mmdet.__file__).parent / ".mim" / "tools"


@pytest.fixture
def tool(tools, monkeypatch, capfd):
    """Runs one of mmdet's tools as it is, in this process, and gives what it prints."""

    def run(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(tools / name), run_name="__main__")
        return "".join(capfd.readouterr())

    return run


@pytest.fixture
def photograph() -> torch.Tensor:
    return torch.randint(0, 256, (3, 320, 320), dtype=torch.uint8)
