"""The paper's networks. Importing this package registers ``coresnet50`` and its kin with timm."""

from coconv_surgery.zoo.authors import export_authors_state_dict, load_authors_checkpoint, merge_levels
from coconv_surgery.zoo.coresnet import CoResNet

__all__ = ["CoResNet", "export_authors_state_dict", "load_authors_checkpoint", "merge_levels"]
