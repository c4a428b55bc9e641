"""A script run as it is, with every network that it makes converted as it is made."""

import builtins
import functools
import importlib.util
import inspect
import mmap
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from importlib.abc import InspectLoader
from multiprocessing.util import Finalize, register_after_fork
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import timm
import torch.nn as nn
from timm.models import load_checkpoint

from coconv_surgery.cli.targets import factory_of, is_factory
from coconv_surgery.layers.arguments import kind, shown
from coconv_surgery.planning.plan import Plan
from coconv_surgery.surgery import NoChangeWarning, get_plan

Maker = Callable[..., nn.Module]
# What scripts call the option by which they are told where to write.
_FOLDERS = ("output", "output-dir", "outdir", "work-dir", "save-dir", "log-dir")


def check_command(command: Sequence[str]) -> None:
    """Check that there is something to run.

    Args:
        command: As it would follow ``python``.

    Raises:
        ValueError: If it names no module, or none that there is.
        FileNotFoundError: If there is no such script.
    """
    script, *arguments = command
    if script == "-m":
        if not arguments:
            raise ValueError("-m: give a module, as in -m package.train")
        sys.path.insert(0, os.getcwd())
        try:
            if importlib.util.find_spec(arguments[0].partition(".")[0]) is None:
                raise ValueError(f"there is no module {shown(arguments[0])}")
        finally:
            sys.path.pop(0)
    elif not os.path.isfile(script):
        raise FileNotFoundError(f"there is no script {shown(script)}: give its path, or -m and a module")


def run(command: Sequence[str]) -> None:
    """Run a script, or ``-m`` and a module, with its arguments, as ``python`` would.

    Args:
        command: As of :func:`check_command`.
    """
    script, *arguments = command
    if script == "-m":
        sys.path[0] = os.getcwd()
        main, code = _module(arguments[0])
        sys.argv = [str(main.__file__), *arguments[1:]]
    else:
        path = Path(script).absolute()
        sys.path[0] = str(path.resolve().parent)
        main, code = ModuleType("__main__"), compile(path.read_bytes(), path, "exec")
        main.__file__, sys.argv = str(path), list(command)
    # runpy would take the module away at the end, when whatever runs at exit may want it.
    main.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = main
    exec(code, main.__dict__)


def _module(name: str) -> tuple[ModuleType, CodeType]:
    """A module, or the one that runs a package, as ``python -m`` takes it, and its code."""
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.submodule_search_locations is not None:
        spec = importlib.util.find_spec(f"{name}.__main__")
    code = spec.loader.get_code(spec.name) if spec and isinstance(spec.loader, InspectLoader) else None
    if spec is None or code is None:
        sys.exit(f"coconv: there is no module {shown(name)} to run")
    main = importlib.util.module_from_spec(spec)
    main.__name__ = "__main__"
    return main, code


class Converting:
    """Converts what ``timm.create_model`` and ``torchvision.models.get_model`` make.

    Plans are written by the first process of a distributed run alone.

    Args:
        change: Converts a network in place.
        folder: Where plans are written, once it is there; if it never comes, the current folder has them at the end.
            None where nobody wants them.
        names: Patterns of the names of networks that are converted, which may then be made by functions of these names
            as well, such as ``torchvision.models.resnet50``, or functions of one's own, as ``package.module:function``.
            Default: all, of those that are made by name.

    Attributes:
        count: How many contextual networks this process has made.
        passed_over: Names by which networks were made that no pattern matches.
    """

    def __init__(
        self, change: Callable[[nn.Module], nn.Module], folder: Path | None, names: Sequence[str] = ()
    ) -> None:
        self.count = 0
        self.passed_over: list[str] = []
        self._change, self._names = change, names
        self._folder = None if folder is None else folder.absolute()  # the script may go elsewhere
        self._at = threading.local()
        self._pending: dict[str, Plan] = {}
        self._shared = mmap.mmap(-1, 1)  # with processes that are forked off
        register_after_fork(self, Converting._enter_child)

    @property
    def found_any(self) -> bool:
        """Whether this process, or one that was forked off, has made a contextual network."""
        return self._shared[0] > 0

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Within, networks are converted as they are made, whoever imports what makes them, and from where.

        Raises:
            ValueError: If a function of one's own cannot be imported.
            TypeError: If it is none.
        """
        others: dict[Callable[..., Any], Callable[..., Any]] = {}
        for make_by_name, function_of, names in _libraries():
            others |= {make_by_name: self.converting(make_by_name), function_of: self._converting_of(function_of)}
            if self._names:  # else a script's teachers, losses and scores would be taken for its network
                others |= {(make := function_of(name)): self.converting(make, name) for name in names()}
        others |= {(make := _own(name)): self.converting(make, name) for name in self._names if is_factory(name)}
        try:
            with _replaced(others):
                yield
        finally:
            self._write_all()

    def _enter_child(self) -> None:
        """Let a process that ``multiprocessing`` has forked off write its own plans when it ends."""
        self._pending.clear()
        Finalize(None, self._write_all, exitpriority=0)

    def _converting_of(self, function_of: Callable[..., Maker]) -> Callable[..., Maker]:
        """What gives the function of a name, whose networks are converted."""
        converting = functools.cache(self.converting)  # the same function for the same name, as the library gives it

        @functools.wraps(function_of)
        def found(*args: Any, **kwargs: Any) -> Maker:
            make = function_of(*args, **kwargs)
            if getattr(self._at, "asks", False):  # what makes a network by its name, and has passed it over
                self._at.asks = False
                return make
            return converting(make, str(next(iter((*args, *kwargs.values())))))

        return found

    def converting(self, make: Maker, name: str | None = None) -> Maker:
        """What makes a converted network as ``make`` makes a plain one; a file of weights is loaded once it is.

        Args:
            make: Makes a network.
            name: The network's name. Default: the first argument.
        """
        # Around some functions of torchvision there are others, which take what they do not.
        signature = inspect.signature(make, follow_wrapped=False)

        @functools.wraps(make)
        def made(*args: Any, **kwargs: Any) -> nn.Module:
            if getattr(self._at, "is_within", False):  # another maker, whose network will be converted
                return make(*args, **kwargs)
            given = signature.bind(*args, **kwargs)
            called = name or str(next(iter(given.arguments.values())))
            if not any(fnmatchcase(called, pattern) for pattern in self._names or ("*",)):
                self.passed_over.append(called)
                self._at.asks = name is None
                try:
                    return make(*args, **kwargs)
                finally:
                    self._at.asks = False
            checkpoint = given.arguments.pop("checkpoint_path", None)
            self._at.is_within = True
            try:
                network = make(*given.args, **given.kwargs)
                changed = self._convert(network, called)
            finally:
                self._at.is_within = False
            if checkpoint:
                load_checkpoint(network, checkpoint)
            elif changed and any(value for key, value in _flat(given).items() if key in ("pretrained", "weights")):
                _say(f"{called}: its weights were trained in plain convolutions; fine-tune it")
            return network

        return made

    def _convert(self, network: nn.Module, name: str) -> bool:
        """Convert a network that is plain, if it can be.

        Returns:
            Whether it was changed.
        """
        if (plan := get_plan(network)).converted:
            _say(f"{name} is contextual already, and stays as it is")
            self._keep(plan, name)
            return False
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", NoChangeWarning)  # which is said below
                self._change(network)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if not (plan := get_plan(network)).converted:
            _say(f"{name} has no convolution to convert, and stays plain: {plan.summary()}")
            return False
        _say(f"{name}, converted by {plan.policy} for {plan.input}\n{plan}")
        self._keep(plan, name)
        return True

    def _keep(self, plan: Plan, name: str) -> None:
        self.count += 1
        self._shared[0] = 1
        number = f"-{self.count}" if self.count > 1 else ""
        self._pending[re.sub(r"[^\w.-]+", "-", f"coconv-plan-{name}") + f"{number}.json"] = plan
        if self._folder is not None and self._folder.is_dir():
            self._write(self._folder)

    def _write_all(self) -> None:
        if self._folder is not None:
            self._write(self._folder if self._folder.is_dir() else Path())

    def _write(self, folder: Path) -> None:
        while self._pending:
            name, plan = self._pending.popitem()
            if _is_first():
                path = _free(folder / name, plan.to_json())
                plan.to_json(path)
                _say(f"plan: {path}")


def _free(path: Path, content: str) -> Path:
    """A file's path, with a number where an earlier run has written something else there."""
    stem, number = path.stem, 1
    while path.exists() and path.read_text(encoding="utf-8").strip() != content.strip():
        number += 1
        path = path.with_stem(f"{stem}-{number}")
    return path


def output_folder(command: Sequence[str]) -> Path:
    """Where a script was told to write, by an option such as ``--output`` or ``--work-dir``; else the current folder.

    >>> str(output_folder(["train.py", "data", "--output_dir=runs/1"]))
    'runs/1'
    """
    found = Path()
    for word, following in zip(command, [*command[1:], ""], strict=True):
        option, equals, value = word.partition("=")
        if option.startswith("--") and option[2:].replace("_", "-") in _FOLDERS:
            found = Path(value if equals else following)
    return found


def _flat(given: inspect.BoundArguments) -> dict[str, Any]:
    """Arguments by name, those of ``**kwargs`` as well."""
    named = dict(given.arguments)
    for name, parameter in given.signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            named.update(named.pop(name, {}))
    return named


def _is_first() -> bool:
    return (os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0").strip() == "0"


def _say(line: str) -> None:
    if _is_first():
        print(f"coconv: {line}", file=sys.stderr)


def _libraries() -> list[tuple[Maker, Callable[[str], Maker], Callable[[], list[str]]]]:
    """Of each library: what makes a network by its name, what gives the function of a name, and what lists names."""
    found = [(timm.create_model, timm.models.model_entrypoint, timm.list_models)]
    try:
        from torchvision.models import get_model, get_model_builder, list_models
    except ImportError:
        return found
    return [*found, (get_model, get_model_builder, list_models)]


def _own(name: str) -> Maker:
    make = factory_of(name)
    if type(make) is not FunctionType:
        raise TypeError(f"--network {name} is not a function, but {kind(make)}: name a function that makes the network")
    return make


@contextmanager
def _replaced(others: Mapping[Callable[..., Any], Callable[..., Any]]) -> Iterator[None]:
    """Within, functions are others, under every name that a module has for them."""
    held = [
        (module, name, value)
        for module in list(sys.modules.values())
        if issubclass(type(module), ModuleType)
        for name, value in list(vars(module).items())
        if type(value) is FunctionType and value in others  # asking others for their class may wake them
    ]
    for module, name, value in held:
        setattr(module, name, others[value])
    try:
        yield
    finally:
        for module, name, value in held:
            setattr(module, name, value)
