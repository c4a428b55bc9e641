"""Runs a training config: ``python -m coconv_surgery.generation CONFIG``."""

import argparse
from pathlib import Path

from coconv_surgery.generation import training  # noqa: F401 (first: where mmengine is missing, it says what to install)

# isort: split
import torch
from mmengine.config import Config, DictAction
from mmengine.registry import MODELS
from mmengine.runner import Runner

from coconv_surgery.generation.cost import training_cost
from coconv_surgery.planning.plan import align


def main() -> None:
    """Train what a config says."""
    parser = argparse.ArgumentParser(prog="python -m coconv_surgery.generation", description=__doc__)
    parser.add_argument("config", type=Path, help="such as configs/progan/coprogan_shapes-32x32.py")
    parser.add_argument(
        "--work-dir", type=Path, help="for logs and checkpoints; default: work_dirs/ and the config's name"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the work dir's last checkpoint, if it has one"
    )
    parser.add_argument("--launcher", choices=("none", "pytorch", "slurm", "mpi"))
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, help="key=value pairs that override the config")
    parser.add_argument("--cost", action="store_true", help="count the multiply-adds of the training, and do not train")
    arguments = parser.parse_args()
    config = Config.fromfile(arguments.config)
    config.merge_from_dict(arguments.cfg_options or {})
    if arguments.cost:
        print(_cost(config))
        return
    if arguments.launcher:
        config.launcher = arguments.launcher
    config.work_dir = str(arguments.work_dir or Path(config.get("work_dir") or f"work_dirs/{arguments.config.stem}"))
    if arguments.resume:
        config.resume = True
    Runner.from_cfg(config).train()


def _cost(config: Config) -> str:
    with torch.device("meta"):
        costs = training_cost(MODELS.build(config.model))
    lines = [["resolution", "images, M", "multiply-adds of an image, G", "of all, 10¹⁵"]]
    for side, images, each in costs:
        lines.append([f"{side}×{side}", f"{images / 1e6:.3f}", f"{each / 1e9:.3f}", f"{images * each / 1e15:.4g}"])
    total = sum(cost.images * cost.each for cost in costs)
    hours = ", ".join(f"{2 * total / speed / 3.6e15:.3g} h at {speed}" for speed in (10, 50, 200))
    return f"{align(lines)}\n\n{total / 1e15:.4g}·10¹⁵ multiply-adds, two operations each: {hours} TFLOP/s"


if __name__ == "__main__":
    main()
