"""PowerSGD as a graph: :mod:`pqasgd_horovod.exchange.low_rank`, two of these exchanges, one after the other."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from .. import native
from ..averaging.channel import ChannelPlan
from ..averaging.vector import FlatLayout
from ..errors import ArgumentError
from .carrier import HorovodCarrier
from .graph import GraphChannel, Problems, Round, signed
from .library import ops
from .nodes import NodeChannel
from .places import ON_HOST, Place
from .variables import VariableSpec


def make_channel(plan: ChannelPlan, carrier: HorovodCarrier, *arguments: Any, **options: Any) -> GraphChannel:
    """Return the exchange of a channel; arguments are those of :class:`GraphChannel`."""
    if plan.low_rank is not None:
        place: Place = options.get("place", ON_HOST)
        if place.gpu is not None:
            raise ArgumentError(
                f"compression is {plan.low_rank} with variables on {place.device}; its factors are made on CPUs: pass "
                "anchor_device='cpu' to DistributedOptimizer, so that averages are made there, or use another codec"
            )
        return LowRankChannel(plan, carrier, *arguments, **options)
    return (GraphChannel if carrier.nodes is None else NodeChannel)(plan, carrier, *arguments, **options)


class LowRankChannel(GraphChannel):
    """The exchange of matrices by way of two factors; ``residuals`` are that of the vector, and the starts."""

    def __init__(
        self,
        plan: ChannelPlan,
        carrier: HorovodCarrier,
        digest: int,
        problems: Problems,
        *arguments: Any,
        **options: Any,
    ) -> None:
        super().__init__(plan, carrier, digest, problems, *arguments, **options)
        assert plan.low_rank is not None
        self._approximation_rank = plan.low_rank.approximation_rank
        self._matrices = [plan.matrices_in(bucket) for bucket in range(len(plan.sizes))]
        sizes = [[plan.low_rank.factor_sizes(matrix) for matrix in bucket] for bucket in self._matrices]
        left, right = ([sum(pair[side] for pair in bucket) for bucket in sizes] for side in (0, 1))
        # What arrives of a factor is written by these, and made orthonormal where it lies.
        self._left, self._right = (
            GraphChannel(factor_plan(plan, side, numels), carrier, digest, problems, None, place=self.place)
            for side, numels in (("left", left), ("right", right))
        )

    def bytes_per_round(self, fragment: int | None = None) -> tuple[int, int]:
        """Return the bytes sent and received in a round."""
        (sent, received), (sent_after, received_after) = (
            factor.bytes_per_round() for factor in (self._left, self._right)
        )
        return sent + sent_after, received + received_after

    def _kept_limits(self, fragment: int | None) -> tuple[list[int], ...]:
        return self.limits(fragment), self._right.limits(None)

    def exchange_bucket(
        self,
        bucket: int,
        source: dict[str, Any],
        residuals: Sequence[tuple[tf.Variable, tf.Variable]],
        round: Round,
    ) -> tf.Tensor:
        """Exchange both factors of one bucket, whose numbers are in ``source``; return its flags."""
        (residual, next_residual), (starts, next_starts) = residuals
        attributes: dict[str, Any] = {
            "matrices": list(itertools.chain(*self._matrices[bucket])),
            "approximation_rank": self._approximation_rank,
            "offset": self.plan.starts[bucket],
            "left_offset": self._left.plan.starts[bucket],
            "right_offset": self._right.plan.starts[bucket],
        }
        of_factors = round._replace(scale=1.0)
        with self.place.here():
            own_left = ops.pqasgd_project(
                starts=starts.handle,
                residuals=[residual.handle, next_residual.handle],
                **source,
                **attributes,
            )
        left_flags = self._left.exchange_part(bucket, [own_left], of_factors)
        with self.place.here():
            own_right = ops.pqasgd_backproject(
                flags=left_flags, left=self._left.arriving.handle, next_residual=next_residual.handle, **attributes
            )
        right_flags = self._right.exchange_part(bucket, [own_right], of_factors)
        with self.place.here():
            return ops.pqasgd_reconstruct(
                step=round.step,
                scale=round.scale,
                left_flags=left_flags,
                right_flags=right_flags,
                own_right=own_right,
                bases=self._base(),
                left=self._left.arriving.handle,
                right=self._right.arriving.handle,
                arriving=self.arriving.handle,
                next_residual=next_residual.handle,
                next_starts=next_starts.handle,
                seed=signed(self.plan.seed),
                first=sum(map(len, self._matrices[:bucket])),
                **attributes,
            )


def factor_plan(plan: ChannelPlan, side: str, numels: Sequence[int]) -> ChannelPlan:
    """Return the plan of the exchange of one factor of all matrices, whose buckets have so many numbers."""
    specs = [
        VariableSpec(f"{side}.{bucket}", native.DTYPE_F32, numel, (numel,), "float32")
        for bucket, numel in enumerate(numels)
    ]
    return ChannelPlan(
        layout=FlatLayout(specs),
        codec=plan.codec,
        second_codec=None,
        method=plan.method,
        seed=plan.seed,
        name=f"{plan.name}.{side}",
        starts=tuple(itertools.accumulate(numels, initial=0)),
    )
