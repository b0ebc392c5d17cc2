"""When replicas are averaged, and how the mean is applied. Framework-free: tensors are seen as memory."""

from .config import ExchangeConfig
from .feedback import Feedback, MomentumCorrection
from .gradients import GradientAverager
from .outer import Nesterov, Replace, SlowMo
from .periodic import PeriodicAverager
from .policy import larger_than, smaller_than
from .schedule import AdaptivePeriod, GrowingPeriod, PostLocal
from .selection import Rotation
from .strategy import PeriodicAveraging, SparseAveraging
from .vector import ArrayView, TensorView

__all__ = [
    "AdaptivePeriod",
    "ArrayView",
    "ExchangeConfig",
    "Feedback",
    "GradientAverager",
    "GrowingPeriod",
    "MomentumCorrection",
    "Nesterov",
    "PeriodicAverager",
    "PeriodicAveraging",
    "PostLocal",
    "Replace",
    "Rotation",
    "SlowMo",
    "SparseAveraging",
    "TensorView",
    "larger_than",
    "smaller_than",
]
