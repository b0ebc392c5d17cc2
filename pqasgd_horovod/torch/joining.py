"""What ``optimizer.join()`` needs where gradients are averaged."""

from __future__ import annotations

from typing import Any

import horovod.torch as horovod

from ..errors import ArgumentError
from .tensors import bytes_of
from .wrapping import parameters_of


def check_before_join(optimizer: Any) -> None:
    """Raise ArgumentError if gradients are in flight, or a codec cannot send nothing."""
    optimizer._settings.exchange.check_for_join()
    if optimizer._handles and optimizer._settings.carrier is not None:
        raise ArgumentError(
            "join() was called after loss.backward() and before optimizer.step() or optimizer.synchronize(): the "
            "gradients are still being exchanged"
        )


def take_over(optimizer: Any, root_rank: int) -> None:
    """Take over parameters and the optimizer's state, without hyper-parameters, of one rank; collective."""
    process_set, name = optimizer.process_set, f"{optimizer._settings.name}.join"
    for parameter in parameters_of(optimizer):
        flat = bytes_of(parameter)  # Horovod knows neither bfloat16 nor an order in memory
        if flat.numel():
            horovod.broadcast_(flat, root_rank, f"{name}.{optimizer._parameter_names[parameter]}", process_set)
        parameter.data.copy_(flat.view(parameter.dtype).view(parameter.shape))
    own = optimizer._inner_class.state_dict(optimizer)
    state = horovod.broadcast_object(own["state"], root_rank, f"{name}.state", process_set)
    optimizer._inner_class.load_state_dict(optimizer, {**own, "state": state})
