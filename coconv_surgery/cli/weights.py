"""Weights of a file, of whatever kind, into a network."""

from pathlib import Path
from typing import Literal

import torch.nn as nn
from timm.models import load_checkpoint, load_state_dict

from coconv_surgery.checkpoint import load_converted, plan_of
from coconv_surgery.checkpoint.tensors import check_fit
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
    of_jax = file.suffix in (".npz", ".npy")  # which timm's networks read by themselves
    if not of_jax and plan_of(file) is not None:
        load_converted(network, file)
        return "converted"
    if not of_jax:
        try:
            check_fit(network, network.state_dict(), load_state_dict(str(file), weights_only=True), file)
        except ValueError as error:
            raise ValueError(f"{error}. Build the network as it was trained, as with --arg num_classes=10") from error
    load_checkpoint(network, str(file), weights_only=True)
    return "plain"
