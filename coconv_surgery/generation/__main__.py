"""Runs a training config: ``python -m coconv_surgery.generation CONFIG``."""

import argparse
from pathlib import Path

from coconv_surgery.generation import training  # noqa: F401 (first: where mmengine is missing, it says what to install)

# isort: split
from mmengine.config import Config, DictAction
from mmengine.runner import Runner


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
    parser.add_argument("--launcher", choices=("none", "pytorch", "slurm", "mpi"), default="none")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, help="key=value pairs that override the config")
    arguments = parser.parse_args()
    config = Config.fromfile(arguments.config)
    config.merge_from_dict(arguments.cfg_options or {})
    config.launcher = arguments.launcher
    config.work_dir = str(arguments.work_dir or Path(config.get("work_dir") or f"work_dirs/{arguments.config.stem}"))
    config.resume = arguments.resume
    Runner.from_cfg(config).train()


if __name__ == "__main__":
    main()
