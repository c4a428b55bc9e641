"""What a conversion costs: seconds to plan and to convert, and peak memory over the network's weights.

python benchmarks/surgery.py [MODEL ...]
"""

import argparse
import platform
import resource
import statistics
import subprocess
import sys
import time

import timm
import torch

import coconv_surgery as cs
from coconv_surgery.plan import align

MODELS = ["resnet18", "resnet50", "resnet152", "efficientnet_b0", "hrnet_w48"]


def peak_mib() -> float:
    """Peak resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(name: str, repeats: int) -> None:
    """Print one line: convs, median seconds to plan and to convert, peak memory before and after."""
    with torch.device("meta"):
        cs.plan_conversion(timm.create_model("resnet18"))  # imports and caches of torch
    model = timm.create_model(name)
    before = peak_mib()
    cs.revert(cs.convert(model))
    after = peak_mib()
    plan_seconds, convert_seconds = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        plan = cs.plan_conversion(model)
        plan_seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
        cs.convert(model)
        convert_seconds.append(time.perf_counter() - start)
        cs.revert(model)
    weights = sum(tensor.nbytes for tensor in model.state_dict().values()) / 2**20
    medians = (statistics.median(seconds) for seconds in (plan_seconds, convert_seconds))
    print(
        name, len(plan.rows), *(f"{m:.2f}" for m in medians), f"{weights:.0f}", f"{1 + (after - before) / weights:.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        measure(arguments.models[0], arguments.repeats)
        return
    rows = [("model", "convs", "plan s", "convert s", "weights MiB", "peak / weights")]
    for name in arguments.models:
        # A process for each, because peak memory never falls.
        command = [sys.executable, __file__, name, "--one", "--repeats", str(arguments.repeats)]
        rows.append(tuple(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()))
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}"
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, {versions}; medians of {arguments.repeats}")
    print(align(rows))


if __name__ == "__main__":
    main()
