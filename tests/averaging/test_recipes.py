"""The recipes as the core understands them: what they send, and what they are given."""

from __future__ import annotations

import numpy as np
import pytest

from pqasgd_horovod import recipes
from pqasgd_horovod.averaging import ArrayView, ExchangeConfig, GradientAverager, PeriodicAverager
from pqasgd_horovod.errors import ArgumentError
from pqasgd_horovod.exchange.carriers.threads import run_ranks

RECIPES = (recipes.balanced, recipes.max_saving, recipes.max_fidelity)
STEPS = 200


def share_of_bytes(recipe) -> float:
    """Return what four ranks send in ``STEPS`` steps, over what full communication would."""
    options = recipe(STEPS)

    def program(carrier):
        view = ArrayView("x", np.zeros(2**17, np.float32))
        config = ExchangeConfig(options["compression"])
        if options["averaging"].exchanges_gradients:
            averager = GradientAverager(carrier, config, name="test")
            averager.prepare([view])
            for _ in range(STEPS):
                averager.finish()
        else:
            averager = PeriodicAverager(carrier, options["averaging"], config, name="test")
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
        (recipes.balanced, 0.005, 0.01),
        (recipes.max_saving, 0.0, 0.003),
        (recipes.max_fidelity, 0.03, 0.13),
    ],
)
def test_it_sends_what_it_says(recipe, least, most):
    assert least < share_of_bytes(recipe) < most


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("total_steps", [0, -1, 1.5, None, "100"])
def test_a_wrong_number_of_steps_is_refused(recipe, total_steps):
    with pytest.raises(ArgumentError, match="total_steps is"):
        recipe(total_steps)


@pytest.mark.parametrize("recipe", RECIPES)
def test_one_step_is_enough(recipe):
    assert set(recipe(1)) == {"compression", "averaging"}
