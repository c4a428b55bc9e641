"""mmdet's own entry points in processes of their own, on a config of ImageNet and a few images."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import mmdet
import pytest
import torch
from mmdet.registry import MODELS

from coconv_surgery import Plan
from coconv_surgery.mmengine.hooks import FILE_NAME, META_KEY

TOOLS = Path(mmdet.__file__).parent / ".mim" / "tools"
TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
ON_CPU = {
    "env_cfg.dist_cfg.backend": "gloo",
    "model_wrapper_cfg.type": "MMDistributedDataParallel",
    "model_wrapper_cfg.device_ids": None,
}
EMA = {
    "default_hooks.ema.type": "EMAHook",
    "default_hooks.ema.momentum": 0.2,
    "default_hooks.ema.update_buffers": True,
}


def run(*command: object, options: dict) -> str:
    process = subprocess.run(
        [sys.executable, *map(str, command), "--cfg-options", *(f"{k}={v}" for k, v in options.items())],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stdout[-3000:]
    return process.stdout


def scalars(work: Path, key: str) -> list[float]:
    """A logged number over time, the runs in their order."""
    lines = [line for path in sorted(work.glob("*/vis_data/scalars.json")) for line in path.read_text().splitlines()]
    return [entry[key] for entry in map(json.loads, lines) if key in entry]


@pytest.mark.long
def test_train_resume_in_two_processes_test_and_detect(configs, small, tmp_path):
    config, work = configs / "coresnet50_8xb32_in1k.py", tmp_path / "work"
    train = (TOOLS / "train.py", config, "--work-dir", work)

    run(*train, options={**small, **EMA, "train_cfg.max_epochs": 1})
    log = run(
        *TWO_PROCESSES,
        *train,
        "--launcher",
        "pytorch",
        "--resume",
        options={**small, **EMA, **ON_CPU, "train_dataloader.batch_size": 6, "train_cfg.max_epochs": 8},
    )
    assert "resumed epoch: 1, iter: 4" in log
    losses, top1 = scalars(work, "loss"), scalars(work, "accuracy/top1")
    assert len(losses) == 8 * 4
    assert len(top1) == 8
    assert all(map(math.isfinite, losses))
    assert sum(losses[-4:]) < 0.5 * sum(losses[:4])
    assert top1[-1] > 50
    assert len(list(work.glob("*/vis_data/events.out.tfevents.*"))) == 2

    checkpoint = work / "epoch_8.pth"
    saved = torch.load(checkpoint)
    assert {"ema_state_dict", "optimizer", "param_schedulers"} < saved.keys()
    assert Plan.from_json(saved["meta"][META_KEY]) == Plan.from_json(work / FILE_NAME)

    # 7 images in two processes and in one
    tested = tmp_path / "tested"
    log = run(TOOLS / "test.py", config, checkpoint, "--work-dir", tested, options=small)
    assert re.search(r"accuracy/top1: [\d.]+ +accuracy/top5: [\d.]+", log)
    (result,) = (json.loads(path.read_text()) for path in tested.glob("*/*.json"))
    for key in ("accuracy/top1", "accuracy/top5"):
        assert result[key] == pytest.approx(scalars(work, key)[-1])

    init = {"type": "Pretrained", "checkpoint": str(checkpoint), "prefix": "timm_model."}
    narrow = {"base_channels": 8, "stem_channels": 64, "norm_eval": False}
    backbone = MODELS.build({"type": "CoResNet", "depth": 50, "init_cfg": init, **narrow})
    backbone.init_weights()
    assert all(
        torch.equal(value, saved["state_dict"][f"timm_model.{name}"]) for name, value in backbone.state_dict().items()
    )
