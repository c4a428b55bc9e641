"""Faults of mmengine releases on a current stack, repaired on import.

Every repair states its source and when it can be deleted, does nothing where upstream has fixed the fault, and may be
applied again.
"""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import mmengine.dist.utils as dist_utils
import mmengine.model.efficient_conv_bn_eval as conv_bn_eval
import mmengine.runner.runner
import numpy as np
import torch
import torch.fx as fx
import torch.nn as nn
from mmengine.device import get_device
from mmengine.fileio import LocalBackend
from mmengine.logging.history_buffer import HistoryBuffer
from mmengine.utils import digit_version
from torch.nn.modules.batchnorm import _BatchNorm

from coconv_surgery.layers.conv import CoConv2d
from coconv_surgery.layers.files import whole_file


def apply() -> None:
    """Apply all repairs."""
    trust_mmengine_checkpoints()
    repair_efficient_conv_bn_eval()
    launch_without_gpus()
    survive_kills()


def trust_mmengine_checkpoints() -> None:
    """Let torch's safe loader read the log history that mmengine writes into a checkpoint.

    torch ≥ 2.6 loads with ``weights_only=True``, and ``tools/test.py`` and resuming fail with ``Unsupported global:
    mmengine.logging.history_buffer.HistoryBuffer``. The history consists of numpy arrays of numbers and four functions,
    which pickle writes as ``getattr(HistoryBuffer, name)``; these and nothing else become readable.

    Source: mmengine 0.10.7 and before; mmengine issue 1655, pull request 1650.
    Delete it when the oldest mmengine supported loads its own checkpoints on torch 2.6.
    """
    if digit_version(torch.__version__) < digit_version("2.6"):
        return  # loads everything by default
    # numpy 2 moved the two functions; checkpoints name them by the module of the numpy that wrote them.
    rebuilders: dict[str, Any] = {
        "_reconstruct": np.zeros(0).__reduce__()[0],
        "scalar": np.float64(0).__reduce__()[0],
    }
    modules = ("numpy.core.multiarray", "numpy._core.multiarray")
    named = [(function, f"{module}.{name}") for name, function in rebuilders.items() for module in modules]
    dtypes = [type(np.dtype(kind)) for kind in (np.float64, np.int64)]
    torch.serialization.add_safe_globals(
        [HistoryBuffer, (_history_statistic, "builtins.getattr"), np.ndarray, np.dtype, *dtypes, *named]
    )


def _history_statistic(owner: Any, name: str) -> Any:
    if owner is not HistoryBuffer or name not in ("min", "max", "current", "mean"):
        raise UnpicklingError(f"a checkpoint may only refer to the statistics of a HistoryBuffer, not to {name!r}")
    return getattr(HistoryBuffer, name)


def repair_efficient_conv_bn_eval() -> None:
    """Let ``efficient_conv_bn_eval`` of a config work on a network with CoConvs.

    mmengine's trace has only torch's own modules as leaves, so it enters a CoConv; then it looks up the node before
    every norm as a module and raises ``KeyError: <function coconv2d>``. Networks without CoConvs still get mmengine's
    own function.

    Source: mmengine 0.10.7, ``mmengine/model/efficient_conv_bn_eval.py``.
    Delete it when the oldest mmengine supported leaves norms alone that do not follow a convolution module.
    """
    try:
        conv_bn_eval.turn_on_efficient_conv_bn_eval_for_single_model(_NormAfterCoConv())
    except KeyError:
        conv_bn_eval.turn_on_efficient_conv_bn_eval_for_single_model = _turn_on_efficient_conv_bn_eval


class _NormAfterCoConv(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(CoConv2d(2, 2, 3, padding=1, levels=2, device="meta"), nn.BatchNorm2d(2, device="meta"))


_upstream_turn_on_efficient_conv_bn_eval = conv_bn_eval.turn_on_efficient_conv_bn_eval_for_single_model


def _turn_on_efficient_conv_bn_eval(model: nn.Module) -> None:
    if not any(isinstance(module, CoConv2d) for module in model.modules()):
        _upstream_turn_on_efficient_conv_bn_eval(model)
        return
    graph = _CoConvTracer().trace(model)
    for norm in list(graph.nodes):
        if not _follows_convolution(norm, model):
            continue
        (conv,) = norm.args
        with graph.inserting_before(conv):  # not before the norm: the convolution's input may be overwritten by then
            modules = graph.get_attr(norm.target), graph.get_attr(conv.target)
            joint = graph.call_function(conv_bn_eval.efficient_conv_bn_eval_control, (*modules, *conv.args))
        norm.replace_all_uses_with(joint)
        graph.erase_node(norm)
        graph.erase_node(conv)
    model.forward = fx.GraphModule(model, graph).forward


class _CoConvTracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, CoConv2d) or super().is_leaf_module(m, module_qualified_name)


# What the joint evaluation takes a convolution and a norm to compute.
_CONVOLVES = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward, CoConv2d.forward)
_NORMALISES = (_BatchNorm.forward, nn.SyncBatchNorm.forward)


def _follows_convolution(node: fx.Node, model: nn.Module) -> bool:
    """Whether a node is a batch norm of torch's, with statistics, on a convolution that has no other reader."""
    norm = _module_called(node, model, _NORMALISES)
    if norm is None or norm.running_var is None:
        return False
    (source,) = node.args
    return (
        isinstance(source, fx.Node) and len(source.users) == 1 and _module_called(source, model, _CONVOLVES) is not None
    )


def _module_called(node: fx.Node, model: nn.Module, forwards: tuple[Any, ...]) -> nn.Module | None:
    """The module that a node calls with one input, if its call is one of these forwards and nothing else."""
    if node.op != "call_module" or node.kwargs or len(node.args) != 1:
        return None
    module = model.get_submodule(str(node.target))
    replaced = "forward" in vars(module)
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return module if type(module).forward in forwards and not replaced and not any(hooks) else None


def launch_without_gpus() -> None:
    """Let the ``pytorch`` launcher start processes that use gloo on a machine without GPUs.

    mmengine chooses a GPU before it joins the process group, and torch raises ``RuntimeError: Found no NVIDIA driver``
    or ``AssertionError: Torch not compiled with CUDA enabled``.

    Source: mmengine 0.10.7, ``_init_dist_pytorch`` in ``mmengine/dist/utils.py``.
    Delete it when the oldest mmengine supported chooses a GPU only where there is one.
    """
    dist_utils._init_dist_pytorch = _init_dist_pytorch


_upstream_init_dist_pytorch = dist_utils._init_dist_pytorch


def _init_dist_pytorch(backend: str, init_backend: str = "torch", **kwargs: Any) -> None:
    if (backend, init_backend, get_device()) == ("gloo", "torch", "cpu"):
        torch.distributed.init_process_group(backend=backend, **kwargs)
    else:
        _upstream_init_dist_pytorch(backend, init_backend=init_backend, **kwargs)


def survive_kills() -> None:
    """Let training go on after a kill at any moment, that of writing a checkpoint included.

    mmengine writes into the file itself, so that a kill leaves a part of a checkpoint under its name, or an empty
    ``last_checkpoint``, which then cannot be resumed from. Files are written whole or not at all now, and where
    ``last_checkpoint`` names no file the latest one of the work dir is resumed from.

    Source: mmengine 0.10.7, ``LocalBackend.put`` in ``mmengine/fileio``, ``find_latest_checkpoint`` in
    ``mmengine/runner/checkpoint.py``.
    Delete it when the oldest mmengine supported writes under another name first.
    """
    LocalBackend.put = _put
    mmengine.runner.runner.find_latest_checkpoint = _find_latest_checkpoint


def _put(self: LocalBackend, obj: bytes, filepath: str | Path) -> None:
    Path(filepath).parent.mkdir(parents=True, exist_ok=True)
    with whole_file(filepath, "filepath") as passing:
        passing.write_bytes(obj)


_upstream_find_latest_checkpoint = mmengine.runner.runner.find_latest_checkpoint


def _find_latest_checkpoint(path: str) -> str | None:
    latest: str | None = _upstream_find_latest_checkpoint(path)
    if latest is None or (latest and Path(latest).exists()):
        return latest
    found = [file for name in ("epoch_*.pth", "iter_*.pth") for file in Path(path).glob(name)]
    return str(max(found, key=lambda file: file.stat().st_mtime)) if found else None
