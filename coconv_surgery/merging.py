"""Levels survive structural reparameterisation, or it is refused.

Blocks as RepVGG's, MobileOne's and RepViT's merge parallel branches, or a convolution and its norm, into one new
convolution for inference. The levels of contextual branches carry over to it where the branches agree: a 1×1
convolution, an identity and a norm act on the centre of the kernel, which all levels share. What the block returns
before and after is compared, or the kernels are where it cannot be run, and a merge that would not compute the same is
refused, such as one of a contextual 3×3 branch and a 7×7 one.

A block that holds contextual convolutions and can merge is switched to a class that sees to this, on that instance, as
a convolution is; no class that others use is changed. Levels carry over in a call of a merging method of the block. A
merge in any other way (through the class, in a property, a generator, a coroutine, a script) is refused by what it
ends in: a plain convolution that takes the place of a contextual one in such a block.
"""

import functools
import inspect
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass, field
from inspect import getattr_static
from typing import Any, cast

import torch
import torch.fx as fx
import torch.nn as nn
from torch.fx import _symbolic_trace
from torch.nn.utils.parametrize import type_before_parametrizations
from torch.utils._pytree import tree_leaves

from coconv_surgery.layers.conv import CoConv2d
from coconv_surgery.layers.rollback import deep_restorer, restorer
from coconv_surgery.layers.switch import make_subclass, switch_class, to_coconv_
from coconv_surgery.tracing.differences import difference
from coconv_surgery.tracing.objects import tensor_leaves
from coconv_surgery.tracing.sites import pass_mark_on
from coconv_surgery.tracing.twin import Twin

# What blocks call it: timm's, RepVGG's and ACNet's; ultralytics' and YOLOv7's; PP-YOLOE's and ECB's; RepLKNet's kin.
MERGING_METHODS = (
    *("fuse", "reparameterize", "switch_to_deploy"),
    *("fuse_bn", "fuse_conv_bn", "fuse_convs", "fuse_repvgg_block", "merge_bn"),
    *("convert_to_deploy", "rep_params"),
    *("deep_fuse_BN", "merge_dilated_branches", "merge_kernel", "structural_reparam"),
)
_OTHERS = (nn.Conv2d, fx.GraphModule)  # switched elsewhere, and of a class that it writes to
_PLAIN = "_coconv_plain_class"
# Which has another name in older versions of torch.
_is_fx_tracing: Any = getattr(_symbolic_trace, "is_fx_symbolic_tracing", _symbolic_trace.is_fx_tracing)
_SIDE = 32
_TOLERANCE = 1e-3


def keep_levels_in_merges(model: nn.Module, undo: ExitStack) -> None:
    """Let the blocks of a network that hold contextual convolutions, and no others, carry levels over when they merge.

    Args:
        model: A network.
        undo: Takes what puts a block back.
    """
    modules = list(model.modules())
    holders = {module for module in modules if _is_contextual(module) and not isinstance(module, _OTHERS)}
    watched = {part for block in holders if _can_merge(block) for part in block.modules() if part in holders}
    for module in modules:
        if module in watched or _plain_class(module) is not type_before_parametrizations(module):
            undo.callback(restorer(module))
            _switch(module, module in watched)


def _switch(module: nn.Module, watched: bool) -> None:
    _unwrap_own_methods(module)
    cls = plain = _plain_class(module)
    if watched:
        cls = _keeping_class(plain, tuple(name for name in MERGING_METHODS if _is_merge(plain, name)))
        _wrap_own_methods(module)
    if cls is not type_before_parametrizations(module):
        switch_class(module, cls)


def _can_merge(block: nn.Module) -> bool:
    return any(map(callable, _own_methods(block).values())) or any(
        callable(attribute) or hasattr(attribute, "__get__")
        for attribute in (getattr_static(_plain_class(block), name, None) for name in MERGING_METHODS)
    )


_KEEPING: dict[Any, type[nn.Module]] = {}


def _keeping_class(plain: type[nn.Module], methods: tuple[str, ...]) -> type[nn.Module]:
    """A subclass of the class of a block, or of a part of one, of the same name, that drops no levels in silence.

    Args:
        plain: The class.
        methods: Its merging methods, which carry levels over.
    """
    key = (plain, methods)
    if key not in _KEEPING:
        members: dict[str, Any] = {name: _keeping_method(getattr_static(plain, name), plain) for name in methods}
        members |= {name: _watching_method(plain, name) for name in ("__setattr__", "add_module")}
        members |= {"__qualname__": plain.__qualname__, "__doc__": plain.__doc__, _PLAIN: plain}
        _KEEPING[key] = make_subclass(plain.__name__, (plain,), _keeping_class, *key, members=members)
    return _KEEPING[key]


def _plain_class(module: nn.Module) -> type[nn.Module]:
    cls = cast(type[nn.Module], type_before_parametrizations(module))
    return cast(type[nn.Module], vars(cls).get(_PLAIN, cls))


def _is_merge(plain: type[nn.Module], name: str) -> bool:
    """Whether a class has a method of that name that can be called with one argument at most."""
    attribute = getattr_static(plain, name, None)
    if isinstance(attribute, functools.partialmethod):
        return True
    is_method = callable(attribute) and hasattr(attribute, "__get__") and not isinstance(attribute, staticmethod | type)
    return is_method and _needs_at_most(attribute, 2)  # the block itself, and one more


def _needs_at_most(function: Any, count: int) -> bool:
    """Whether a function can be called with so many arguments.

    What needs more has the name of a merge alone, as the ``reparameterize`` of a variational autoencoder, and so has
    what shows no signature, as ``torch.add``.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    return sum(map(_is_needed, parameters)) <= count


def _is_needed(parameter: inspect.Parameter) -> bool:
    """Whether a call must give a parameter by its position."""
    by_position = parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    return by_position and parameter.default is parameter.empty


def _keeping_method(method: Any, plain: type[nn.Module]) -> Callable[..., Any]:
    """A merging method that carries levels over: what it is called with and what it returns are the method's own."""

    @functools.wraps(method)
    def call(block: Any, *args: Any, **kwargs: Any) -> Any:
        return _merge(block, method.__get__(block, plain), *args, **kwargs)

    return call


def _own_methods(block: nn.Module) -> dict[str, Any]:
    """What has the name of a merging method and is set on the block itself."""
    return {name: value for name, value in vars(block).items() if name in MERGING_METHODS}


def _wrap_own_methods(block: nn.Module) -> None:
    for name, method in _own_methods(block).items():
        if callable(method) and _needs_at_most(method, 1):
            vars(block)[name] = functools.partial(_merge, block, method)


def _unwrap_own_methods(block: nn.Module) -> None:
    for name, method in _own_methods(block).items():
        if isinstance(method, functools.partial) and method.func is _merge:
            vars(block)[name] = method.args[1]


def _watching_method(plain: type[nn.Module], name: str) -> Callable[..., None]:
    """A method that puts an attribute or a module into a block, unless levels would be lost."""
    put: Callable[..., None] = getattr(plain, name)

    @functools.wraps(put)
    def put_unless_levels_are_lost(holder: nn.Module, name: str, module: Any) -> None:
        if isinstance(module, nn.Module):
            _check_arrival(holder, name, module)
        put(holder, name, module)

    return put_unless_levels_are_lost


def _check_arrival(holder: nn.Module, name: str, module: nn.Module) -> None:
    """Check that no plain convolution comes in for a contextual one outside a call that sees to the levels.

    Raises:
        ValueError: If one does.
    """
    if _calls.get() or not isinstance(module, nn.Conv2d | nn.Sequential):
        return
    present, replaced = _spatial_convs(holder), holder._modules.get(name)
    channels = {conv.weight.shape[:2] for conv in present if isinstance(conv, CoConv2d)}
    came = [conv for conv in _plain_convs(module) if conv not in present and conv.weight.shape[:2] in channels]
    if came and not (replaced is not None and _plain_convs(replaced)):
        raise ValueError(
            f"{type(holder).__name__}.{name} would become a plain convolution where contextual ones are, and merge "
            "them without their levels. Reparameterize before converting, or by calling a method of the block that "
            "has merged when it returns, as block.fuse(), or give the new convolution the levels first: "
            "to_coconv_(new, old.dilations, old.splits). If a plain one is meant, call to_conv_(old) first"
        )


def _is_contextual(module: nn.Module) -> bool:
    return any(isinstance(sub, CoConv2d) for sub in module.modules())


@dataclass
class _Call:
    """One call of a merging method.

    Attributes:
        within: The calls within it.
        merged: Convolutions that it has merged away itself.
        made: Convolutions that it has made itself.
    """

    within: "list[_Call]" = field(default_factory=list)
    merged: list[nn.Conv2d] = field(default_factory=list)
    made: list[nn.Conv2d] = field(default_factory=list)

    def all_merged(self) -> list[nn.Conv2d]:
        """What it and the calls within it have merged away."""
        return [*self.merged, *(conv for call in self.within for conv in call.all_merged())]

    def all_made(self) -> list[nn.Conv2d]:
        """What it and the calls within it have made."""
        return [*self.made, *(conv for call in self.within for conv in call.all_made())]


_calls: ContextVar[tuple[_Call, ...]] = ContextVar("_calls", default=())


def _merge(block: nn.Module, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a merging method, see to the levels, and undo it all if the block would not compute the same.

    Raises:
        ValueError: If it would not.
    """
    merge = functools.partial(method, *args, **kwargs)
    if _is_traced() or _is_part(method, tree_leaves((args, kwargs))) or not _is_contextual(block):
        return merge()
    before, kernels, tolerance = _in_double(block), _kernels(_spatial_convs(block)), _tolerance(block)
    with ExitStack() as undo:
        undo.callback(deep_restorer(block))
        result, call = _merge_with_levels(merge, block)
        merged = _merged(result, block)
        same = _compute_the_same(before, _in_double(merged), tolerance)
        if same is None:
            same = _kernels_agree(call, kernels, _spatial_convs(merged), tolerance)
        if not same:
            raise _refusal(block)
        undo.pop_all()
    for outer in _calls.get()[-1:]:
        outer.within.append(call)
    return result


def _is_traced() -> bool:
    """Whether a call is one of a forward pass that is being traced, which does not merge."""
    return torch.compiler.is_compiling() or bool(_is_fx_tracing())


def _is_part(method: Callable[..., Any], given: list[Any]) -> bool:
    """Whether a method works on what it is given: it is a part of a forward pass or of a merge, and no merge."""
    if any(isinstance(leaf, torch.Tensor) and leaf.ndim > 2 for leaf in given):
        return True
    is_helper = bool(given) and all(isinstance(leaf, torch.Tensor | nn.Module) for leaf in given)
    return is_helper and not _takes_options(method)


def _takes_options(method: Callable[..., Any]) -> bool:
    """Whether all that a method takes may be left out."""
    try:
        parameters = inspect.signature(method).parameters.values()
    except (TypeError, ValueError):
        return False
    return all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)


def _merged(result: Any, block: nn.Module) -> nn.Module:
    """What a merge leaves: the one module that it returns, or else the block."""
    modules = [leaf for leaf in tree_leaves(result) if isinstance(leaf, nn.Module)]
    return modules[0] if len(modules) == 1 else block


def _in_double(block: nn.Module) -> nn.Module | None:
    """A copy to compare with, without other people's hooks and of plain blocks, or None where there can be none."""
    try:
        copied: nn.Module = Twin(block, fake=False).model.double()
    except Exception:  # the block's own code, which may refuse to be copied
        return None
    for module in copied.modules():
        _switch(module, watched=False)
    return copied


def _compute_the_same(before: nn.Module | None, after: nn.Module | None, tolerance: float) -> bool | None:
    """Whether all tensors that a merged block returns are among those that it returned before, on random images.

    Returns:
        None where the two cannot be run on images, or do not return a tensor.
    """
    if before is None or after is None:
        return None
    conv = next(module for module in before.modules() if isinstance(module, nn.Conv2d))
    device = next((tensor.device for tensor in before.parameters()), torch.device("cpu"))
    if device.type == "meta":
        return None
    generator = torch.Generator("cpu").manual_seed(0)
    image = torch.randn(2, conv.in_channels, _SIDE, _SIDE, generator=generator, dtype=torch.float64).to(device)
    with torch.no_grad():
        try:
            images = [image] * max(1, sum(map(_is_needed, inspect.signature(before.forward).parameters.values())))
            expected, found = (tensor_leaves(module(*map(torch.clone, images))) for module in (before, after))
        except Exception:  # the block's own code, which may want something else than images
            return None
    if not found:
        return None
    return all(any(_close(tensor, other, tolerance) for other in expected) for tensor in found)


def _tolerance(block: nn.Module) -> float:
    # Merged weights are rounded to the block's own type.
    types = {parameter.dtype for parameter in block.parameters() if parameter.is_floating_point()}
    return max([_TOLERANCE, *(8 * torch.finfo(dtype).eps for dtype in types)])


def _close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    # Where there is no number to compare, nothing is apart.
    return found.shape == expected.shape and not difference(found, expected) > tolerance


@dataclass(frozen=True)
class _Kernel:
    """What a convolution's kernel was.

    Attributes:
        kind: Its size and levels.
        taps: ``(out_channels, n)``, all but those of the centre.
    """

    kind: tuple[Any, ...]
    taps: torch.Tensor


def _kernels(convs: Iterable[nn.Conv2d]) -> list[_Kernel]:
    return [_Kernel(_kind(conv), _off_centre(conv.weight.detach())) for conv in convs]


def _off_centre(kernel: torch.Tensor) -> torch.Tensor:
    taps = kernel.flatten(2)
    centre = kernel.shape[2] // 2 * kernel.shape[3] + kernel.shape[3] // 2
    return torch.cat((taps[..., :centre], taps[..., centre + 1 :]), dim=2).flatten(1)


def _kernels_agree(call: _Call, before: list[_Kernel], after: list[nn.Conv2d], tolerance: float) -> bool:
    """Whether a merged block computes the same by its kernels, as far as levels go.

    Off the centre, which all levels share, norms and sums of branches make each output channel's kernel a combination
    of kernels of that channel that had the same levels. Where there are no numbers, all that was merged must have been
    of one kind.
    """
    levels_went = any(isinstance(conv, CoConv2d) for conv in call.merged)
    if levels_went and not call.made:
        return False
    if any(conv.weight.is_meta for conv in after):
        return len(set(map(_kind, call.merged))) <= 1
    sources = [*before, *_kernels(conv for inner in call.within for conv in inner.all_made())]
    checked = (conv for conv in after if levels_went or isinstance(conv, CoConv2d))
    return all(_is_combination(kernel, sources, tolerance) for kernel in _kernels(checked))


def _is_combination(kernel: _Kernel, sources: list[_Kernel], tolerance: float) -> bool:
    alike = [source.taps for source in sources if source.kind == kernel.kind and source.taps.shape == kernel.taps.shape]
    if not 0 < len(alike) < kernel.taps.shape[1]:  # anything is a combination of as many as it has numbers
        return False
    wanted, columns = (tensor.double().cpu() for tensor in (kernel.taps.unsqueeze(-1), torch.stack(alike, dim=-1)))
    return _close(columns @ torch.linalg.lstsq(columns, wanted).solution, wanted, tolerance)


def _merge_with_levels(merge: Callable[[], Any], block: nn.Module) -> tuple[Any, _Call]:
    call = _Call()
    before = _spatial_convs(block)
    token = _calls.set((*_calls.get(), call))
    try:
        result = merge()
    finally:
        _calls.reset(token)
    after = _spatial_convs(_merged(result, block))
    known, gone = [*before, *call.all_made()], call.all_merged()
    call.merged = [conv for conv in known if conv not in after and conv not in gone and not _is_pointwise(conv)]
    call.made = [conv for conv in after if conv not in known]
    if call.made and any(isinstance(conv, CoConv2d) for conv in call.merged):
        _carry_over(block, call)
    return result, call


def _carry_over(block: nn.Module, call: _Call) -> None:
    """Give what was made the levels of what was merged."""
    merged, made = call.merged, call.made
    shapes = {conv.weight.shape for conv in made}
    of_one_kind = len(set(map(_kind, merged))) == 1
    # What has another shape was dropped, as an auxiliary branch is.
    sources = merged[:1] * len(made) if of_one_kind else [conv for conv in merged if conv.weight.shape in shapes]
    if [conv.weight.shape for conv in sources] != [conv.weight.shape for conv in made]:
        raise _refusal(block)
    for conv, source in zip(made, sources, strict=True):
        if isinstance(source, CoConv2d):
            to_coconv_(conv, source.dilations, source.splits)
            pass_mark_on(source, conv)


def _refusal(block: nn.Module) -> ValueError:
    return ValueError(
        f"merged, this {type(block).__name__} would not compute the same, or there is no telling: what it merges does "
        "not all have the same levels. Reparameterize before converting, or exclude it from the conversion"
    )


def _kind(conv: nn.Conv2d) -> tuple[Any, ...]:
    return conv.kernel_size, getattr(conv, "dilations", None), getattr(conv, "splits", None)


def _spatial_convs(block: nn.Module) -> list[nn.Conv2d]:
    return [module for module in block.modules() if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1]


def _plain_convs(block: nn.Module) -> list[nn.Conv2d]:
    return [conv for conv in _spatial_convs(block) if not isinstance(conv, CoConv2d)]


def _is_pointwise(conv: nn.Conv2d) -> bool:
    """Whether only the centre of the kernel counts, as in an identity or a 1×1 convolution padded with zeros."""
    if isinstance(conv, CoConv2d) or conv.weight.is_meta:
        return False
    height, width = conv.kernel_size
    centre = conv.weight[..., height // 2, width // 2]
    return bool(conv.weight.count_nonzero() == centre.count_nonzero())
