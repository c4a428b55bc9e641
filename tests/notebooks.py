"""Run the notebooks of docs/notebooks/ and keep what they print and draw.

    PYTHONPATH=tests python -m notebooks

runs all of them, in an empty folder each, and stores their outputs; ``make notebooks`` does so.
"""

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
PAGES = sorted(FOLDER.glob("*.ipynb"))


def read(path):
    """The notebook of a file."""
    return nbformat.read(path, as_version=4)


def execute(path):
    """The notebook of a file, with the outputs of a run in an empty folder."""
    notebook = read(path)
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        client = NotebookClient(notebook, timeout=600, resources=resources, record_timing=False)
        # Threads that spin while they wait cost several times the work where others work too.
        return client.execute(env=os.environ | {"OMP_NUM_THREADS": "1"})


def store(path):
    """Run a notebook and write it with its outputs, less what differs from machine to machine."""
    notebook = execute(path)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]  # warnings
    for folder in (sys.prefix, tempfile.gettempdir()):
        assert folder not in printed(notebook), f"{path} shows a path of this machine"
    path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")


def printed(notebook):
    """All text of a notebook's outputs."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)


if __name__ == "__main__":
    for page in [Path(name) for name in sys.argv[1:]] or PAGES:
        store(page)
        print(page.name)
