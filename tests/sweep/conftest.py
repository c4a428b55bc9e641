"""What the tests of sweeps share: processes that begin where timm has been imported."""

import multiprocessing

import pytest

from coconv_surgery.sweep import walk


@pytest.fixture(autouse=True)
def _processes_are_forked_off_one_that_has_imported_timm(monkeypatch):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["timm"])
    monkeypatch.setattr(walk.multiprocessing, "get_context", lambda method: context)
