"""What the tests of the paper's networks share: the command line."""

import sys

import pytest

from coconv_surgery.cli import main


@pytest.fixture
def coconv(monkeypatch, capsys):
    """Run the command in this process: what it exits with, and what it prints."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["coconv", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return run
