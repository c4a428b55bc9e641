"""All runs of the study."""

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from evidence import classify, detect, photographs, tries
from evidence.log import once


def runs() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """All runs of the study: name and function."""
    yield "a-photographs", photographs.converted_after_training
    for seed in detect.SEEDS:
        yield f"c-ResNet-{seed}", functools.partial(detect.from_scratch, "ResNet", seed)
        for network in classify.NETWORKS:
            yield f"a-{network}-{seed}", functools.partial(classify.converted_after_training, network, seed)
        yield f"d-{seed}", functools.partial(detect.converted_after_training, seed)
    for seed in classify.SEEDS[len(detect.SEEDS) :]:
        for network in classify.NETWORKS:
            yield f"a-{network}-{seed}", functools.partial(classify.converted_after_training, network, seed)
    for name, attempt in tries.TRIES.items():
        yield f"tries-{name}", attempt
    for seed in detect.SEEDS:
        yield f"c-CoResNet-{seed}", functools.partial(detect.from_scratch, "CoResNet", seed)
    for seed in classify.SEEDS:
        for levels in classify.SCRATCH:
            yield f"b-{levels}-{seed}", functools.partial(classify.from_scratch, levels, seed)


def make(name: str) -> None:
    """Make a run, unless it is logged."""
    warnings.simplefilter("ignore")
    once(name, dict(runs())[name])
