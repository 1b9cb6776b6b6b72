"""The Importance-Aware Loss for semantic segmentation (Chen, Gong and Yang, IJCAI 2017) in fused kernels."""

from .class_weights import median_frequency_weights
from .functional import Components, cross_entropy, importance_aware_loss
from .gradient_memory import keep_gradient_memory, release_gradient_memory
from .hierarchy import CAMVID, CITYSCAPES, Hierarchy
from .modules import CrossEntropyLoss, ImportanceAwareLoss
from .pixel_losses import focal_loss, ohem_cross_entropy, pixel_nll, poly1_cross_entropy
from .statistics import LevelStatistics, level_statistics
from .validation import validate_target

__version__ = "0.1.0"

__all__ = [
    "CAMVID",
    "CITYSCAPES",
    "Components",
    "CrossEntropyLoss",
    "Hierarchy",
    "ImportanceAwareLoss",
    "LevelStatistics",
    "cross_entropy",
    "focal_loss",
    "importance_aware_loss",
    "keep_gradient_memory",
    "level_statistics",
    "median_frequency_weights",
    "ohem_cross_entropy",
    "pixel_nll",
    "poly1_cross_entropy",
    "release_gradient_memory",
    "validate_target",
]
