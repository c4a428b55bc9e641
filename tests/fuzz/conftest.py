"""What the fuzzers measure is theirs alone."""

import gc

import pytest


@pytest.fixture(autouse=True)
def _what_other_tests_left_is_not_looked_at():
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
