"""Training of ProGAN and CoProGAN through MMEngine.

In a config::

    custom_imports = dict(imports=['coconv_surgery.generation.training'], allow_failed_imports=False)

registers the model ``ProGAN``, the data sets ``FolderImages`` and ``CIFAR10Images``, the loop ``GrowingTrainLoop``, the
optimizers' constructor ``EachNetworkConstructor`` and the hooks ``FiniteWeightsHook`` and ``SampleGridHook``, besides
what :mod:`coconv_surgery.mmengine` does. ``configs/progan/`` has those of the paper;
``python -m coconv_surgery.generation`` runs them, and so does mmdet's ``tools/train.py``.
"""

import coconv_surgery.mmengine  # noqa: F401 (first: where mmengine is missing, it says what to install)

# isort: split
from coconv_surgery.generation.loop import EachNetworkConstructor, FiniteWeightsHook, GrowingTrainLoop, SampleGridHook
from coconv_surgery.generation.model import ProGAN

__all__ = ["EachNetworkConstructor", "FiniteWeightsHook", "GrowingTrainLoop", "ProGAN", "SampleGridHook"]
