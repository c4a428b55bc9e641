"""A slice of what ``PYTHONPATH=tests python -m fuzz`` does at length."""

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from fuzz import watching
from fuzz.machine import Surgery
from fuzz.networks import KINDS


class Slice(Surgery):
    kinds = tuple(kind for kind in KINDS if kind != "export")  # which takes half the time


def run(networks, steps=10, phases=(Phase.generate, Phase.shrink)):
    run_state_machine_as_test(
        Slice,
        settings=settings(
            max_examples=networks,
            stateful_step_count=steps,
            derandomize=True,
            deadline=None,
            database=None,
            phases=phases,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_whatever_is_done_to_whatever_network_keeps_what_it_promises():
    run(25)


def test_levels_that_compute_something_else_do_not_go_unnoticed(monkeypatch):
    naive = watching.naive_coconv2d
    monkeypatch.setattr(watching, "naive_coconv2d", lambda *args, **kwargs: 1.001 * naive(*args, **kwargs))
    with pytest.raises(AssertionError, match="outputs are off"):
        run(10, phases=[Phase.generate])
