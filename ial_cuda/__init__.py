"""The Importance-Aware Loss for semantic segmentation (Chen, Gong and Yang, IJCAI 2017) in fused kernels."""

from .hierarchy import CAMVID, CITYSCAPES, Hierarchy
from .loss import (
    Components,
    ImportanceAwareLoss,
    importance_aware_loss,
    upsampled_cross_entropy,
)
from .memory import keep_gradient_memory, release_gradient_memory
from .validation import validate_target
from .weights import median_frequency_weights

__version__ = "0.1.0"

__all__ = [
    "CAMVID",
    "CITYSCAPES",
    "Components",
    "Hierarchy",
    "ImportanceAwareLoss",
    "importance_aware_loss",
    "keep_gradient_memory",
    "median_frequency_weights",
    "release_gradient_memory",
    "upsampled_cross_entropy",
    "validate_target",
]
