"""`DistributedOptimizer` for ranks that are threads of one process: the same averages, by the same core."""

from __future__ import annotations

import functools
from typing import Any

import torch

from pqasgd_horovod.averaging import ExchangeConfig, GradientAverager, PeriodicAverager
from pqasgd_horovod.averaging.strategy import resolve_averaging
from pqasgd_horovod.exchange.carriers.threads import ThreadCarrier
from pqasgd_horovod.torch.compression import codec_of, vector_codec_of
from pqasgd_horovod.torch.tensors import GradientMemory, TensorMemory, select_buffers


class ThreadedOptimizer:
    """What `pqasgd_horovod.torch.DistributedOptimizer` makes of the same arguments, over a `ThreadCarrier`."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: torch.nn.Module,
        carrier: ThreadCarrier,
        *,
        compression: Any,
        period: Any = None,
        averaging: Any = None,
        second_compression: Any = None,
        **options: Any,
    ) -> None:
        averaging = resolve_averaging(period, averaging)
        codec = codec_of(compression)
        assert codec is not None
        second_codec = None if second_compression is None else vector_codec_of(second_compression)
        config = ExchangeConfig(codec, second_codec, **options)
        self._optimizer = optimizer
        self._averager: GradientAverager | PeriodicAverager
        if averaging.exchanges_gradients:
            self._averager = GradientAverager(carrier, config, name="optimizer")
            self._gradients = [GradientMemory(name, parameter) for name, parameter in model.named_parameters()]
            self._averager.prepare(self._gradients)
        else:
            self._averager = PeriodicAverager(carrier, averaging, config, name="optimizer")
            parameters = [
                TensorMemory(name, functools.partial(model.get_parameter, name)) for name, _ in model.named_parameters()
            ]
            self._averager.prepare(parameters, list(select_buffers(model, averaging.buffers)))

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's own."""
        return self._optimizer.param_groups

    def step(self) -> None:
        """Take a step, with the mean of the gradients, or alone and then perhaps an average."""
        if isinstance(self._averager, GradientAverager):
            self._averager.finish()
            for gradient in self._gradients:
                gradient.restore(keep_mean=True)
            self._optimizer.step()
        else:
            self._optimizer.step()
            self._averager.count_step(float(self.param_groups[0]["lr"]))

    def flush(self) -> None:
        """Average a last partial period."""
        if isinstance(self._averager, PeriodicAverager):
            self._averager.flush()

    def communication_stats(self) -> dict[str, Any]:
        """Return running totals."""
        return self._averager.communication_stats()
