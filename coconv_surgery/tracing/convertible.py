"""Networks that cannot be converted, calibrated or deployed, told before anything else is tried."""

from types import FunctionType

import torch
import torch.nn as nn
from torch.nn.modules.lazy import LazyModuleMixin

from coconv_surgery.layers.arguments import instance

_WRAPPERS = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "OptimizedModule": "_orig_mod",
}
# What torch.distributed mixes into a module's class where it is, and which of its functions does.
_MIXED_IN = {"FSDPModule": "fully_shard()", "ReplicateModule": "replicate()", "DDP": "replicate()"}


def check_convertible(model: nn.Module) -> None:
    """Check that a network's convolutions can be switched where they are.

    Raises:
        TypeError: If it is not a module, or holds one that is wrapped, sharded, scripted, unflattened after an export,
            or has a replaced forward.
        ValueError: If it holds a lazy module without weights.
    """
    instance(model, "model", nn.Module, "a torch.nn.Module")
    for name, module in model.named_modules():
        path = path_of(name)
        for cls in type(module).__mro__:
            if cls.__name__ in _WRAPPERS:
                raise TypeError(
                    f"{path} is wrapped in {type(module).__name__}: give {path}.{_WRAPPERS[cls.__name__]} instead, "
                    "best before it is wrapped"
                )
            if cls.__name__ in _MIXED_IN and cls.__module__.startswith("torch.distributed."):
                raise TypeError(
                    f"{path} is a {type(module).__name__}: {_MIXED_IN[cls.__name__]} has changed its class. Do this "
                    "to the network before, and distribute it then"
                )
        check_unsharded(module, path, "do this to the network before it is sharded")
        if getattr(module, "_is_fsdp_managed_module", False):
            raise TypeError(
                f"{path} is sharded, by FullyShardedDataParallel or fully_shard(): do this to the network before that"
            )
        replaced = isinstance(vars(module).get("forward"), FunctionType)
        if replaced and any(isinstance(child, nn.Conv2d) for child in module.modules() if child is not module):
            raise TypeError(
                f"the forward of {path} was replaced by a function, which a copy of it would share: do this to "
                "the network before its forward is replaced (or compiled)"
            )
        if type(module).__module__ == "torch.export.unflatten":
            raise TypeError(
                f"{path} was made by torch.export.unflatten(), from whose graphs nothing is read: do this before the "
                "export, or to what the exported program's module() returns"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(f"{path} is scripted, its convolutions are compiled in: do this before torch.jit")
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]
            raise ValueError(
                f"{path} is a lazy {type(module).__name__} without weights yet: run the network once first"
            )


def check_unsharded(module: nn.Module, path: str, remedy: str) -> None:
    """Check that a module's own weights are whole.

    Args:
        module: The module.
        path: What a message calls it.
        remedy: What to do if they are not.

    Raises:
        TypeError: If this process holds a part of one.
    """
    for name, parameter in module._parameters.items():
        if any(cls.__name__ == "DTensor" for cls in type(parameter).__mro__):
            raise TypeError(f"{path}.{name} is a DTensor, of which this process has a shard: {remedy}")


def path_of(name: str) -> str:
    """A module's qualified name as a message shows it; that of the network itself is empty."""
    return f"model.{name}" if name else "model"
