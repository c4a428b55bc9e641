"""A twin of a network that computes shapes and dataflow, but no numbers."""

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.distributed
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

# What a network is known to raise when its input does not suit it, or when it needs numbers and the twin has none.
FORWARD_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
# Torch may be built without it.
_PROCESS_GROUP: Any = getattr(torch.distributed, "ProcessGroup", ())
_HOOK_TABLES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Twin:
    """A copy of a network in evaluation mode whose parameters all require grad and, if ``fake``, take no memory.

    The network itself is never run, switched or hooked. Hooks that the network registered on itself (timm's hooked
    feature extractors) work in the twin; other people's hooks are left out, so none of them sees a fake tensor.

    Args:
        model: The network to copy.
        fake: Whether tensors carry a shape but no data. A network on the meta device has none to begin with.

    Attributes:
        model (nn.Module): The copy.
        fake (bool): Whether its tensors have no data.
    """

    def __init__(self, model: nn.Module, *, fake: bool = True) -> None:
        on_meta = any(parameter.is_meta for parameter in model.parameters())
        self._fake_mode = FakeTensorMode(allow_non_fake_inputs=True) if fake and not on_meta else None
        self.fake = fake or on_meta
        self._default_device = torch.device("meta") if on_meta else None
        self.model = self._copy(model)
        for module in self.model.modules():
            module.training = False
            # Old-style normalisations of weights keep the result in a plain attribute.
            weights = [*module._parameters.values(), vars(module).get("weight")]
            for weight in weights:
                if isinstance(weight, torch.Tensor) and weight.is_floating_point() and weight.is_leaf:
                    weight.requires_grad_(True)

    def run(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], call: Callable[..., Any] | None = None
    ) -> tuple[Any, Any]:
        """Run the twin on inputs of the network, tracking the dataflow from them.

        Args:
            args: Positional inputs; tensors are replaced by shapes where the twin is fake.
            kwargs: Inputs by name.
            call: What to call instead of the twin's model, with that before the inputs.

        Returns:
            The outputs, and the inputs as the twin saw them.
        """
        with self._mode(), torch.set_grad_enabled(True):
            args, kwargs = tree_map_only(torch.Tensor, self._enter, (args, kwargs))
            outputs = self.model(*args, **kwargs) if call is None else call(self.model, *args, **kwargs)
            return outputs, (args, kwargs)

    def _mode(self) -> AbstractContextManager[Any]:
        if self._fake_mode is not None:
            return self._fake_mode
        return nullcontext() if self._default_device is None else self._default_device

    def _enter(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._default_device is not None:
            tensor = tensor.to(self._default_device)
        elif self._fake_mode is not None:
            tensor = self._fake_mode.from_tensor(tensor)
        # A clone, because networks may write into their input, and a leaf that requires grad forbids that.
        return tensor.detach().clone().requires_grad_(True).clone() if tensor.is_floating_point() else tensor

    def _copy(self, model: nn.Module) -> nn.Module:
        memo: dict[int, Any] = {}
        for tensor in _own_tensors(model):
            if self._fake_mode is not None:
                memo[id(tensor)] = self._fake_mode.from_tensor(tensor)
            elif not tensor.is_leaf:  # a cached result, which deepcopy refuses
                memo[id(tensor)] = tensor.detach().clone()
        for module in model.modules():
            # Norms that synchronise hold a group of processes, of which there is one.
            groups = (value for value in vars(module).values() if isinstance(value, _PROCESS_GROUP))
            memo.update((id(group), group) for group in groups)
        tables = [(module, name) for module in model.modules() for name in _HOOK_TABLES]
        for module, name in tables:
            memo[id(getattr(module, name))] = OrderedDict()
        twin = _copy_module(model, memo)
        for module, name in tables:
            for key, hook in getattr(module, name).items():
                if id(_owner(hook)) in memo:
                    memo[id(getattr(module, name))][key] = copy.deepcopy(hook, memo)
        return twin


def _copy_module(module: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Copy a module deeply; attributes that refuse to be copied and hold no tensors, such as locks, are shared.

    Args:
        module: The module.
        memo: As of :func:`copy.deepcopy`; it is filled.

    Raises:
        Exception: What the module raises, if it cannot be copied.
    """
    memo = {} if memo is None else memo
    attempt = dict(memo)
    try:
        copied = copy.deepcopy(module, attempt)
    except Exception:
        shared = {id(value): value for value in _uncopyable(module)}
        if not shared:
            raise
        attempt = memo | shared
        copied = copy.deepcopy(module, attempt)
    memo.update(attempt)
    return copied


def _uncopyable(module: nn.Module) -> Iterator[Any]:
    """Attributes of a module and those in it that refuse to be copied, and hold neither tensors nor modules."""
    own = vars(nn.Module()).keys()
    for part in module.modules():
        for name, value in vars(part).items():
            held = (value, *getattr(value, "__dict__", {}).values())
            if name in own or any(isinstance(leaf, torch.Tensor | nn.Module) for leaf in held):
                continue
            try:
                copy.deepcopy(value)
            except Exception:  # whatever the value's own code raises
                yield value


def _own_tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    for module in model.modules():
        # vars() holds the dicts of parameters and buffers, and whatever else the module keeps.
        yield from (leaf for leaf in tree_leaves(vars(module)) if isinstance(leaf, torch.Tensor))


def _owner(hook: Callable[..., Any]) -> object:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return cast(object, getattr(hook, "__self__", None))
