"""Receptive fields: what each convolution can see, and what it responds to."""

from coconv_surgery.receptive.effective import EffectiveField, effective_receptive_field
from coconv_surgery.receptive.theoretical import FieldReport, LayerField, receptive_fields

__all__ = ["EffectiveField", "FieldReport", "LayerField", "effective_receptive_field", "receptive_fields"]
