"""A slice of what ``PYTHONPATH=tests python -m fuzz.files`` does at length."""

import os
import pickle

import pytest
import torch

from fuzz import files
from fuzz.files import try_files


def test_whatever_a_file_holds_it_is_read_or_refused_at_little_cost():
    counts, _, _, failures = try_files(range(300))
    assert not failures
    assert {outcome.partition(":")[0] for outcome in counts} == {"plan", "safetensors", "torch", "config"}


def test_code_that_runs_does_not_go_unnoticed(monkeypatch):
    def read(path):
        with path.open("rb") as file:
            return torch.load(file, weights_only=False)

    monkeypatch.setattr(files, "read_weights", read)
    monkeypatch.setattr(files, "Canary", lambda path: files.Call(os.mkdir, str(path)))
    monkeypatch.setattr(files.Workshop, "_torch", lambda self, rng: pickle_of(self, rng))
    _, _, _, failures = try_files(range(5))
    assert failures


def pickle_of(workshop, rng):
    path = workshop.folder / "made.pth"
    torch.save({"x": files.Canary(workshop.canary)}, path)
    return path.read_bytes()


@pytest.mark.parametrize("error", [KeyError, MemoryError, pickle.UnpicklingError])
def test_another_error_does_not_go_unnoticed(error, monkeypatch):
    def read(path):
        raise error

    monkeypatch.setattr(files, "read_weights", read)
    _, _, _, failures = try_files(range(5))
    assert any(error.__name__ in failure for failure in failures)
