"""A copy of a network that shares no module and no tensor with it."""

import contextlib
import contextvars
import copy
import dis
import functools
import sys
import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from inspect import getattr_static
from typing import Any

import torch
import torch.distributed
import torch.fx as fx
import torch.nn as nn

from coconv_surgery.tracing.convertible import path_of
from coconv_surgery.tracing.objects import attributes, in_short, parts, walk
from coconv_surgery.tracing.surroundings import (
    CACHE,
    COMPILED,
    DEFINITIONS,
    OF_EVERY_MODULE,
    Surroundings,
    contents,
    empty_cache,
)

# Torch may be built without it.
_PROCESS_GROUP: Any = getattr(torch.distributed, "ProcessGroup", ())
_HOOK_FLAGS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
_FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_HOOK_TABLES = (*_FORWARD_HOOKS, "_backward_hooks", "_backward_pre_hooks")
_OF_ITS_OWN_CONTEXT = contextvars.ContextVar, threading.local
_TALKATIVE = {"print", "open", "input", "breakpoint", "exec", "eval"}
_SILENT = {
    "abc",
    "builtins",
    "cmath",
    "collections",
    "contextlib",
    "copy",
    "dataclasses",
    "decimal",
    "enum",
    "fractions",
    "functools",
    "itertools",
    "math",
    "numbers",
    "operator",
    "random",
    "re",
    "statistics",
    "string",
    "types",
    "typing",
    "weakref",
}


class CopyError(TypeError):
    """A network of which there is no copy."""


def copy_network(
    model: nn.Module, surroundings: Surroundings, copy_tensor: Callable[[torch.Tensor], torch.Tensor | None]
) -> tuple[nn.Module, Mapping[int, Any]]:
    """Copy a network deeply, whatever its parts do when they are copied.

    Functions that the network holds, hooks with which it feeds itself, and hooks that may change a map, see the copy
    where they saw the network. Other people's hooks are left out. What refuses to be copied and holds no tensors, such
    as a lock, is shared.

    Args:
        model: The network.
        surroundings: What it shares with its copy in any case.
        copy_tensor: Makes the copy of a tensor, or None to let it be copied as everything else.

    Returns:
        The copy, and the memo of all that was copied for it.

    Raises:
        CopyError: If something of it cannot be copied.
    """
    memo: dict[int, Any] = {}
    for part in walk(model, into=held_by):
        if isinstance(part, torch.Tensor) and (copied := copy_tensor(part)) is not None:
            memo[id(part)] = copied
    for module in model.modules():
        # Norms that synchronise hold a group of processes, of which there is one.
        groups = (value for value in vars(module).values() if isinstance(value, _PROCESS_GROUP))
        memo.update((id(group), group) for group in groups)
        memo.update((id(vars(module)[name]), OrderedDict()) for name in _HOOK_TABLES)
    twin = _copy(model, memo)
    binder = _Binder(memo, surroundings)
    for module in twin.modules():
        for name, value in vars(module).items():
            if name not in OF_EVERY_MODULE and (bound := binder.bind(value)) is not value:
                vars(module)[name] = bound
    for module in model.modules():
        # Graph modules do not copy their hooks.
        copied, held = vars(memo[id(module)]), vars(module)
        copied.update((name, OrderedDict(held[name])) for name in _HOOK_FLAGS)
        for name in _HOOK_TABLES:
            forward = name in _FORWARD_HOOKS
            copied[name] = OrderedDict(
                (key, binder.bind_hook(hook))
                for key, hook in held[name].items()
                if binder.is_own_hook(hook) or (forward and _may_change_maps(hook))
            )
    return twin, memo


def separate_copy(model: nn.Module) -> nn.Module:
    """Copy a network as :func:`copy.deepcopy` does, if what comes of that is a network of its own.

    What refuses to be copied and holds no tensors, such as a lock, is shared.

    Raises:
        CopyError: If the copy would share a module or tensor with the network, or run a part of it, or if something of
            it cannot be copied.
    """
    modules = set(model.modules())
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name in OF_EVERY_MODULE:
                continue
            functions = [part for part in walk(value, into=held_by) if isinstance(part, types.FunctionType)]
            seen = walk(*functions, into=_seen_through_objects)
            if any(isinstance(part, nn.Module) and part in modules for part in seen):
                raise CopyError(
                    f"{path_of(path)}.{name} is a function that sees the network itself, and in a copy it still would: "
                    "make it a method"
                )
    # Results that somebody keeps, as pruned weights, are refused by deepcopy.
    results = (part for part in walk(model, into=held_by) if isinstance(part, torch.Tensor) and not part.is_leaf)
    copied: nn.Module = copy_deeply(model, {id(result): result.detach().clone() for result in results})
    for path, module in copied.named_modules():
        vars(module).pop(COMPILED, None)
        module.training = model.get_submodule(path).training  # which graph modules may lose
    _check_apart(model, copied)
    return copied


def held_by(value: Any) -> Iterable[Any]:
    """What an object holds, of modules without their hooks and what they were compiled into."""
    if isinstance(value, nn.Module):
        return [part for name, part in vars(value).items() if name not in (*_HOOK_TABLES, COMPILED)]
    return parts(value)


def _copy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    attempt = dict(memo)
    twin: nn.Module = copy_deeply(model, attempt)
    if amiss := _amiss(model, twin, attempt):
        silence(attempt)
        attempt = dict(memo)
        for module in amiss:
            attempt.setdefault(id(module), type(module).__new__(type(module)))
        for module in amiss:
            state = {name: value for name, value in vars(module).items() if name != COMPILED}
            attempt[id(module)].__setstate__(copy_deeply(state, attempt, module))
            if isinstance(module, fx.GraphModule):
                attempt[id(module)].recompile()  # each has a class of its own, made of its graph
        twin = copy_deeply(model, attempt)
        _check_apart(model, twin)
    _absorb(memo, attempt)
    return twin


def _amiss(model: nn.Module, twin: Any, memo: dict[int, Any]) -> list[nn.Module]:
    """The modules that say they are their own copy, or whose ``__deepcopy__`` does not tell what their parts' are."""
    own = [module for module in model.modules() if hasattr(type(module), "__deepcopy__") and not _is_torchs(module)]
    untold = [module for module in own if not _is_told(module, memo)]
    lost = [part for module in untold for part in module.modules() if not isinstance(memo.get(id(part)), nn.Module)]
    shared = _shared(model, twin) if isinstance(twin, nn.Module) else []
    return list(dict.fromkeys([*untold, *lost, *shared]))


def _is_torchs(module: nn.Module) -> bool:
    return str(getattr(type(module).__deepcopy__, "__module__", "")).startswith("torch.")  # type: ignore[attr-defined]


def _is_told(module: nn.Module, memo: dict[int, Any]) -> bool:
    copied = memo.get(id(module))
    return isinstance(copied, nn.Module) and all(
        id(part) in memo and memo[id(part)] is vars(copied)[table].get(name)
        for table in ("_modules", "_parameters", "_buffers")
        for name, part in vars(module)[table].items()
        if part is not None
    )


def _check_apart(model: nn.Module, copied: nn.Module) -> None:
    if shared := _shared(model, copied):
        names = {module: name for name, module in model.named_modules()}
        raise CopyError(
            f"a copy of the network would share {path_of(names[shared[0]])}, a {type(shared[0]).__name__}, with the "
            "network itself: see to it that copy.deepcopy() makes one of its own"
        )


def _shared(model: nn.Module, twin: nn.Module) -> list[nn.Module]:
    """The modules that a network and its copy share, or of which they share a parameter or buffer."""
    theirs = {id(part) for part in (*twin.modules(), *twin.parameters(), *twin.buffers())}
    return [
        module
        for module in model.modules()
        if id(module) in theirs or any(id(tensor) in theirs for tensor in _tensors_of(module))
    ]


def _tensors_of(module: nn.Module) -> list[torch.Tensor]:
    return [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]


def copy_deeply(value: Any, memo: dict[int, Any], module: nn.Module | None = None) -> Any:
    """Copy a module or its attributes; what refuses and holds no tensors is shared.

    Args:
        value: The module or its attributes.
        memo: As of :func:`copy.deepcopy`; it is filled.
        module: The module, where that is not the value.
    """
    try:
        return _copied_whole(value, memo)
    except Exception as error:  # whatever the network's own code raises
        memo.update(_not_copyable(value if module is None else module, memo))
        try:
            return _copied_whole(value, memo)
        except Exception:
            raise CopyError(
                f"a {type(value if module is None else module).__name__} cannot be copied ({in_short(error)}), and a "
                "copy is needed: make copy.deepcopy() of it work"
            ) from error


def _copied_whole(value: Any, memo: dict[int, Any]) -> Any:
    """Copy a value as :func:`copy.deepcopy` does; where that fails, the memo knows of no half copies."""
    attempt = dict(memo)
    try:
        copied = copy.deepcopy(value, attempt)
    except Exception:
        silence({key: value for key, value in attempt.items() if key not in memo})
        raise
    _absorb(memo, attempt)
    return copied


def _not_copyable(model: nn.Module, memo: dict[int, Any]) -> dict[int, Any]:
    """What a network holds that refuses to be copied, and stands for itself in the copy.

    Raises:
        CopyError: If some of it holds tensors or modules.
    """
    shared: dict[int, Any] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name in OF_EVERY_MODULE:
                continue
            # What others hold comes after them.
            for part in reversed(list(walk(value))):
                attempt = {**memo, **shared}
                try:
                    copy.deepcopy(part, attempt)
                except Exception as error:  # whatever the part's own code raises
                    if any(isinstance(held, torch.Tensor | nn.Module) for held in walk(part)):
                        raise CopyError(
                            f"{path_of(path)}.{name} holds a {type(part).__name__} with tensors that cannot be copied "
                            f"({in_short(error)}), and a copy is needed: make copy.deepcopy() of it work"
                        ) from error
                    shared[id(part)] = (
                        _Spent(f"{path_of(path)}.{name}") if isinstance(part, types.GeneratorType) else part
                    )
                finally:
                    silence({key: value for key, value in attempt.items() if key not in memo})
    return shared


def _absorb(memo: dict[int, Any], attempt: dict[int, Any]) -> None:
    """Take over what a memo knows, and what it keeps alive under an id of its own."""
    kept = attempt.pop(id(attempt), [])
    memo.update(attempt)
    memo.setdefault(id(memo), []).extend(kept)


def silence(memo: Mapping[int, Any]) -> None:
    """Keep copies from doing anything when they go: what they would close or delete is not theirs alone.

    Args:
        memo: As :func:`copy.deepcopy` filled it.
    """
    for key, value in memo.items():
        if id(value) != key and hasattr(type(value), "__del__"):
            cls: Any = type(value)
            silent = type(cls)(cls.__name__, (cls,), {"__slots__": (), "__del__": _do_nothing})
            with contextlib.suppress(TypeError):  # a class of C's
                object.__setattr__(value, "__class__", silent)


def _do_nothing(self: Any) -> None:
    pass


class _Spent:
    """Stands for a generator, which cannot be copied, and which a copy of the network may not advance."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __iter__(self) -> "_Spent":
        return self

    def __next__(self) -> Any:
        raise RuntimeError(
            f"{self._name} is a generator, and a copy of the network cannot take from it without the network missing it"
        )


class _Binder:
    """Makes functions that see a network see its copy.

    Args:
        memo: What became of what, as of :func:`copy.deepcopy`.
        surroundings: What stays as it is.
    """

    def __init__(self, memo: dict[int, Any], surroundings: Surroundings) -> None:
        self._memo = memo
        self._surroundings = surroundings
        # What could not be copied stands for itself, and is not the copy's alone.
        self._private = {id(value) for key, value in memo.items() if id(value) != key}
        self._bound: dict[int, tuple[Any, Any]] = {}

    def is_own_hook(self, hook: Any) -> bool:
        """Whether a network cannot do without a hook: it sees the network or its surroundings, or nothing at all.

        Torch's own compute weights, as old-style weight normalisation does.
        """
        if type(hook).__module__.startswith("torch."):
            return True
        seen = list(walk(hook, into=_seen_by))
        if any(id(value) in self._memo or self._is_around(value) for value in seen):
            return True
        functions = [value for value in seen if isinstance(value, types.FunctionType)]
        states = [value for value in seen if value is not hook and not isinstance(value, _STATELESS)]
        return not states and bool(functions) and not any(map(_tells_others, functions))

    def _is_around(self, value: Any) -> bool:
        """Whether the network's code reaches a value, or what it holds for one thread or context."""
        if not _is_state(value):
            return False
        held = [part for part in attributes(value).values() if isinstance(part, _OF_ITS_OWN_CONTEXT)]
        return any(part in self._surroundings for part in (value, *held))

    def bind_hook(self, hook: Any) -> Any:
        """A hook for the copy. Nobody else sees what it leaves in its closure."""
        if isinstance(hook, types.FunctionType | functools.partial):
            return self.bind(hook, everything=True)
        try:
            return copy.deepcopy(hook, self._memo)
        except Exception as error:  # whatever the hook's own code raises
            raise CopyError(
                f"a forward hook of class {type(hook).__name__} cannot be copied ({in_short(error)}), and planning "
                "runs a copy: make copy.deepcopy() of it work, or take the hook off meanwhile"
            ) from error

    def bind(self, value: Any, everything: bool = False) -> Any:
        """The same with the copy in place of the network; containers of the copy are changed in place.

        Args:
            value: Anything that the copy holds.
            everything: Whether functions get copies of whatever else they see, too.
        """
        if (copied := self._memo.get(id(value), value)) is not value:
            return copied
        if id(value) in self._bound:
            return self._bound[id(value)][1]
        self._bound[id(value)] = (value, value)
        bound = value
        if isinstance(value, types.FunctionType):
            bound = self._function(value, everything)
        elif isinstance(value, CACHE):
            bound = empty_cache(value, self.bind(value.__wrapped__, everything))
        elif isinstance(value, types.MethodType):
            bound = copy.deepcopy(value, self._memo) if id(value.__self__) in self._memo else value
        elif isinstance(value, functools.partial):
            func, args, keywords = (self.bind(part, everything) for part in (value.func, value.args, value.keywords))
            if func is not value.func or args is not value.args or keywords is not value.keywords:
                bound = functools.partial(func, *args, **keywords)
        elif type(value) is weakref.ref and id(value()) in self._memo:
            bound = weakref.ref(self._memo[id(value())])
        elif isinstance(value, weakref.WeakMethod) and (method := value()) is not None:
            bound = weakref.WeakMethod(copy.deepcopy(method, self._memo))
        elif isinstance(value, weakref.WeakValueDictionary):
            for key, item in list(value.items()):
                value[key] = self._memo.get(id(item), item)
        elif type(value) is tuple:
            items = tuple(self.bind(item, everything) for item in value)
            bound = value if all(item is old for item, old in zip(items, value, strict=True)) else items
        elif isinstance(value, dict | list) and id(value) in self._private:
            for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
                if (new := self.bind(item, everything)) is not item:
                    value[key] = new
        elif id(value) in self._private and not isinstance(value, torch.Tensor | nn.Module | type):
            for name, item in list(attributes(value).items()):
                if (new := self.bind(item, everything)) is not item:
                    object.__setattr__(value, name, new)
        self._bound[id(value)] = (value, bound)
        return bound

    def _function(self, function: types.FunctionType, everything: bool) -> types.FunctionType:
        if not everything and not self._is_reached_from(function):
            return function
        sees = functools.partial(self._sees, everything=everything)
        namespace = {**function.__globals__, **{name: sees(value) for name, value in _globals_of(function).items()}}
        closure = tuple(types.CellType(*map(sees, contents([cell]))) for cell in function.__closure__ or ())
        defaults = None if function.__defaults__ is None else tuple(map(sees, function.__defaults__))
        other = types.FunctionType(function.__code__, namespace, function.__name__, defaults, closure)
        other.__kwdefaults__ = {name: sees(value) for name, value in (function.__kwdefaults__ or {}).items()}
        return other

    def _sees(self, value: Any, everything: bool) -> Any:
        """What a function sees in place of a value."""
        if id(value) in self._memo:
            return self._memo[id(value)]
        if isinstance(value, types.FunctionType | functools.partial):
            return self.bind(value, everything)
        if isinstance(value, _STATELESS) or self._is_around(value):
            return value
        reached = self._is_reached_from(value)
        if not everything and not reached:
            return value
        try:
            return _copied_whole(value, self._memo)
        except Exception as error:  # whatever the value's own code raises
            if reached:
                raise CopyError(
                    f"a function of the network sees it through a {type(value).__name__} that cannot be copied "
                    f"({in_short(error)}), and planning runs a copy: make copy.deepcopy() of it work"
                ) from error
            return value

    def _is_reached_from(self, value: Any) -> bool:
        return any(id(part) in self._memo for part in walk(value, into=_seen_through_objects))


def _may_change_maps(hook: Any) -> bool:
    """Whether a forward hook returns something, or writes to a tensor in place, as far as its code shows."""
    function = _code_of(hook)
    if function is None or function.__module__.startswith("torch."):  # observers of quantisation give what they get
        return False
    if any(name.endswith("_") and not name.endswith("__") for name in function.__code__.co_names):
        return True
    # A lambda returns what it calls, whether that gives something or not.
    forced = function.__name__ == "<lambda>" and _tells_others(function)
    return any(not forced or not opname.startswith("CALL") for opname in _returned(function.__code__))


def _code_of(hook: Any) -> types.FunctionType | None:
    if isinstance(hook, functools.partial):
        return _code_of(hook.func)
    if isinstance(hook, types.MethodType):
        return _code_of(hook.__func__)
    if isinstance(hook, nn.Module):
        return _code_of(type(hook).forward)
    called = hook if isinstance(hook, types.FunctionType) else getattr_static(type(hook), "__call__", None)
    return called if isinstance(called, types.FunctionType) else None


def _returned(code: types.CodeType) -> Iterator[str]:
    """The instructions that give what a function returns, where that is not None."""
    before: Any = None
    for instruction in dis.get_instructions(code):
        if instruction.opname == "RETURN_CONST" and instruction.argval is not None:
            yield instruction.opname
        if instruction.opname == "RETURN_VALUE":
            nothing = before.opname == "LOAD_CONST" and before.argval is None and not instruction.is_jump_target
            if not nothing:
                yield before.opname
        before = instruction


def _tells_others(function: types.FunctionType) -> bool:
    """Whether a function reaches what is outside of the process' objects, as by printing, logging or writing files."""
    names = {*function.__code__.co_names}
    used = [*_seen_through_objects(function), *map(function.__globals__.get, names)]
    libraries = {library for value in used for library in _libraries_of(value)}
    talks = _TALKATIVE & names or libraries & sys.stdlib_module_names - _SILENT
    return bool(talks) or function.__module__.startswith("torch.")


def _libraries_of(value: Any) -> set[str]:
    """Which top-level modules a module belongs to, or the classes of an object."""
    if isinstance(value, types.ModuleType):
        return {value.__name__.partition(".")[0]}
    return {cls.__module__.partition(".")[0] for cls in type(value).__mro__}


_STATELESS = (
    *DEFINITIONS,
    *(torch.dtype, torch.device, str, bytes, int, float, complex, type(None)),
)


def _is_state(value: Any) -> bool:
    return not isinstance(value, _STATELESS)


def _seen_by(value: Any) -> Iterable[Any]:
    """What a function sees besides its arguments. Objects of other people are not looked into."""
    seen_through = isinstance(
        value, types.FunctionType | types.MethodType | functools.partial | dict | list | tuple | set
    )
    return _seen_through_objects(value) if seen_through else ()


def _seen_through_objects(value: Any) -> Iterable[Any]:
    """What a function sees besides its arguments, through any object."""
    if isinstance(value, types.FunctionType):
        closure = contents(value.__closure__ or ())
        defaults = (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
        return [*closure, *defaults, *_globals_of(value).values()]
    return parts(value)


def _globals_of(function: types.FunctionType) -> dict[str, Any]:
    """The global names that a function uses, with what they stand for; what a library defines is left out."""
    namespace = function.__globals__
    names = {
        instruction.argval
        for code in _codes(function.__code__)
        for instruction in dis.get_instructions(code)
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    }
    return {name: namespace[name] for name in names if name in namespace and _is_state(namespace[name])}


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)
