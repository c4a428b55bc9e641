"""Calibration before the first iteration of a training, on images of its own data set."""

from contextlib import ExitStack
from typing import Any

import torch
from mmengine.dist import broadcast, broadcast_object_list, is_distributed, is_main_process
from mmengine.hooks import EMAHook, Hook
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from coconv_surgery.calibration import calibrate
from coconv_surgery.calibration.batches import BATCH
from coconv_surgery.calibration.networks import tensors_of
from coconv_surgery.mmengine.hooks import converted_network
from coconv_surgery.mmengine.options import CalibrationOptions, wished_calibration
from coconv_surgery.surgery import get_plan
from coconv_surgery.tracing.finding import find_sites
from coconv_surgery.tracing.switching import mark_calibrated


class CoConvCalibrationHook(Hook):  # type: ignore[misc]
    """Calibrates a converted network on training images, before the first iteration, and not again on resuming.

    A runner whose model's config has ``surgery=dict(..., calibrate=dict(images=256))`` gets this hook by itself; to
    calibrate a network that was converted in another way, put it among the hooks of the config.

    The weights must be those of the plain network, as ``load_from`` and pretrained backbones give them; ones that were
    calibrated already are left alone. Images go through the training pipeline, labels are not looked at. Averages of
    the weights start anew from the calibrated ones. In distributed training the first process calibrates, and the
    others get its weights.

    Args:
        images: How many training images to look at.
        also: Patterns of plain convolutions to solve as well, see :func:`~coconv_surgery.calibrate`.
        arrange: Whether channels may change places.

    Raises:
        CalibrationError: As :func:`~coconv_surgery.calibrate`.
    """

    # After the weights are loaded, and before other hooks look at them.
    priority = "VERY_HIGH"

    def __init__(self, images: int = 256, also: Any = None, arrange: bool = True) -> None:
        self.options = CalibrationOptions(images=images, also=also, arrange=arrange)

    def before_train(self, runner: Any) -> None:
        """Calibrate, unless the training goes on."""
        network = converted_network(runner)
        before = get_plan(network).calibrated
        if runner.iter > 0 or before:
            why = f"they were calibrated on {before:,} images" if before else "the training goes on"
            runner.logger.info(f"CoConv calibration: weights stay as they are, as {why}")
            return
        images = [0]
        if is_main_process():
            report = calibrate(
                network,
                _training_batches(runner, self.options.images),
                max_images=self.options.images,
                also=self.options.also,
                arrange=self.options.arrange,
            )
            runner.logger.info(f"CoConv calibration\n{report}")
            images = [report.images if report.solved else 0]
        if is_distributed():
            broadcast_object_list(images)
            for tensor in tensors_of(network).values():
                broadcast(tensor.detach())
            with ExitStack() as undo:
                mark_calibrated(find_sites(network), images[0], undo)
                undo.pop_all()
        for hook in runner.hooks:
            if isinstance(hook, EMAHook):
                hook.ema_model.module.load_state_dict(hook.src_model.state_dict())


def calibrate_as_wished() -> None:
    """Let a runner calibrate a network whose config wants it, without a hook in the config.

    It may be applied again.
    """
    Runner.register_hooks = _register_hooks


_upstream_register_hooks = Runner.register_hooks


def _register_hooks(self: Any, *args: Any, **kwargs: Any) -> None:
    _upstream_register_hooks(self, *args, **kwargs)
    wish = wished_calibration(self.model)
    if wish is not None and not any(isinstance(hook, CoConvCalibrationHook) for hook in self.hooks):
        self.register_hook(CoConvCalibrationHook(wish.images, wish.also, wish.arrange))


def _training_batches(runner: Any, images: int) -> "DataLoader[Any]":
    """Training images at random, without a trace in the loader that trains."""
    loader = runner.train_dataloader
    size = min(BATCH, loader.batch_size or BATCH)
    generator = torch.Generator().manual_seed(runner.seed or 0)
    chosen = torch.randperm(len(loader.dataset), generator=generator)[:images].tolist()
    return DataLoader(loader.dataset, batch_size=size, sampler=chosen, collate_fn=loader.collate_fn)
