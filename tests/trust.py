"""Write docs/trust.md: each promise, the tests that keep it, and how many cases of them passed.

    PYTHONPATH=tests python -m trust report.xml

where ``pytest --junitxml report.xml`` wrote the report; ``make trust`` does both.
"""

import platform
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import timm
import torch

ROOT = Path(__file__).parents[1]
# A promise, and the files, or files and beginnings of test names, that keep it.
PROMISES = {
    "A conversion computes what Eqs. 1 to 3 say, in every mode of torch": [
        "layers.test_conv",
        "layers.test_modes",
        "layers.test_depthwise",
    ],
    "Weights, names, optimizer state, hooks and flags survive a conversion": ["test_surgery", "layers.test_conv_torch"],
    "What is interrupted leaves no trace": ["test_all_or_nothing"],
    "Planning touches nothing: no weight, hook, mode, cache, random number or other thread": [
        *("tracing.test_copying", "tracing.test_leaves_nothing", "tracing.test_unseen"),
    ],
    "What planning cannot see it leaves alone": [
        *("tracing.test_dataflow", "tracing.test_padding", "tracing.test_weight_reads"),
    ],
    "Graphs are rewritten node by node, and reverted to the code they had": ["tracing.test_graphs"],
    "Any network, any order of operations": ["fuzz.test_fuzz"],
    "Every bad argument is one message that names it": ["test_arguments"],
    "Weights of other levels do not load": ["layers.test_metadata", "mmdet.test_loading", "mmdet.test_hooks"],
    "Every way of loading does what docs/files.md says": ["checkpoint.test_loading"],
    "A file tells how its network was converted": ["checkpoint.test_origin", "checkpoint.test_guard"],
    "A file holds all that a state dict holds, and is written whole or not at all": ["checkpoint.test_converted"],
    "Folders of the hub rebuild the converted network": ["checkpoint.test_hub", "test_where_networks_live"],
    "A hostile file costs a second and 100 MB at most, and executes nothing": [
        "checkpoint.test_reading",
        "fuzz.test_files",
    ],
    "Training goes on after a kill at any moment": ["mmdet.test_kills"],
    "Other surgery on top is right or refused": ["test_together_with", "test_two_ranks"],
    "Merged blocks keep their levels": ["test_merging"],
    "Channels change places where that changes nothing, kernels are those of least squares": [
        *("calibration.test_channels", "calibration.test_solving"),
    ],
    "A trained network that is calibrated keeps what it learnt, or stays as it was": [
        *("calibration.test_calibrating", "mmdet.test_calibration"),
    ],
    "A deployed network is of plain layers, and computes what the network computes": [
        *("deployment.test_deploying", "deployment.test_exporting", "mmdet.test_deployment"),
    ],
    "ProGAN is the reference implementation's, and grows and converts alike": [
        "zoo.test_progan",
        "generation.test_configs",
    ],
    "A GAN's training is a function of its seed and the images seen: stopped, resumed, shared among processes": [
        *("generation.test_training", "generation.test_growth", "generation.test_images"),
    ],
    "Losses and scores of GANs are those of their papers": [
        *("generation.test_losses", "generation.test_wasserstein", "generation.test_scores"),
    ],
    "Every block of code in the documentation runs": ["test_docs"],
    "Exporters, scripters, quantisers and counters take it": [
        "deployment.test_exporters",
        "deployment.test_quantisers",
    ],
}
LONG = {
    "make fuzz": "random networks, random operations",
    "make fuzz-files": "damaged and hostile files",
    "make test-long": "the rest of every sample, training under twenty kills, two hundred networks and all detectors "
    "deployed, both GANs",
    "coconv sweep timm, mmdet, torchvision, transformers": "every network: [coverage](coverage/index.md)",
}


def passed(report):
    """How many cases passed and did not, by test file."""
    counts = Counter()
    for case in ET.parse(report).iter("testcase"):
        kept = not any(child.tag in ("failure", "error", "skipped") for child in case)
        counts[case.get("classname").removeprefix("tests."), kept] += 1
    return counts


def render(report):
    """The page."""
    counts = passed(report)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    lines = [
        "# What is promised, and how it is tested",
        "",
        f"Made by `make trust` at commit {commit.stdout.strip()}, Python {platform.python_version()}, torch "
        f"{torch.__version__.partition('+')[0]}, timm {timm.__version__}, on {platform.machine()}.",
        "",
        "| promise | tests | cases passed | not |",
        "|---|---|---|---|",
    ]
    for promise, files in PROMISES.items():
        kept, broken = (sum(counts[file, outcome] for file in files) for outcome in (True, False))
        assert kept, f"no case of {files} is in {report}"
        names = ", ".join(f"`tests/{file.replace('.', '/')}.py`" for file in files)
        lines.append(f"| {promise} | {names} | {kept} | {broken} |")
    total = sum(counts.values())
    lines += ["", f"{total:,} cases in all, doctests among them.", "", "By commands of their own:", ""]
    lines += [f"- `{command}`: {what}" for command, what in LONG.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "trust.md").write_text(render(sys.argv[1]), encoding="utf-8")
