"""What the tests of sweeps share: processes that begin where timm has been imported."""

import pytest
from launching import bare

from coconv_surgery.sweep import walk


@pytest.fixture(autouse=True)
def _processes_are_forked_off_one_that_has_imported_timm(monkeypatch):
    context = bare()
    monkeypatch.setattr(walk.multiprocessing, "get_context", lambda method: context)
