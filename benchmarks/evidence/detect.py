"""Drawn shapes: SSD on ResNet-18 and CoResNet-18 from scratch, and the trained plain one converted."""

import contextlib
import copy
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import mmdet
import torch
import torch.nn as nn
from filelock import FileLock
from mmdet.evaluation import CocoMetric
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope
from mmengine.runner import Runner, load_checkpoint

import coconv_surgery as cs
from coconv_surgery.demo.shapes import write_shapes
from coconv_surgery.mmdet import example_inputs
from coconv_surgery.mmdet.building import build_detector
from coconv_surgery.mmengine.paths import config_path

HERE = Path(__file__).parent
WORK = HERE / "work"
SEEDS = range(3)
_CONFIGS = {"ResNet": "ssd_r18_shapes.py", "CoResNet": "ssd_coresnet18_shapes.py"}


def from_scratch(backbone: str, seed: int) -> dict[str, Any]:
    """Part (c): train a detector with mmdet's own tool.

    Returns:
        mAP, AP50, and mAP by class, on the validation split.
    """
    detector = trained(backbone, seed)
    return evaluate(detector, _config(backbone, seed))


def converted_after_training(seed: int) -> dict[str, Any]:
    """Part (d): the trained plain detector converted, and calibrated on 64 and 256 training images without labels.

    Returns:
        mAP, AP50, and mAP by class, by way.
    """
    config, plain = _config("ResNet", seed), trained("ResNet", seed)
    side = config.input_size
    cold = cs.convert(copy.deepcopy(plain), example_inputs=example_inputs(plain, (side, side)))
    found = {"plain": evaluate(plain, config), "cold": evaluate(cold, config)}
    ways: dict[str, dict[str, Any]] = {
        "calibrated, channels in place": {"max_images": 64, "arrange": False},
        "calibrated": {"max_images": 64},
        "calibrated on 256 images": {"max_images": 256},
    }
    for way, choices in ways.items():
        detector = copy.deepcopy(cold)
        report = cs.calibrate(detector, training_images(config), **choices)
        found[way] = evaluate(detector, config) | {"seconds": round(report.seconds, 1)}
    return found


def trained(backbone: str, seed: int) -> nn.Module:
    """A detector trained from scratch, once."""
    config, work = _config(backbone, seed), WORK / f"{backbone}-{seed}"
    checkpoint = work / f"epoch_{config.max_epochs}.pth"
    work.mkdir(parents=True, exist_ok=True)
    with FileLock(work / "lock"):
        if not checkpoint.exists():
            _train(config, work)
    detector = build_detector(config.model)
    load_checkpoint(detector, str(checkpoint), map_location="cpu")
    return detector.eval()


def _train(config: Config, work: Path) -> None:
    with FileLock(WORK / "lock"):
        write_shapes(WORK / "data" / "shapes")
    config.dump(work / "config.py")
    tool = Path(mmdet.__file__).parent / ".mim" / "tools" / "train.py"
    command = [sys.executable, str(tool), str(work / "config.py"), "--work-dir", str(work), "--resume"]
    with open(work / "train.log", "w", encoding="utf-8") as log:
        subprocess.run(command, cwd=WORK, stdout=log, stderr=subprocess.STDOUT, check=True)


def training_images(config: Config) -> list[Any]:
    """The training images in order, as the test pipeline makes them."""
    loader = copy.deepcopy(config.train_dataloader)
    loader.dataset.update(pipeline=config.test_pipeline, test_mode=True)
    loader.sampler.shuffle = False
    return _batches(loader)


@torch.no_grad()
def evaluate(detector: nn.Module, config: Config) -> dict[str, Any]:
    """COCO's figures on the validation split."""
    MMLogger.get_instance("evidence").setLevel("ERROR")
    with contextlib.redirect_stdout(io.StringIO()):
        metric = CocoMetric(str(WORK / config.val_evaluator.ann_file), metric="bbox", classwise=True)
        metric.dataset_meta = {"classes": tuple(config.classes)}
        for batch in _batches(config.val_dataloader):
            metric.process(batch, [sample.to_dict() for sample in detector.eval().test_step(batch)])
        figures = metric.evaluate(size=128)
    by_class = {name: round(figures[f"coco/{name}_precision"], 4) for name in config.classes}
    return {"mAP": figures["coco/bbox_mAP"], "AP50": figures["coco/bbox_mAP_50"], "by class": by_class}


def _batches(loader: Any) -> list[Any]:
    loader = copy.deepcopy(loader)
    loader.dataset.data_root = str(WORK / loader.dataset.data_root)
    with DefaultScope.overwrite_default_scope("mmdet"):
        return list(Runner.build_dataloader(loader))


def _config(backbone: str, seed: int) -> Config:
    config = Config.fromfile(config_path(f"shapes/{_CONFIGS[backbone]}"))
    config.randomness = {"seed": seed}
    config.default_hooks.checkpoint = {"type": "CheckpointHook", "interval": 1, "max_keep_ckpts": 1}
    return config
