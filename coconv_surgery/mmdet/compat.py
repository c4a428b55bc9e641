"""Faults of MMDetection releases on a current stack, repaired on import.

Every repair states its source and when it can be deleted, does nothing where upstream has fixed the fault, and may be
applied again. Those of mmengine are in :mod:`coconv_surgery.mmengine.compat`.
"""

from mmdet.models.dense_heads import SSDHead


def apply() -> None:
    """Apply all repairs."""
    give_ssd_head_loss_cls()


def give_ssd_head_loss_cls() -> None:
    """Let SSD predict.

    ``BaseDenseHead._predict_by_feat_single`` reads ``self.loss_cls``, which ``SSDHead`` never sets: ``AttributeError:
    'SSDHead' object has no attribute 'loss_cls'`` at the first validation. It only asks whether that loss has
    a number of classes of its own; None says no.

    Source: mmdet 3.2.0 and 3.3.0; mmdetection issues 11063, 11305, 11780.
    Delete it when the oldest mmdet supported has mmdetection pull request 11524, or another repair.
    """
    if not hasattr(SSDHead, "loss_cls") and "loss_cls" not in SSDHead.__init__.__code__.co_names:
        SSDHead.loss_cls = None
