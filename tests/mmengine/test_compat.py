"""Repairs of mmengine's releases."""

import io

import mmengine.dist.utils as dist_utils
import mmengine.model.efficient_conv_bn_eval as conv_bn_eval
import pytest
import torch
from mmengine.logging.history_buffer import HistoryBuffer

from coconv_surgery.mmengine import compat


class Reads:
    """Pickles as a call of getattr."""

    def __init__(self, owner, name):
        self.owner, self.name = owner, name

    def __reduce__(self):
        return getattr, (self.owner, self.name)


def reload(content):
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_applying_the_repairs_again_changes_nothing():
    before = conv_bn_eval.turn_on_efficient_conv_bn_eval_for_single_model, dist_utils._init_dist_pytorch
    compat.apply()
    assert (conv_bn_eval.turn_on_efficient_conv_bn_eval_for_single_model, dist_utils._init_dist_pytorch) == before


def test_the_launcher_is_upstreams_for_other_backends(monkeypatch):
    calls = []
    monkeypatch.setattr(
        compat, "_upstream_init_dist_pytorch", lambda backend, **options: calls.append((backend, options))
    )
    dist_utils.init_dist("pytorch", backend="nccl")
    assert calls == [("nccl", {"init_backend": "torch"})]


def test_the_safe_loader_reads_a_log_history():
    history = HistoryBuffer([0.5, 0.25], [1, 2])
    again = reload({"loss": history})["loss"]
    assert again.data[0].tolist() == [0.5, 0.25]
    assert again.mean() == history.mean()


@pytest.mark.parametrize(("owner", "name"), [(str, "upper"), (HistoryBuffer, "__init__"), (HistoryBuffer, "update")])
def test_the_safe_loader_reads_no_other_attribute(owner, name):
    with pytest.raises(Exception, match=r"only refer to the statistics|Unsupported global|not allowed"):
        reload(Reads(owner, name))
