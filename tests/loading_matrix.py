"""Which weights load into which network, by which way: the table of docs/files.md and the test of it."""

import copy
import functools
import warnings
from pathlib import Path

import timm
import torch
import torch.distributed.checkpoint as dcp
from mmengine.runner.checkpoint import load_checkpoint as load_by_mmengine
from safetensors.torch import load_model
from timm.models import load_checkpoint as load_by_timm
from timm.models import save_for_hf

import coconv_surgery as cs
import coconv_surgery.mmengine

PLANS = {"A": "resolution", "B": "uniform(2)"}
SOURCES = ("plain", "reverted", "A", "B")
NETWORKS = ("plain", "A", "B")
SIZE = 96


@functools.lru_cache
def built(kind):
    """A small timm network: plain, converted by one of two plans, or converted and reverted."""
    torch.manual_seed(NETWORKS.index(kind) if kind in NETWORKS else 7)
    model = timm.create_model("test_resnet", num_classes=3).eval()
    if kind in PLANS:
        cs.convert(model, PLANS[kind], input_size=SIZE)
    if kind == "reverted":
        cs.revert(cs.convert(model, PLANS["A"], input_size=SIZE))
    return model


def build(kind):
    """A fresh one, with the same weights each time."""
    return copy.deepcopy(built(kind))


def by_load_state_dict(source, network, folder):
    network.load_state_dict(source.state_dict())


def by_torch_save(source, network, folder):
    torch.save({"state_dict": source.state_dict()}, folder / "net.pth")
    network.load_state_dict(torch.load(folder / "net.pth", weights_only=True)["state_dict"])


def by_timm(source, network, folder):
    torch.save(source.state_dict(), folder / "net.pth")
    load_by_timm(network, str(folder / "net.pth"))


def by_timm_safetensors(source, network, folder):
    cs.save_converted(source, folder / "net.safetensors")
    load_by_timm(network, str(folder / "net.safetensors"))


def by_safetensors(source, network, folder):
    cs.save_converted(source, folder / "net.safetensors")
    load_model(network, folder / "net.safetensors")


def by_safetensors_guarded(source, network, folder):
    cs.save_converted(source, folder / "net.safetensors", guard=True)
    load_model(network, folder / "net.safetensors")


def by_load_converted(source, network, folder):
    cs.save_converted(source, folder / "net.safetensors")
    cs.load_converted(network, folder / "net.safetensors")


def by_mmengine(source, network, folder):
    torch.save({"state_dict": source.state_dict(), "meta": {}}, folder / "net.pth")
    load_by_mmengine(network, str(folder / "net.pth"), map_location="cpu")


def by_dcp(source, network, folder):
    dcp.save(source.state_dict(), checkpoint_id=folder)
    weights = network.state_dict()
    dcp.load(weights, checkpoint_id=folder)
    network.load_state_dict(weights)


def by_dcp_guarded(source, network, folder):
    for model in (source, network):
        if cs.get_plan(model).converted:
            cs.guard(model)
    by_dcp(source, network, folder)


def by_hub_folder(source, network, folder):
    save_for_hf(source, folder, safe_serialization=True, **cs.hub_arguments(source))
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def by_hub_folder_without_arguments(source, network, folder):
    save_for_hf(source, folder, safe_serialization=True)
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


WAYS = {
    "`load_state_dict(state_dict())`": by_load_state_dict,
    "`torch.save`, `torch.load`, `load_state_dict`": by_torch_save,
    "timm's `load_checkpoint`, `checkpoint_path=`, of a `torch.save` file": by_timm,
    "the same of a `save_converted` file": by_timm_safetensors,
    "`safetensors.torch.load_model`": by_safetensors,
    "the same of `save_converted(..., guard=True)`": by_safetensors_guarded,
    "`load_converted`": by_load_converted,
    "mmengine's `load_checkpoint`: runners, `init_detector`, `DetInferencer`": by_mmengine,
    "`torch.distributed.checkpoint`": by_dcp,
    "the same of networks with a guard, `guard(model)`": by_dcp_guarded,
    "a hub folder with `hub_arguments`": by_hub_folder,
    "a hub folder without": by_hub_folder_without_arguments,
}


def outcome(load, source, kind, folder):
    """What becomes of weights of one network in another.

    Returns:
        ``right``: the network computes what the source does; ``converts``: it does, as it became what the source is;
        ``warns``: it does not, and a warning said so; ``raises``; or ``wrong``: it computes something else without a
        word.
    """
    Path(folder).mkdir(parents=True)
    model, network = build(source), build(kind)
    before = cs.get_plan(network)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            network = load(model, network, Path(folder)) or network
        except (RuntimeError, ValueError, dcp.CheckpointException):
            return "raises"
    image = torch.randn(1, 3, SIZE, SIZE)
    if torch.equal(network(image), model(image)):
        return "converts" if cs.get_plan(network).diff(before) else "right"
    return "warns" if any(issubclass(warning.category, cs.PlainWeightsWarning) for warning in caught) else "wrong"
