"""A slice of what ``PYTHONPATH=tests python -m fuzz.files`` does at length."""

import os
import pickle

import pytest

from fuzz import files
from fuzz.files import try_files


def test_whatever_a_file_holds_it_is_read_or_refused_at_little_cost():
    counts, _, _, failures = try_files(range(300))
    assert not failures
    assert {outcome.partition(":")[0] for outcome in counts} == {"plan", "safetensors", "torch", "config"}


def test_code_that_runs_does_not_go_unnoticed(monkeypatch):
    def write(workshop, rng):
        return pickle.dumps(files.Call(os.mkdir, str(workshop.canary)))

    monkeypatch.setattr(files.Workshop, "_torch", write)
    monkeypatch.setattr(files, "read_weights", lambda path: pickle.loads(path.read_bytes()))
    _, _, _, failures = try_files(range(20))
    assert any("code was executed" in failure for failure in failures)


@pytest.mark.parametrize("error", [KeyError, MemoryError, pickle.UnpicklingError])
def test_another_error_does_not_go_unnoticed(error, monkeypatch):
    def read(path):
        raise error

    monkeypatch.setattr(files, "read_weights", read)
    _, _, _, failures = try_files(range(20))
    assert any(error.__name__ in failure for failure in failures)
