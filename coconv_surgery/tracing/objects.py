"""What Python objects hold, found without running any code of theirs."""

import enum
import functools
import gc
import threading
import types
from collections import deque
from collections.abc import Callable, ItemsView, Iterable, Iterator, ValuesView
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

# What holds nothing that could matter here.
_ATOMS: tuple[type, ...] = (
    *(str, bytes, int, float, complex, type(None), range, type, enum.Enum),
    *(types.BuiltinFunctionType, types.FunctionType, types.ModuleType, types.CodeType),
    *(torch.Tensor, torch.dtype, torch.device, torch.Generator),
)
_SEQUENCES: tuple[type, ...] = (list, tuple, set, frozenset, deque)

_BUILT_IN = ("builtins", "itertools", "collections")
_ITERATORS_AND_VIEWS: tuple[Any, ...] = (Iterator, ValuesView, ItemsView, types.MappingProxyType)


def parts(value: Any) -> Iterable[Any]:
    """What an object holds: the items of a container and its keys, or the attributes of anything else.

    No property, descriptor or overridden method runs. Tensors, functions, classes and the like hold nothing.
    """
    if isinstance(value, _ATOMS):
        return ()
    if isinstance(value, dict):
        return [*dict.values(value), *(key for key in dict.keys(value) if type(key) is not str)]
    if isinstance(value, slice):
        return (value.start, value.stop, value.step)
    if isinstance(value, types.GeneratorType):
        return list(value.gi_frame.f_locals.values()) if value.gi_frame else ()
    for base in _SEQUENCES:
        if isinstance(value, base):
            return iter_as(base, value)
    if type(value).__module__ in _BUILT_IN and isinstance(value, _ITERATORS_AND_VIEWS):
        return gc.get_referents(value)  # what it iterates over
    if isinstance(value, functools.partial):
        return (value.func, value.args, value.keywords)
    if isinstance(value, types.MethodType):
        return (value.__self__,)
    if isinstance(value, BaseException):
        return (*value.args, *attributes(value).values())
    return attributes(value).values()


def iter_as(base: Any, value: Any) -> Iterator[Any]:
    """Iterate over a container as its built-in base does."""
    iterator: Iterator[Any] = base.__iter__(value)
    return iterator


def attributes(value: Any) -> dict[str, Any]:
    """The attributes that an object keeps itself, by name: those in its ``__dict__``, and in slots."""
    found, slots = dict_of(value) or {}, slots_of(value)
    return found | slots if slots else found


def slots_of(value: Any) -> dict[str, Any]:
    """The slots of an object that are filled, by name."""
    found = {}
    for cls in type(value).__mro__:
        if "__slots__" in vars(cls):
            for name, slot in vars(cls).items():
                if isinstance(slot, types.MemberDescriptorType):
                    try:
                        found[name] = slot.__get__(value)
                    except AttributeError:  # not filled
                        continue
    return found


def dict_of(value: Any) -> dict[str, Any] | None:
    """The ``__dict__`` of an object, if it has one."""
    if isinstance(value, threading.local):
        return vars(value)  # this thread's
    try:
        found: dict[str, Any] = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None
    return found


def walk(*roots: Any, into: Callable[[Any], Iterable[Any]] = parts) -> Iterator[Any]:
    """Everything that can be reached from some objects, each once, in depth-first order; plain values are left out.

    Args:
        *roots: The objects to start from.
        into: What an object holds.
    """
    # An id is an object's own only as long as the object lives.
    seen: dict[int, Any] = {}
    stack = [iter(roots)]
    while stack:
        for value in stack[-1]:
            if id(value) not in seen and not isinstance(value, (str, bytes, int, float, complex, type(None))):
                seen[id(value)] = value
                yield value
                stack.append(iter(list(into(value))))  # a list, because another thread may change it
                break
        else:
            stack.pop()


def tensors_in(*roots: Any) -> Iterator[torch.Tensor]:
    """All tensors in some objects, however deep, each once and in order."""
    return (value for value in walk(*roots) if isinstance(value, torch.Tensor))


def tensor_leaves(value: Any) -> list[torch.Tensor]:
    """The tensors in arguments or results, as often as they stand in their lists, tuples and dictionaries."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def in_words(error: BaseException | None) -> str:
    """The class of an error and what it says, as far as it can."""
    try:
        text = str(error)
    except Exception:  # whatever the error's own code raises
        text = ""
    return f"{type(error).__name__}{text and f': {text}'}"


def in_short(error: BaseException) -> str:
    """The same in one line."""
    return in_words(error).splitlines()[0]


def is_expanded(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds numbers once and shows them several times, so that it cannot be written to as a whole."""
    return any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def memory_of(tensor: torch.Tensor) -> int:
    """A number for the memory that a tensor shares with its views."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # kinds of tensors that have none
        return -id(tensor)
