"""Together with torch.distributed, in two real processes."""

import pytest
import two_ranks


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    return two_ranks.run(tmp_path_factory.mktemp("two_ranks"))


@pytest.mark.parametrize("check", [check.__name__ for check in two_ranks.CHECKS])
def test_two_processes(failures, check):
    assert not failures[check], failures[check]
