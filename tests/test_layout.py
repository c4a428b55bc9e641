"""The house: rooms in the order in which they may import from each other, and what the documentation says of them."""

import ast
import re
from pathlib import Path

import pytest

import coconv_surgery

PACKAGE = Path(coconv_surgery.__file__).parent
ROOMS = [
    *("layers", "tracing", "planning", "merging", "calibration", "surgery", "deployment", "checkpoint", "zoo"),
    *(
        "mmengine",
        "classification",
        "generation",
        "mmdet",
        "receptive",
        "viz",
        "sweep",
        "bench",
        "paper",
        "reporting",
        "demo",
        "cli",
    ),
]
# Files of a room, in order.
FILES = {
    "layers": [
        *("arguments", "files", "depthwise", "functional", "levels", "metadata", "conv", "adapters"),
        *("rollback", "switch", "timm_convs"),
    ],
    "tracing": [
        *("convertible", "objects", "operations", "differences", "evaluating", "inputs", "unseen", "surroundings"),
        *("copying", "twin", "leftovers", "visit", "signature", "graph_convs", "graph_weights", "rewriting", "sites"),
        *("finding", "switching", "unrecorded", "dataflow", "readers", "axes", "grids", "writing", "grid_rules"),
        *("following", "weight_reads", "padding", "observer", "fx_map", "trace"),
    ],
    "planning": ["patterns", "reasons", "maps", "policies", "eligibility", "plan", "notes", "copies", "decision"],
    "merging": ["convs", "methods", "plain", "calls", "comparing", "carrying", "blocks"],
    "calibration": [
        *("report", "patches", "moments", "batches", "networks", "parameters", "channels", "arranging", "solving"),
        "calibrating",
    ],
    "deployment": [
        *("report", "forms", "comparing", "kernels", "norms", "graphs", "blocks"),
        *("watching", "checking", "deciding", "deploying", "exporting"),
    ],
    "receptive": ["spots", "rules", "watching", "theoretical", "effective"],
    "generation": [
        *(
            "growth",
            "losses",
            "images",
            "wasserstein",
            "sampling",
            "scores",
            "model",
            "cost",
            "loop",
            "training",
            "__main__",
        ),
    ],
    "checkpoint": [
        *("pickles", "naming", "reading", "tensors", "header", "origin", "converted", "guard", "hub", "timm_loading"),
    ],
}


def imports(path):
    """All modules of the package that a file imports, lazily or not."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def inner(name):
    """Room and file of a module, if it is the package's own."""
    parts = name.split(".")
    if parts[0] != PACKAGE.name or len(parts) < 2:
        return None
    return parts[1], parts[2] if len(parts) > 2 else None


FILES_OF_THE_PACKAGE = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def test_every_room_is_in_the_order():
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES_OF_THE_PACKAGE}
    assert rooms == {*ROOMS, "__main__"}
    for room, files in FILES.items():
        assert {path.stem for path in (PACKAGE / room).glob("*.py")} == {"__init__", *files}


@pytest.mark.parametrize("path", FILES_OF_THE_PACKAGE, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_import_runs_against_the_order(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    room, file = parts[0], parts[-1]
    for name in imports(path):
        if name == PACKAGE.name or (name.startswith(f"{PACKAGE.name}.") and len(name.split(".")) == 1):
            raise AssertionError(f"{path} imports the package itself")
        if (found := inner(name)) is None or found[0] not in ROOMS:
            assert not name.startswith(f"{PACKAGE.name}."), f"{path} imports {name}, of the package itself"
            continue
        other, other_file = found
        assert ROOMS.index(other) <= ROOMS.index(room), f"{path} imports {name}"
        if other == room and room in FILES and file in FILES[room] and other_file in FILES[room]:
            assert FILES[room].index(other_file) < FILES[room].index(file), f"{path} imports {name}"


def test_no_two_files_have_names_that_differ_by_a_letter():
    for folder in {path.parent for path in FILES_OF_THE_PACKAGE}:
        names = sorted(path.stem for path in folder.iterdir() if path.suffix == ".py" or path.is_dir())
        for first in names:
            for second in names:
                assert first == second or first.rstrip("s") != second.rstrip("s"), f"{first} and {second}"


def test_tests_have_the_same_rooms():
    rooms = {path.name for path in Path(__file__).parent.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms <= {*ROOMS, "fuzz"}, "which takes networks through all of them"


def test_the_documentation_shows_the_rooms_in_this_order():
    page = (PACKAGE.parent / "docs" / "contributing.md").read_text()
    section = page.partition("## Architecture")[2].partition("\n## ")[0]
    shown = re.findall(r"`(\w+)(?:/|\.py)`", section)
    assert [room for room in shown if room in ROOMS] == ROOMS
    assert len([line for line in section.splitlines() if line.startswith("|")]) <= 17, "a header, a rule, fifteen lines"
