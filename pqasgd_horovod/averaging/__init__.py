"""When replicas are averaged, and how the mean is applied. Framework-free: tensors are seen as memory."""

from .config import ExchangeConfig
from .gradients import GradientAverager
from .periodic import PeriodicAverager
from .schedule import PeriodicAveraging
from .vector import TensorView

__all__ = ["ExchangeConfig", "GradientAverager", "PeriodicAverager", "PeriodicAveraging", "TensorView"]
