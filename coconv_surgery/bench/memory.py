"""Peak memory of a training step."""

import multiprocessing
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from coconv_surgery.bench.heap import return_freed_memory
from coconv_surgery.bench.speed import CONTENDERS, SUBJECTS, Case, cases, contender, prepare


class Peak(NamedTuple):
    """Peak memory of a training step, over that of the plain network.

    Attributes:
        network: The network and its memory format.
        coconv: The ratio of the contextual network.
        authors: The ratio of the network in the authors' layout.
    """

    network: str
    coconv: float
    authors: float


def measure_memory(subjects: Iterable[str], device: torch.device) -> list[Peak]:
    """Measure the peak memory of a training step in single precision.

    Args:
        subjects: Names of networks.
        device: Where to compute.

    Returns:
        The peaks of each network in each memory format.
    """
    peaks = []
    for case in cases(subjects, ("eager",)):
        if case.mode == "train" and case.precision == "fp32":
            plain, coconv, authors = (peak_mib(case, which, device) for which in CONTENDERS)
            peaks.append(Peak(f"{case.subject}, {case.layout}", coconv / plain, authors / plain))
    return peaks


def peak_mib(case: Case, which: str, device: torch.device) -> float:
    """Measure the peak memory of building a model and running two steps, in MiB, in a process of its own.

    On the CPU it is what the process grows by, on CUDA what torch allocates.

    Args:
        case: The case.
        which: ``"plain"``, ``"coconv"`` or ``"authors"``.
        device: Where to compute.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        return executor.submit(_peak_mib, case, which, device.type, torch.get_num_threads()).result()


def _peak_mib(case: Case, which: str, device_type: str, threads: int) -> float:
    torch.set_num_threads(threads)
    return_freed_memory()
    device = torch.device(device_type)
    torch.nn.functional.conv2d(torch.zeros(1, 1, 3, 3, device=device), torch.zeros(1, 1, 3, 3, device=device))
    before = high_water_mib()
    subject = SUBJECTS[case.subject]
    call = prepare(contender(subject, which), subject, case, device)
    call()
    call()
    if device_type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return high_water_mib() - before


def high_water_mib() -> float:
    """Peak resident memory of this process so far, in MiB."""
    # getrusage() would include the peak of the process that started this one.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))) / 1024
