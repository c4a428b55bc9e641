"""Weights of a file, of whatever kind, into a network."""

from pathlib import Path
from typing import Literal

import torch.nn as nn
from timm.models import load_checkpoint

from coconv_surgery.checkpoint import load_converted
from coconv_surgery.checkpoint.origin import plan_if_told
from coconv_surgery.checkpoint.reading import read_checkpoint, weights_in
from coconv_surgery.checkpoint.tensors import check_fit, check_loadable
from coconv_surgery.zoo.authors import is_authors_checkpoint, load_authors_checkpoint


def load(network: nn.Module, file: Path | None) -> Literal["none", "authors", "converted", "plain"]:
    """Load weights, and say of what kind of network they are.

    Raises:
        ValueError: If they do not fit.
    """
    if file is None:
        return "none"
    if is_authors_checkpoint(file):
        load_authors_checkpoint(network, file)
        return "authors"
    if file.suffix in (".npz", ".npy"):
        load_checkpoint(network, str(file))  # of JAX, which timm's networks read by themselves
        return "plain"
    own, content = network.state_dict(), read_checkpoint(file)
    if plan_if_told(content, file, own) is not None:
        load_converted(network, file)
        return "converted"
    weights = weights_in(content, file, own)
    check_loadable(network, weights, file)
    try:
        check_fit(network, own, weights, file)
    except ValueError as error:
        raise ValueError(f"{error}. Build the network as it was trained, as with --arg num_classes=10") from error
    network.load_state_dict(weights)
    return "plain"
