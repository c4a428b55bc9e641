"""Trains by a config in a process of its own, or in one of several: FOLDER WORK_DIR PROCESSES OPTIONS."""

import json
import sys

import torch
from mmengine.config import Config
from mmengine.runner import Runner

if __name__ == "__main__":
    folder, work, world, options = sys.argv[1:]
    options = json.loads(options)
    config = Config.fromfile(options.pop("config"))
    if optimizer := options.pop("optimizer", None):
        for network in ("generator", "discriminator"):
            config.optim_wrapper[network].optimizer = optimizer
    launched = {
        "launcher": "pytorch",
        "env_cfg": {"dist_cfg": {"backend": "gloo"}},
        "model_wrapper_cfg.device_ids": None,
    }
    config.merge_from_dict({**options, "work_dir": work, **(launched if world != "1" else {})})
    config.train_dataloader.dataset.root = folder
    torch.set_num_threads(1)
    Runner.from_cfg(config).train()
