"""The Importance-Aware Loss for semantic segmentation (Chen, Gong and Yang, IJCAI 2017) in fused kernels."""

from .class_weights import median_frequency_weights
from .functional import Components, cross_entropy, importance_aware_loss
from .gradient_memory import keep_gradient_memory, release_gradient_memory
from .hierarchy import CAMVID, CITYSCAPES, Hierarchy
from .modules import CrossEntropyLoss, ImportanceAwareLoss
from .validation import validate_target

__version__ = "0.1.0"

__all__ = [
    "CAMVID",
    "CITYSCAPES",
    "Components",
    "CrossEntropyLoss",
    "Hierarchy",
    "ImportanceAwareLoss",
    "cross_entropy",
    "importance_aware_loss",
    "keep_gradient_memory",
    "median_frequency_weights",
    "release_gradient_memory",
    "validate_target",
]
