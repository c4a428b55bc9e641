"""Which weights load into which network: every cell of the tables in docs/files.md."""

import re
from pathlib import Path

import pytest
from loading_matrix import NETWORKS, SOURCES, WAYS, outcome

PAGE = (Path(__file__).parents[2] / "docs" / "files.md").read_text()


def documented():
    """The cells of all tables: by way, source and network."""
    cells = {}
    for title, table in re.findall(r"^### (.+)\n\n((?:\|.+\n)+)", PAGE, re.M):
        header, _, *rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines()]
        cells |= {
            (title, row[0], network): cell.strip("*")
            for row in rows
            for network, cell in zip(header[1:], row[1:], strict=True)
        }
    return cells


CELLS = documented()


def test_there_is_a_table_for_every_way():
    assert CELLS.keys() == {(way, source, network) for way in WAYS for source in SOURCES for network in NETWORKS}


@pytest.mark.parametrize(("way", "source", "network"), CELLS)
def test_weights_load_as_documented(way, source, network, tmp_path):
    assert outcome(WAYS[way], source, network, tmp_path / "files") == CELLS[way, source, network]
