"""What was tried to keep more of what a network learnt: on the trained plain shapes detector, and on digits.

What is not in the package is here: :func:`_solve_blocks` solves a ResNet's basic blocks by themselves.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.nn as nn
from torch.utils._pytree import tree_leaves

import coconv_surgery as cs
from coconv_surgery.calibration import calibrating
from coconv_surgery.calibration.patches import each_level, patches_at, sample_positions, values_at
from coconv_surgery.mmdet import example_inputs
from coconv_surgery.tracing.signature import Signature
from evidence import classify, detect

_IMAGES = 64
_POSITIONS = 40_000
_RIDGE = 1e-3
_STEPS = 64


def _detectors() -> tuple[nn.Module, nn.Module, Any]:
    """The trained plain detector, the same converted, and its config."""
    config, plain = detect._config("ResNet", 0), detect.trained("ResNet", 0)
    side = config.input_size
    return plain, cs.convert(copy.deepcopy(plain), example_inputs=example_inputs(plain, (side, side))), config


def _evaluated(detector: nn.Module, config: Any, **more: Any) -> dict[str, Any]:
    figures = detect.evaluate(detector, config)
    return {"mAP": figures["mAP"], "AP50": figures["AP50"], **more}


def _calibrated(**choices: Any) -> dict[str, Any]:
    _, detector, config = _detectors()
    report = cs.calibrate(detector, detect.training_images(config), **{"max_images": _IMAGES, **choices})
    return _evaluated(detector, config, seconds=round(report.seconds, 1))


def _arranged() -> tuple[nn.Module, nn.Module, Any]:
    """As :func:`_detectors`, after channels have changed places in both; kernels are the trained ones."""
    _, detector, config = _detectors()

    def leave(_: Any, layer: Any, *__: Any) -> cs.CalibratedLayer:
        return cs.CalibratedLayer(layer.name, skipped="a try")

    with mock.patch.object(calibrating, "solve_layer", leave):
        cs.calibrate(detector, detect.training_images(config), max_images=_IMAGES)
    return cs.revert(copy.deepcopy(detector)), detector, config


def _arranged_alone() -> dict[str, Any]:
    """Channels change places, and kernels stay the trained ones."""
    _, detector, config = _arranged()
    return _evaluated(detector, config)


def _norms_recalibrated() -> dict[str, Any]:
    _, detector, config = _detectors()
    batches = detect.training_images(config)
    cs.calibrate(detector, batches, max_images=_IMAGES)
    classify.recalibrate_norms(detector, [detector.data_preprocessor(batch, False)["inputs"] for batch in batches[:16]])
    return _evaluated(detector, config)


def _distilled(steps: int = _STEPS, lr: float = 3e-4) -> dict[str, Any]:
    """Calibrated, then all parameters trained to give the original's outputs on 256 images without labels."""
    plain, detector, config = _detectors()
    batches = detect.training_images(config)[:16]
    cs.calibrate(detector, batches, max_images=_IMAGES)
    images = [plain.data_preprocessor(batch, False)["inputs"] for batch in batches]
    with torch.no_grad():
        wanted = [tree_leaves(plain.eval()(batch, mode="tensor")) for batch in images]
    energy = [torch.stack([target[i].square().mean() for target in wanted]).mean() for i in range(len(wanted[0]))]
    optimizer = torch.optim.Adam(detector.eval().parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        number = step % len(images)
        given = tree_leaves(detector(images[number], mode="tensor"))
        errors = [(one - other).square().mean() for one, other in zip(given, wanted[number], strict=True)]
        optimizer.zero_grad()
        sum(error / scale for error, scale in zip(errors, energy, strict=True)).backward()
        optimizer.step()
        schedule.step()
    return _evaluated(detector, config)


def _solve_blocks(*, arranged: bool, relu: int = 0, shortcut: bool = False, sweeps: int = 1) -> dict[str, Any]:
    """Solve the basic blocks one convolution after the other, with more than the package knows of them.

    Args:
        arranged: Whether channels have changed places before.
        relu: How often to solve the first convolution of a block anew for what its ReLU lets through.
        shortcut: Whether the second one is to make up for the error along the shortcut.
        sweeps: How often to go through the network.
    """
    plain, detector, config = _arranged() if arranged else _detectors()
    batches = detect.training_images(config)
    images = [plain.data_preprocessor(batch, False)["inputs"] for batch in batches[: _IMAGES // 16]]
    plain.eval()
    detector.eval()
    with torch.no_grad():
        for _ in range(sweeps):
            for block, module in _blocks(detector):
                for number in (1, 2):
                    _solve(plain, detector, block, module, number, images, relu if number == 1 else 0, shortcut)
    return _evaluated(detector, config)


def _solve(
    plain: nn.Module,
    detector: nn.Module,
    block: str,
    module: Any,
    number: int,
    images: list[torch.Tensor],
    relu: int,
    shortcut: bool,
) -> None:
    conv, norm = getattr(module, f"conv{number}"), getattr(module, f"bn{number}")
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    shift = norm.bias - scale * norm.running_mean
    per_batch, kind = _POSITIONS // len(images), Signature.of(conv)
    levels = each_level(kind, conv.dilations, conv.splits)
    patches: list[list[torch.Tensor]] = [[] for _ in levels]
    wanted = []
    for seed, batch in enumerate(images):
        (_, target, way), (seen, _, own_way) = (_at(net, block, number, batch) for net in (plain, detector))
        at = sample_positions(target.shape, per_batch, seed, target.device)
        goal = values_at(target, at)
        if shortcut and number == 2:
            safe = torch.where(scale.abs() < 1e-3, torch.full_like(scale, 1e-3), scale)
            goal = goal + (values_at(way, at) - values_at(own_way, at)) / safe
        wanted.append(goal)
        for found, level in zip(patches, levels, strict=True):
            found.append(patches_at(seen, kind, level, at)[0])
    goal = torch.cat(wanted)
    for found, level in zip(patches, levels, strict=True):
        x, y = torch.cat(found), goal[:, level.channels]
        gram = (x.T @ x).double()
        ridge = _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        factor, trained = torch.linalg.cholesky(gram + ridge), conv.weight[level.channels].flatten(1)

        def solved(
            y: torch.Tensor, x: torch.Tensor = x, ridge: Any = ridge, factor: Any = factor, trained: Any = trained
        ) -> torch.Tensor:
            return torch.cholesky_solve((x.T @ y).double() + ridge @ trained.T.double(), factor).float().T

        kernels, a, b = solved(y), scale[level.channels], shift[level.channels]
        for _ in range(relu):
            given, goals = a * (x @ kernels.T) + b, a * y + b
            passing = torch.where(goals <= 0, given.clamp(max=0), goals)
            kernels = solved((passing - b) / a)
        conv.weight[level.channels] = kernels.view_as(conv.weight[level.channels])


def _at(net: nn.Module, block: str, number: int, batch: torch.Tensor) -> tuple[Any, Any, Any]:
    """What a block's convolution sees and gives, and what its shortcut gives."""
    module: Any = net.get_submodule(block)
    found: dict[str, Any] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args: found.update(way=args[0])),
        getattr(module, f"conv{number}").register_forward_hook(lambda _, args, out: found.update(io=(args[0], out))),
    ]
    net(batch, mode="tensor")
    for handle in handles:
        handle.remove()
    way = found["way"] if module.downsample is None else module.downsample(found["way"])
    return (*found["io"], way)


def _blocks(detector: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in detector.named_modules() if hasattr(module, "conv2") and "layer" in name]


def _levels_one_after_another(seed: int) -> dict[str, Any]:
    """Fine-tuning of a trained digits network: cold, one more stage contextual after each epoch, and calibrated."""
    plain, side = classify.trained("resnet", seed), (1, classify.SIDE, classify.SIDE)
    found = {}
    model = cs.convert(copy.deepcopy(plain), input_size=side)
    found["cold"] = classify.accuracy(classify.train(model, 4, classify.FINE_TUNING_LR, 100 + seed))
    model = copy.deepcopy(plain)
    for epoch, stages in enumerate(("layer1", "layer[12]", "layer*", "layer*")):
        cs.convert(model, input_size=side, include=[f"{stages}.*"])
        classify.train(model, 1, classify.FINE_TUNING_LR, 100 * epoch + seed)
    found["one stage after another"] = classify.accuracy(model)
    model = cs.convert(copy.deepcopy(plain), input_size=side, calibrate=classify.digits()["other"].images[:_IMAGES])
    found["calibrated"] = classify.accuracy(classify.train(model, 4, classify.FINE_TUNING_LR, 100 + seed))
    return found


TRIES: dict[str, Callable[[], dict[str, Any]]] = {
    "calibrated": _calibrated,
    "solved in place": functools.partial(_calibrated, arrange=False),
    "arranged alone": _arranged_alone,
    "16 images": functools.partial(_calibrated, max_images=16),
    "256 images": functools.partial(_calibrated, max_images=256),
    "10,000 positions": functools.partial(_calibrated, positions=10_000),
    "plain ones too": functools.partial(_calibrated, also="*"),
    "blocks": functools.partial(_solve_blocks, arranged=True),
    "blocks, what passes the ReLU": functools.partial(_solve_blocks, arranged=True, relu=3),
    "blocks, with the shortcut": functools.partial(_solve_blocks, arranged=True, shortcut=True),
    "blocks, two sweeps": functools.partial(_solve_blocks, arranged=True, sweeps=2),
    "norms recalibrated": _norms_recalibrated,
    "distilled": _distilled,
    **{f"levels one after another-{seed}": functools.partial(_levels_one_after_another, seed) for seed in range(3)},
}
