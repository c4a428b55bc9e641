"""A twin of a network that computes shapes and dataflow, but no numbers."""

import copy
import functools
import traceback
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode

from coconv_surgery.tracing.copying import CopyError, copy_network, silence
from coconv_surgery.tracing.evaluating import evaluate
from coconv_surgery.tracing.objects import in_short, tensors_in
from coconv_surgery.tracing.surroundings import COMPILED, Surroundings


class NetworkError(Exception):
    """What the code of a network raised, as the cause.

    Attributes:
        hidden: Whether the network ran with gradients on where it had switched them off.
    """

    hidden: bool = False

    def clear_frames(self) -> None:
        """Let go of the variables of the functions that it came through, which keep the network's copy."""
        error: BaseException | None = self
        while error is not None:
            traceback.clear_frames(error.__traceback__)
            error = error.__cause__ or error.__context__


class Twin:
    """A copy of a network in evaluation mode whose parameters all require grad and, if ``fake``, take no memory.

    The network itself is never run, switched or hooked, and nobody else's hooks see the twin run.

    Args:
        model: The network to copy.
        surroundings: What it shares with the twin. Default: what its code can reach.
        fake: Whether tensors carry a shape but no data. A network on the meta device has none to begin with.

    Attributes:
        model (nn.Module): The copy.
        fake (bool): Whether its tensors have no data.

    Raises:
        CopyError: If the network cannot be copied.
    """

    def __init__(self, model: nn.Module, surroundings: Surroundings | None = None, *, fake: bool = True) -> None:
        on_meta = any(parameter.is_meta for parameter in model.parameters())
        self._fake_mode = FakeTensorMode(allow_non_fake_inputs=True) if fake and not on_meta else None
        self.fake = fake or on_meta
        self._default_device = torch.device("meta") if on_meta else None
        self.model, self._copies = copy_network(model, surroundings or Surroundings(model), self._copy_tensor)
        self._call_alone()
        with self._mode():
            evaluate(self.model)
        for module in self.model.modules():
            # Old-style normalisations of weights keep the result in a plain attribute.
            weights = [*module._parameters.values(), vars(module).get("weight")]
            for weight in weights:
                if isinstance(weight, torch.Tensor) and weight.is_floating_point() and weight.is_leaf:
                    weight.requires_grad_(True)

    def run(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        call: Callable[..., Any] | None = None,
        watch: Callable[[Any], AbstractContextManager[None]] = nullcontext,
    ) -> tuple[Any, Any]:
        """Run the twin on inputs of the network, tracking the dataflow from them.

        Args:
            args: Positional inputs; tensors are replaced by shapes where the twin is fake, and all else by a copy.
            kwargs: Inputs by name.
            call: What to call instead of the twin's model, with that before the inputs.
            watch: What to run it in, made from the inputs as the twin sees them.

        Returns:
            The outputs, and the inputs as the twin saw them.

        Raises:
            NetworkError: If the network's code raises something.
        """
        self._call_alone()  # what has come since, too
        with torch.set_grad_enabled(True):
            args, kwargs = self._enter((args, kwargs))
            with self._mode():
                try:
                    with watch((args, kwargs)):
                        outputs = self.model(*args, **kwargs) if call is None else call(self.model, *args, **kwargs)
                        # An iterator has run when it has given everything.
                        outputs = list(outputs) if isinstance(outputs, Iterator) else outputs
                except Exception as error:
                    raise NetworkError from error
            return outputs, (args, kwargs)

    def _call_alone(self) -> None:
        """Let modules be called without the hooks on all modules, in place of what ``torch.compile`` puts there."""
        for module in self.model.modules():
            vars(module)[COMPILED] = functools.partial(_call, weakref.ref(module))

    def traces(self) -> list[weakref.ref[Any]]:
        """What dies with the twin, unless somebody keeps a part of it or a tensor that it computed."""
        return [weakref.ref(part) for part in (self._fake_mode, *self.model.modules()) if part is not None]

    def take_apart(self) -> None:
        """Let go of everything, without waiting for the garbage collector."""
        silence(self._copies)
        for module in list(self.model.modules()):
            vars(module).clear()
        vars(self).clear()

    def _mode(self) -> AbstractContextManager[Any]:
        if self._fake_mode is not None:
            return self._fake_mode
        return nullcontext() if self._default_device is None else self._default_device

    def _enter(self, inputs: Any) -> Any:
        entered = {id(tensor): self._enter_tensor(tensor) for tensor in tensors_in(inputs)}
        try:
            return copy.deepcopy(inputs, entered)
        except Exception as error:  # whatever an input's own code raises when it is copied
            raise CopyError(
                f"the inputs hold something that cannot be copied ({in_short(error)}), and planning would change it: "
                "make copy.deepcopy() of it work"
            ) from error

    def _enter_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        copied = self._copy_tensor(tensor)
        tensor = tensor if copied is None else copied
        # A clone, because networks may write into their input, and a leaf that requires grad forbids that.
        return tensor.detach().clone().requires_grad_(True).clone() if tensor.is_floating_point() else tensor.clone()

    def _copy_tensor(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """A tensor of the twin for one of the network; None for one that a deep copy does not change."""
        if self._default_device is not None:
            return _like(tensor, tensor.detach().to(self._default_device).clone())
        if tensor.is_inference():  # which never requires grad
            with self._mode():
                return _like(tensor, torch.empty_like(tensor) if self.fake else tensor.clone())
        if self._fake_mode is not None:
            try:
                return self._fake_mode.from_tensor(tensor)
            except Exception:  # kinds of tensors that torch has no fakes of
                return _like(tensor, tensor.detach().clone())
        # Results that somebody keeps, and nested tensors, are refused by deepcopy.
        copyable = tensor.is_leaf and not tensor.is_nested and tensor.layout in (torch.strided, torch.sparse_coo)
        return None if copyable else _like(tensor, tensor.detach().clone())


def _like(tensor: torch.Tensor, copied: torch.Tensor) -> torch.Tensor:
    return nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied


# What torch calls a module by, with the module's own hooks; those on all modules belong to others.
_NOBODY_ELSE = {
    name: type(value)() if name.startswith("_global_") and isinstance(value, dict) else value
    for name, value in nn.Module._call_impl.__globals__.items()
}
call_alone = types.FunctionType(
    nn.Module._call_impl.__code__,
    _NOBODY_ELSE,
    "call_alone",
    nn.Module._call_impl.__defaults__,
    nn.Module._call_impl.__closure__,
)


def _call(module: weakref.ref[nn.Module], *args: Any, **kwargs: Any) -> Any:
    return call_alone(module(), *args, **kwargs)
