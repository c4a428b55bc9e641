"""What the tests of generation share: a folder of drawn images, and a training of seconds, to 16×16 pixels."""

from pathlib import Path

import pytest
import torch
from launching import torchrun
from mmengine.config import Config
from mmengine.runner import Runner

import coconv_surgery.generation.training  # noqa: F401
from coconv_surgery.demo.shapes import write_shapes

CONFIGS = Path(__file__).parents[2] / "configs" / "progan"
# 4×4: two steps; 8×8: two of fading in, two more; 16×16: the same, and four more.
GROWTH = {"images": 96, "stabilise": 16, "fade": 16, "batches": {"4": 8, "8": 8, "16": 8}}


@pytest.fixture(scope="session")
def drawn(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("drawn") / "shapes"
    write_shapes(root, train=20, val=12, size=64)
    return root


SMALL = {
    "model.resolution": 16,
    "model.fmap_base": 64,
    "model.fmap_max": 8,
    "model.growth": GROWTH,
    "train_dataloader.dataset.resolution": 16,
    "train_dataloader.num_workers": 0,
    "train_dataloader.persistent_workers": False,
    "default_hooks.logger.interval": 1,
    "default_hooks.checkpoint.interval": 1000,  # after the last step alone
    "default_hooks.checkpoint.max_keep_ckpts": -1,
}


@pytest.fixture
def configured(drawn, tmp_path):
    """Gives a config of a name, fitted to those images and to seconds."""

    def configure(name: str, work: str = "work", **options) -> Config:
        config = Config.fromfile(CONFIGS / f"{name}.py")
        config.merge_from_dict({**SMALL, "train_dataloader.dataset.root": str(drawn / "train"), **options})
        config.work_dir = str(tmp_path / work)
        config.experiment_name = f"{tmp_path.name}-{work}"  # mmengine shares a logger among equal names
        return config

    return configure


@pytest.fixture
def launched(configured, tmp_path):
    """Trains by a config of a name in two processes of their own, and gives the work dir."""
    in_two = {"env_cfg": {"dist_cfg": {"backend": "gloo"}}, "model_wrapper_cfg.device_ids": None}

    def launch(name: str, work: str, **options) -> str:
        configured(name, work, **in_two, **options).dump(tmp_path / f"{work}.py")
        arguments = tmp_path / f"{work}.py", "--launcher", "pytorch"
        torchrun("coconv_surgery.generation", *arguments, output=tmp_path / f"{work}.txt")
        return str(tmp_path / work)

    return launch


@pytest.fixture
def trained(configured):
    """Trains by a config of a name, in this process, and gives the runner."""

    def train(name: str, work: str = "work", **options) -> Runner:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            runner = Runner.from_cfg(configured(name, work, **options))
            runner.train()
        finally:
            torch.set_num_threads(threads)
        return runner

    return train
