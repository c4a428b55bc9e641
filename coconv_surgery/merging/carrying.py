"""A merge, with levels carried over, undone if the block would not compute the same."""

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn as nn
from torch.fx import _symbolic_trace
from torch.utils._pytree import tree_leaves

from coconv_surgery.layers.conv import CoConv2d
from coconv_surgery.layers.rollback import deep_restorer
from coconv_surgery.layers.switch import to_coconv_
from coconv_surgery.merging.calls import Call, enclosing, entered
from coconv_surgery.merging.comparing import compute_the_same, in_double, kernels_agree, kernels_of, tolerance_of
from coconv_surgery.merging.convs import is_contextual, is_pointwise, kind, spatial_convs
from coconv_surgery.merging.methods import works_on_parts
from coconv_surgery.tracing.sites import pass_mark_on

# Which has another name in older versions of torch.
_is_fx_tracing: Any = getattr(_symbolic_trace, "is_fx_symbolic_tracing", _symbolic_trace.is_fx_tracing)


def merge(block: nn.Module, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a merging method, see to the levels, and undo it all if the block would not compute the same.

    Raises:
        ValueError: If it would not.
    """
    run = functools.partial(method, *args, **kwargs)
    if _is_traced() or works_on_parts(method, tree_leaves((args, kwargs))) or not is_contextual(block):
        return run()
    before, kernels, tolerance = in_double(block), kernels_of(spatial_convs(block)), tolerance_of(block)
    with ExitStack() as undo:
        undo.callback(deep_restorer(block))
        result, call = _merge_with_levels(run, block)
        merged = _merged(result, block)
        same = compute_the_same(before, in_double(merged), tolerance)
        if same is None:
            same = kernels_agree(call, kernels, spatial_convs(merged), tolerance)
        if not same:
            raise _refusal(block)
        undo.pop_all()
    if (outer := enclosing()) is not None:
        outer.within.append(call)
    return result


def _is_traced() -> bool:
    """Whether a call is one of a forward pass that is being traced, which does not merge."""
    return torch.compiler.is_compiling() or bool(_is_fx_tracing())


def _merged(result: Any, block: nn.Module) -> nn.Module:
    """What a merge leaves: the one module that it returns, or else the block."""
    modules = [leaf for leaf in tree_leaves(result) if isinstance(leaf, nn.Module)]
    return modules[0] if len(modules) == 1 else block


def _merge_with_levels(run: Callable[[], Any], block: nn.Module) -> tuple[Any, Call]:
    call = Call()
    before = spatial_convs(block)
    with entered(call):
        result = run()
    after = spatial_convs(_merged(result, block))
    known, gone = [*before, *call.all_made()], call.all_merged()
    call.merged = [conv for conv in known if conv not in after and conv not in gone and not is_pointwise(conv)]
    call.made = [conv for conv in after if conv not in known]
    if call.made and any(isinstance(conv, CoConv2d) for conv in call.merged):
        _carry_over(block, call)
    return result, call


def _carry_over(block: nn.Module, call: Call) -> None:
    """Give what was made the levels of what was merged."""
    for conv, source in zip(call.made, _sources(block, call), strict=True):
        if isinstance(source, CoConv2d):
            to_coconv_(conv, source.dilations, source.splits)
            pass_mark_on(source, conv)


def _sources(block: nn.Module, call: Call) -> list[nn.Conv2d]:
    """What each convolution that was made has its levels from."""
    shapes = [conv.weight.shape for conv in call.made]
    # What has another shape was dropped, as an auxiliary branch is.
    kept = [conv for conv in call.merged if conv.weight.shape in shapes]
    if [conv.weight.shape for conv in kept] == shapes:
        return kept
    ends = {(conv.out_channels, conv.kernel_size) for conv in (*call.merged, *call.made)}
    if len(ends) > 1 or len(set(map(kind, call.merged))) > 1:
        raise _refusal(block)
    return call.merged[:1] * len(call.made)


def _refusal(block: nn.Module) -> ValueError:
    return ValueError(
        f"merged, this {type(block).__name__} would not compute the same, or there is no telling: what it merges does "
        "not all have the same levels. Reparameterize before converting, or exclude it from the conversion"
    )
