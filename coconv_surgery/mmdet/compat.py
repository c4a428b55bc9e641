"""Faults of the OpenMMLab releases on a current stack, repaired on import.

Every repair states its source and when it can be deleted, does nothing where upstream has fixed the fault, and may be
applied again.
"""

from pickle import UnpicklingError
from typing import Any

import mmengine.dist.utils as dist_utils
import mmengine.model.efficient_conv_bn_eval as conv_bn_eval
import numpy as np
import torch
import torch.fx as fx
import torch.nn as nn
from mmdet.models.dense_heads import SSDHead
from mmengine.device import get_device
from mmengine.logging.history_buffer import HistoryBuffer
from mmengine.utils import digit_version
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from coconv_surgery.layers.conv import CoConv2d


def apply() -> None:
    """Apply all repairs."""
    give_ssd_head_loss_cls()
    trust_mmengine_checkpoints()
    repair_efficient_conv_bn_eval()
    launch_without_gpus()


def give_ssd_head_loss_cls() -> None:
    """Let SSD predict.

    ``BaseDenseHead._predict_by_feat_single`` reads ``self.loss_cls``, which ``SSDHead`` never sets: ``AttributeError:
    'SSDHead' object has no attribute 'loss_cls'`` at the first validation. It only asks whether that loss brings its
    own number of classes; None answers it.

    Source: mmdet 3.2.0 and 3.3.0; mmdetection issues 11063, 11305, 11780.
    Delete it when the oldest mmdet supported has mmdetection pull request 11524, or another repair.
    """
    if not hasattr(SSDHead, "loss_cls") and "loss_cls" not in SSDHead.__init__.__code__.co_names:
        SSDHead.loss_cls = None


def trust_mmengine_checkpoints() -> None:
    """Let torch's safe loader read what mmengine writes into a checkpoint besides tensors: its log history.

    torch ≥ 2.6 loads with ``weights_only=True``, and ``tools/test.py`` and resuming fail with ``Unsupported global:
    mmengine.logging.history_buffer.HistoryBuffer``. The history is numpy arrays of numbers and four functions, which
    pickle writes as ``getattr(HistoryBuffer, name)``; those and nothing else become readable.

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

    mmengine traces with plain ``torch.fx.symbolic_trace``, which takes only torch's own modules for leaves, so it
    enters a CoConv. Then it looks up every node before a norm as a module: ``KeyError: <built-in method cat>``, as for
    any norm that does not read a module (pre-activation networks, or one after an addition).

    Source: mmengine 0.10.7, ``mmengine/model/efficient_conv_bn_eval.py``.
    Delete it when the oldest mmengine supported takes every convolution for a leaf and skips a norm that reads none.
    """
    try:
        conv_bn_eval.turn_on_efficient_conv_bn_eval_for_single_model(_NormAfterCoConv())
    except KeyError:
        conv_bn_eval.turn_on_efficient_conv_bn_eval_for_single_model = _turn_on_efficient_conv_bn_eval


class _NormAfterCoConv(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(CoConv2d(2, 2, 3, padding=1, levels=2, device="meta"), nn.BatchNorm2d(2, device="meta"))


class _ConvTracer(fx.Tracer):
    """Takes convolutions and norms for leaves, mmengine's and this project's as well as torch's."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _ConvNd | _BatchNorm) or super().is_leaf_module(m, module_qualified_name)


def _turn_on_efficient_conv_bn_eval(model: nn.Module) -> None:
    graph = _ConvTracer().trace(model)
    graph_module = fx.GraphModule(model, graph)
    modules = dict(graph_module.named_modules())

    def called(node: fx.Node) -> nn.Module | None:
        return modules[str(node.target)] if node.op == "call_module" else None

    for norm in list(graph.nodes):
        conv = norm.args[0] if norm.args else None
        if not isinstance(conv, fx.Node) or len(conv.users) > 1:
            continue
        if isinstance(called(norm), _BatchNorm) and isinstance(called(conv), _ConvNd):
            with graph.inserting_before(norm):
                parts = graph.get_attr(norm.target), graph.get_attr(str(conv.target))
                arguments = (*parts, *conv.args)
                joint = graph.call_function(conv_bn_eval.efficient_conv_bn_eval_control, arguments, conv.kwargs)
            norm.replace_all_uses_with(joint)
            graph.erase_node(norm)
            graph.erase_node(conv)
    graph_module.recompile()
    model.forward = graph_module.forward


def launch_without_gpus() -> None:
    """Let the ``pytorch`` launcher start processes that talk through gloo on a machine without GPUs.

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
