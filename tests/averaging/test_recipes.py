"""The recipes as the core understands them: what they send, and what they are given."""

from __future__ import annotations

import numpy as np
import pytest

from pqasgd_horovod import recipes
from pqasgd_horovod.averaging import ArrayView, ExchangeConfig, GradientAverager, PeriodicAverager
from pqasgd_horovod.errors import ArgumentError
from pqasgd_horovod.exchange.carriers.threads import run_ranks

STEPS = 200


def share_of_bytes(compression, averaging) -> float:
    """Return what four ranks send in ``STEPS`` steps, over what full communication would."""

    def program(carrier):
        view = ArrayView("x", np.zeros(2**17, np.float32))
        config = ExchangeConfig(compression)
        if averaging.exchanges_gradients:
            averager = GradientAverager(carrier, config, name="test")
            averager.prepare([view])
            for _ in range(STEPS):
                averager.finish()
        else:
            averager = PeriodicAverager(carrier, averaging, config, name="test")
            averager.prepare([view])
            for _ in range(STEPS):
                averager.count_step(0.1)
            averager.flush()
        stats = averager.communication_stats()
        return stats["bytes_sent"] / stats["uncompressed_bytes"]

    return max(run_ranks(4, program))


@pytest.mark.parametrize(
    ("recipe", "least", "most"),
    [
        (recipes.max_fidelity(), 0.12, 0.13),
        (recipes.balanced(STEPS), 0.008, 0.01),
        (recipes.max_saving(), 0.002, 0.0025),
    ],
)
def test_it_sends_what_it_says(recipe, least, most):
    assert least < share_of_bytes(**recipe) < most


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 936, 10**9])
def test_balanced_ends_with_the_longest_period(steps):
    schedule = recipes.balanced(steps)["averaging"].period
    assert schedule.next_period(0, has_dropped=False) == 2
    if steps > 3:
        assert schedule.next_period(steps // 2, has_dropped=False) == 4
        assert schedule.next_period(steps - 1, has_dropped=False) == 16


@pytest.mark.parametrize("recipe", [lambda momentum: recipes.balanced(100, momentum), recipes.max_saving])
@pytest.mark.parametrize("momentum", [-0.1, 1.0, 2])
def test_a_wrong_momentum_is_refused(recipe, momentum):
    with pytest.raises(ArgumentError, match=f"momentum is {momentum}; it must be"):
        recipe(momentum)


@pytest.mark.parametrize("steps", [0, -5, 2.5, "many", True])
def test_wrong_steps_are_refused(steps):
    with pytest.raises(ArgumentError, match=f"steps is {steps!r}; it must be"):
        recipes.balanced(steps)


def test_the_momentum_is_the_outer_one():
    assert recipes.balanced(100, momentum=0.5)["averaging"].outer.momentum == 0.5
    assert recipes.max_saving(momentum=0.5)["averaging"].outer.momentum == 0.5
