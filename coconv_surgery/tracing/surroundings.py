"""What a network's code can reach outside of the network, remembered and put back."""

import array
import contextvars
import dis
import functools
import io
import logging
import random
import sys
import threading
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn as nn

from coconv_surgery.tracing.objects import dict_of, iter_as, parts, slots_of, walk

# Libraries whose code keeps nothing that a network has given it, or knows what to keep.
_LIBRARIES = {
    *sys.stdlib_module_names,
    *("torch", "numpy", "coconv_surgery", "mmengine", "huggingface_hub", "safetensors", "triton", "sympy"),
    *("rich", "tqdm", "yaml", "addict", "PIL", "cv2", "matplotlib", "pycocotools", "yapf", "packaging"),
    *("typing_extensions", "pytest", "_pytest", "pluggy", "hypothesis", "IPython", "ipykernel", "traitlets"),
}
# Classes of theirs that hold what others put into them.
_HOLDERS = (
    *("collections", "weakref", "_thread", "types", "functools", "argparse", "_weakref", "_weakrefset"),
    *("queue", "torch.quasirandom"),
)
CACHE = functools._lru_cache_wrapper
DEFINITIONS = (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType)
# Where a module that was compiled in place keeps what runs it. In a copy that would run the network.
COMPILED = "_compiled_call_impl"
OF_EVERY_MODULE = {*vars(nn.Module()), COMPILED}
_IMPORT = dis.opmap["IMPORT_NAME"]
_MISSING = object()
_without_subclass: Any = torch._C.DisableTorchFunctionSubclass  # torch has no types for it


class Surroundings:
    """Everything that changes outside of a network when a copy of it runs.

    A forward pass may leave something in places of which a copy of the network has none of its own: in module-level
    dictionaries, class attributes, default arguments, closures. They are found by following the network's code: its
    classes' functions, the names that they use, what those hold, and so on. Definitions, such as classes that are
    registered on first use, stay, unless they hold a tensor or a module.

    Args:
        model: The network.
        *others: What else has code that runs with it.
    """

    def __init__(self, model: nn.Module, *others: Any) -> None:
        self._own = set(model.modules())
        self._buffers = list(model.buffers())
        self._restorers: list[Callable[[], None]] = []
        self._tensors: list[torch.Tensor] = []
        self._with_numbers: set[int] = set()
        self._ids: set[int] = set()
        # Where caches of functools are: how another one gets there, and which it is.
        self._caches: list[tuple[Callable[[Any], object], Any]] = []
        # Namespaces, with the names that code uses of each.
        self._namespaces: dict[int, tuple[dict[str, Any], set[str]]] = {}
        for value in walk(model, *others, into=self._reach):
            self._remember(value)
        for namespace, used in self._namespaces.values():
            before = {name: namespace[name] for name in used if name in namespace}
            self._note_caches(dict.__setitem__, namespace, before)
            self._restorers.append(functools.partial(_restore_names, namespace, used, before))
        for tensor in self._tensors:
            self._keep_numbers(tensor)
            # Put back first, as a tensor may have got other memory.
            self._restorers.append(functools.partial(_restore_tensor, tensor, *_state_of(tensor)))

    def __contains__(self, value: object) -> bool:
        """Whether an object is one of those that are put back."""
        return id(value) in self._ids

    def keep_buffers(self, of_at_most: int | None = None) -> None:
        """Remember the numbers of the network's buffers as well, which code outside of it may reach.

        Args:
            of_at_most: Only of buffers with as many numbers. Default: of all.
        """
        for buffer in self._buffers:
            if of_at_most is None or buffer.numel() <= of_at_most:
                self._keep_numbers(buffer)

    def empty_caches(self) -> None:
        """Put empty caches in the place of those of ``functools``, out of which nothing can be taken again."""
        made: dict[int, Any] = {}
        for put, value in self._caches:
            put(made.setdefault(id(value), _emptied(value)))

    def put_back(self) -> None:
        """Make everything what it was, the last remembered first; an error leaves nothing out."""
        errors = []
        for restore in reversed(self._restorers):
            try:
                restore()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def _remember(self, value: Any) -> None:
        if isinstance(value, dict):
            self._put_back_by(_restore_dict, value, dict(dict.items(value)))
            self._note_caches(dict.__setitem__, value, dict(dict.items(value)))  # whatever a subclass does
        elif isinstance(value, torch.Tensor):
            self._tensors.append(value)
        elif isinstance(value, contextvars.ContextVar | threading.local):
            self._ids.add(id(value))  # a visit has a context of its own; of what a thread has, the dict is put back
        elif isinstance(value, types.CellType):
            self._put_back_by(_restore_cell, value, _content(value))
            self._note_caches(setattr, value, {"cell_contents": _content(value)})
        elif isinstance(value, type):
            if not _is_library(value.__module__):
                self._put_back_by(_restore_class, value, dict(vars(value)))
                self._note_caches(type.__setattr__, value, vars(value))
        elif isinstance(value, list | set | deque):
            base = next(base for base in (list, set, deque) if isinstance(value, base))
            self._put_back_by(_restore_items, value, base, list(iter_as(base, value)))
        elif (kept := _kept_by_methods(value)) is not None:
            self._put_back_by(*kept)
        elif not _is_library(type(value).__module__) and hasattr(type(value), "__slots__"):
            self._put_back_by(_restore_slots, value, slots_of(value))

    def _keep_numbers(self, tensor: torch.Tensor) -> None:
        if not tensor.is_meta and id(tensor) not in self._with_numbers:
            self._with_numbers.add(id(tensor))
            with _without_subclass():  # whatever a class of the network's own allows
                before = _own_numbers(tensor).clone()
            self._restorers.append(functools.partial(_restore_numbers, tensor, before))

    def _note_caches(self, put: Callable[[Any, Any, Any], object], holder: Any, held: Mapping[Any, Any]) -> None:
        for name, value in list(held.items()):
            if isinstance(value.__func__ if isinstance(value, staticmethod | classmethod) else value, CACHE):
                self._caches.append((functools.partial(put, holder, name), value))

    def _put_back_by(self, restore: Callable[..., Any], value: Any, *before: Any) -> None:
        self._ids.add(id(value))
        self._restorers.append(functools.partial(restore, value, *before))

    def _reach(self, value: Any) -> Iterable[Any]:
        """What code can reach from an object: what it holds, and for functions and classes what they use."""
        if isinstance(value, nn.Module) and value in self._own:
            # A copy has its own of what torch keeps in every module.
            mine = [part for name, part in vars(value).items() if name not in OF_EVERY_MODULE]
            return [type(value), *value._modules.values(), *mine]
        kind = type(value)
        if kind is types.FunctionType:
            namespace, names = value.__globals__, _names(value.__code__)
            if not _is_library(namespace.get("__name__")):
                self._namespaces.setdefault(id(namespace), (namespace, set()))[1].update(names)
            if _is_library(value.__module__):
                # A function of theirs may stand around one of the network's.
                return contents(value.__closure__ or ())
            held = (*(value.__closure__ or ()), *(value.__defaults__ or ()), value.__kwdefaults__, vars(value))
            return [*held, *self._named(names, namespace, imports=_IMPORT in value.__code__.co_code[::2])]
        if kind is types.CellType:
            return contents([value])
        if kind is types.MethodType:
            return (value.__func__, value.__self__)
        if kind in (staticmethod, classmethod, CACHE):
            return (value.__wrapped__,)
        if kind is property:
            return (value.fget, value.fset)
        if kind in (dict, list, tuple, set, frozenset):
            return parts(value)
        if kind is contextvars.ContextVar:
            return _current(value)
        if isinstance(value, type):
            own = () if _is_library(value.__module__) else tuple(vars(value).values())
            return (*_class(value), *value.__mro__[1:], *own)
        if isinstance(value, logging.Logger | torch.Tensor | types.ModuleType):
            return ()
        if isinstance(value, dict | list | tuple | set | frozenset | deque | functools.partial):
            return (*parts(value), *_class(value), *_dict(value))
        if _is_library(kind.__module__) and kind.__module__ not in _HOLDERS:
            return _dict(value) if isinstance(value, nn.Module) else _functions(value)
        return (*_class(value), *_dict(value), *slots_of(value).values())

    def _named(self, names: list[str], namespace: dict[str, Any], *, imports: bool) -> Iterator[Any]:
        """What the names in a function's code stand for."""
        used = [namespace[name] for name in names if name in namespace]
        used += [sys.modules[name] for name in names if name in sys.modules]  # a function may import what it uses
        if imports:
            used += [sys.modules.get(f"{namespace.get('__package__')}.{name}") for name in names]
        for value in used:
            yield from self._members(value, names) if isinstance(value, types.ModuleType) else [value]

    def _members(self, module: types.ModuleType, names: list[str], depth: int = 3) -> Iterator[Any]:
        if _is_library(module.__name__) or not depth:
            return
        self._namespaces.setdefault(id(vars(module)), (vars(module), set()))[1].update(names)
        for name in names:
            value = vars(module).get(name)
            yield from self._members(value, names, depth - 1) if isinstance(value, types.ModuleType) else [value]


def _class(value: Any) -> tuple[type, ...]:
    return () if _is_library(type(value).__module__) else (type(value),)


def _dict(value: Any) -> tuple[dict[str, Any], ...]:
    found = dict_of(value)
    return () if found is None else (found,)


def _functions(value: Any) -> list[Any]:
    """The functions of others that an object holds, as a loader of data does."""
    held = (dict_of(value) or {}).values()
    return [part for part in held if isinstance(part, types.FunctionType | types.MethodType | functools.partial)]


def _current(variable: contextvars.ContextVar[Any]) -> tuple[Any, ...]:
    try:
        return (variable.get(),)
    except LookupError:
        return ()


@functools.lru_cache(maxsize=4096)
def _is_library(module: str | None) -> bool:
    return str(module or "builtins").partition(".")[0] in _LIBRARIES


def contents(cells: Iterable[types.CellType]) -> list[Any]:
    """What is in the cells of a closure that are filled."""
    return [content for cell in cells if (content := _content(cell)) is not _MISSING]


def kept_by(function: types.FunctionType) -> tuple[Any, ...]:
    """What a function has kept for its next call: in its closure and its default arguments."""
    return (*contents(function.__closure__ or ()), *(function.__defaults__ or ()), function.__kwdefaults__)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return _MISSING


def _names(code: types.CodeType) -> list[str]:
    """The names in a function's code, also those that it may ask for as strings; too many rather than too few."""
    names = list(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names += _names(constant)
        elif isinstance(constant, str) and len(constant) < 100:
            names.append(constant)
    return names


def _emptied(cache: Any) -> Any:
    """The same with nothing in it."""
    if isinstance(cache, staticmethod | classmethod):
        return type(cache)(_emptied(cache.__func__))
    return empty_cache(cache, cache.__wrapped__)


def empty_cache(cache: Any, function: Any) -> Any:
    """A cache as another one is, with nothing in it.

    Args:
        cache: A cache of ``functools``.
        function: The function whose results it is to keep.
    """
    made = functools.lru_cache(**cache.cache_parameters())(function)
    vars(made).update({name: value for name, value in vars(cache).items() if name not in vars(made)})
    return made


def _kept_by_methods(value: Any) -> tuple[Any, ...] | None:
    """How to put back what only its own methods change: how, the object, and what it was."""
    numpy: Any = sys.modules.get("numpy")
    if isinstance(value, random.Random):
        return (type(value).setstate, value, value.getstate())
    if isinstance(value, torch.Generator):
        return (torch.Generator.set_state, value, value.get_state())
    if isinstance(value, io.StringIO | io.BytesIO) and not value.closed:
        return (_restore_stream, value, value.getvalue(), value.tell())
    if isinstance(value, bytearray | array.array):
        return (_restore_slice, value, value[:])
    if numpy is not None:
        if isinstance(value, numpy.ndarray) and value.flags.writeable:
            return (_restore_array, value, value.copy())
        if isinstance(value, numpy.random.RandomState):
            return (numpy.random.RandomState.set_state, value, value.get_state())
        if isinstance(value, numpy.random.Generator):
            return (setattr, value.bit_generator, "state", value.bit_generator.state)
        if isinstance(value, numpy.random.BitGenerator):
            return (setattr, value, "state", value.state)
    return None


def _stays(value: Any) -> bool:
    """Whether something new is a definition, and none that holds a tensor or a module."""
    held = (torch.Tensor, nn.Module)
    return isinstance(value, DEFINITIONS) and not any(isinstance(part, held) for part in walk(value, into=_defined))


def _defined(value: Any) -> Iterable[Any]:
    """What a definition holds."""
    if isinstance(value, types.FunctionType):
        return (*kept_by(value), vars(value))
    if isinstance(value, type):
        return () if _is_library(value.__module__) else tuple(vars(value).values())
    return parts(value) if isinstance(value, dict | list | tuple | set | frozenset) else ()


def _restore_dict(value: dict[Any, Any], before: dict[Any, Any]) -> None:
    base: Any = OrderedDict if isinstance(value, OrderedDict) else dict
    now = dict(dict.items(value))
    for key in now.keys() - before.keys():
        if not _stays(now[key]):
            base.pop(value, key, None)
    for key, content in before.items():
        if now.get(key, _MISSING) is not content:
            base.__setitem__(value, key, content)
    if [*value] != [*before] and value.keys() == before.keys():
        base.clear(value)
        base.update(value, before)


def _restore_names(namespace: dict[str, Any], names: set[str], before: dict[str, Any]) -> None:
    for name in names:
        now = namespace.get(name, _MISSING)
        if name in before and now is not before[name]:
            namespace[name] = before[name]
        elif name not in before and now is not _MISSING and not _stays(now):
            del namespace[name]


def _restore_stream(value: Any, before: Any, position: int) -> None:
    if value.getvalue() != before:
        value.seek(0)
        value.truncate()
        value.write(before)
    value.seek(position)


def _restore_slice(value: Any, before: Any) -> None:
    value[:] = before


def _restore_array(value: Any, before: Any) -> None:
    """Write an array of numpy's if it has changed, as it may be a file."""
    if not sys.modules["numpy"].array_equal(value, before, equal_nan=value.dtype.kind in "fc"):
        value[...] = before


def _restore_items(value: Any, base: Any, before: list[Any]) -> None:
    now = list(iter_as(base, value))
    if len(now) != len(before) or any(one is not other for one, other in zip(now, before, strict=True)):
        if base is list:
            value[:] = before  # at once, because another thread may be reading
        else:
            base.clear(value)
            base.update(value, before) if base is set else base.extend(value, before)


def _restore_slots(value: Any, before: dict[str, Any]) -> None:
    now = slots_of(value)
    for name in now.keys() - before.keys():
        object.__delattr__(value, name)
    for name, content in before.items():
        if now.get(name, _MISSING) is not content:
            object.__setattr__(value, name, content)


def _restore_cell(cell: types.CellType, before: Any) -> None:
    if _content(cell) is not before:
        if before is _MISSING:
            del cell.cell_contents
        else:
            cell.cell_contents = before


def _restore_class(cls: type, before: dict[str, Any]) -> None:
    now = dict(vars(cls))
    for name in now.keys() - before.keys():
        if not _stays(now[name]):
            type.__delattr__(cls, name)
    for name, content in before.items():
        if now.get(name, _MISSING) is not content and not name.startswith("__"):
            type.__setattr__(cls, name, content)


def _state_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Of a tensor, all but its numbers: where they are, whether it requires a gradient, that, and its attributes."""
    with _without_subclass():
        grad = tensor.grad if tensor.is_leaf else None
        return tensor.data, tensor.requires_grad, grad, dict(vars(tensor))


def _restore_tensor(
    tensor: torch.Tensor, data: torch.Tensor, requires_grad: bool, grad: torch.Tensor | None, attributes: Any
) -> None:
    _restore_dict(vars(tensor), attributes)
    with _without_subclass():
        if tensor.is_leaf and tensor.requires_grad != requires_grad:
            tensor.requires_grad_(requires_grad)
        if tensor.is_leaf and tensor.grad is not grad:
            tensor.grad = grad
        if _place(tensor) != _place(data):
            tensor.data = data


def _place(tensor: torch.Tensor) -> Any:
    if tensor.layout != torch.strided or tensor.is_nested:
        return None
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.untyped_storage()._cdata


def _restore_numbers(tensor: torch.Tensor, before: torch.Tensor) -> None:
    with torch.inference_mode(tensor.is_inference()), _without_subclass():
        now = _own_numbers(tensor.data)  # data, as nobody's backward pass counts that as a change
        if not _same_bytes(now, before):
            now.copy_(before)


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors hold the same: what has not changed is not written, as its memory may be read-only."""
    if one.layout != torch.strided or one.is_nested or one.is_quantized:
        return False
    return torch.equal(*(_bytes(tensor) for tensor in (one, other)))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.reshape(-1)
    return (flat if flat.stride(0) == 1 else flat.clone(memory_format=torch.contiguous_format)).view(torch.uint8)


def _own_numbers(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor without the repetitions that ``expand`` makes of its numbers, which cannot be written to."""
    tensor = tensor.detach()
    if tensor.layout != torch.strided or tensor.is_nested:
        return tensor
    return tensor[tuple(slice(1) if stride == 0 else slice(None) for stride in tensor.stride())]
