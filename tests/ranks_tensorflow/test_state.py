"""Saving and resuming, in the middle of a period too; every rank its own file, as momentum is local."""

from __future__ import annotations

import re

import keras
import numpy as np
import pytest
import tensorflow as tf

import pqasgd_horovod.tensorflow as hvd
import pqasgd_horovod.tensorflow.keras as hvd_keras
from pqasgd_horovod.errors import ArgumentError
from pqasgd_horovod.tensorflow.keras import callbacks
from tests.ranks_tensorflow.common import (
    EDEN2,
    EDEN4,
    apply,
    assert_equal,
    assert_raises_everywhere,
    assert_replicas_equal,
    compiled,
    differ,
    everybody,
    fit,
    make_model,
    make_variables,
    several_ranks,
    train,
    two_ranks,
    values,
    weights,
    wrap,
)

# Every weight of the small model has a residual of its own, and of the means that its rank makes.
FED_BACK = {"compression": EDEN2, "feedback": hvd.Feedback(), "exchange": "two_phase", "small_tensor_threshold": 0}


LONG = pytest.mark.long  # graphs are traced anew for each


def sgd():
    return keras.optimizers.SGD(0.1, momentum=0.9)


@pytest.mark.parametrize(
    ("inner", "options", "saved_after"),
    [
        pytest.param(sgd, {"period": 4, "compression": EDEN2}, 4, marks=LONG),
        (sgd, {"period": 4, "compression": EDEN2}, 6),
        pytest.param(
            keras.optimizers.Adam, {"period": 4, "compression": EDEN2, "exchange": "two_phase"}, 5, marks=LONG
        ),
        (sgd, {"period": 1, "compression": hvd.Compression.maxscale(bits=2)}, 3),
        (lambda: keras.optimizers.LossScaleOptimizer(sgd()), {"period": 4, "compression": EDEN2}, 6),
        pytest.param(sgd, {"backward_passes_per_step": 2, "compression": EDEN2}, 3, marks=LONG),
        pytest.param(sgd, {"period": 1, **FED_BACK}, 3, marks=LONG),
        (sgd, {"period": 4, **FED_BACK}, 6),
    ],
    ids=[
        "after-average",
        "mid-period",
        "adam-mid-period",
        "coded-gradients",
        "loss-scale",
        "mid-accumulation",
        "fed-back-gradients",
        "fed-back-changes",
    ],
)
def test_a_model_file_resumes_bit_exactly(inner, options, saved_after, tmp_path):
    straight = compiled(wrap(inner(), averaging=None, **options), make_model(norm=True))
    train(straight, range(saved_after))
    if hvd.size() > 1 and saved_after % options.get("period", 1):
        assert differ(weights(straight))
    straight.save(tmp_path / "model.keras")
    train(straight, range(saved_after, 11))
    resumed = keras.models.load_model(tmp_path / "model.keras")
    assert resumed.optimizer is not straight.optimizer
    train(resumed, range(saved_after, 11))
    assert_equal(weights(resumed), weights(straight))
    assert_equal(values(resumed.optimizer.variables), values(straight.optimizer.variables))
    for optimizer in (straight.optimizer, resumed.optimizer):
        optimizer.flush()
    assert_equal(weights(resumed), weights(straight))
    state = [each.optimizer._pqasgd_state.named() for each in (resumed, straight)]
    assert_equal(values(state[0].values()), values(state[1].values()))


def test_the_counter_matters_for_resuming():
    """Without the counter the noise repeats: the check above would notice."""
    arrays = []
    for skipped in (0, 1):
        variables = make_variables()
        optimizer = wrap(compression=hvd.Compression.maxscale(bits=2))
        optimizer._pqasgd_state.steps.assign(skipped)
        apply(optimizer, variables, [0])
        arrays.append(values(variables)[0])
    assert np.array_equal(*arrays) == (hvd.size() == 1)


@pytest.mark.parametrize(("period", "saved_after"), [(1, 3), (4, 6)])
def test_a_checkpoint_of_tensorflow_resumes_bit_exactly(period, saved_after, tmp_path):
    def make():
        variables = make_variables()
        optimizer = wrap(sgd(), period=period, compression=EDEN2)
        optimizer.build(variables)
        return variables, optimizer, tf.train.Checkpoint(optimizer=optimizer, variables=variables)

    straight, optimizer, checkpoint = make()
    apply(optimizer, straight, range(saved_after))
    path = checkpoint.write(str(tmp_path / "checkpoint"))
    apply(optimizer, straight, range(saved_after, 11))
    resumed, other, checkpoint = make()
    checkpoint.read(path).assert_consumed()
    apply(other, resumed, range(saved_after, 11))
    assert_equal(values(resumed), values(straight))
    assert int(other._pqasgd_state.steps) == int(optimizer._pqasgd_state.steps) == 11
    assert other.communication_stats()["steps"] == 11 - saved_after


def test_tapes_resume_bit_exactly(tmp_path):
    """The counter of a tape's rounding noise is saved with the variables; without it the noise would begin anew."""

    def step(variables, number):
        with hvd.DistributedGradientTape(tf.GradientTape(), compression=EDEN2) as tape:
            target = tf.add_n([tf.reduce_sum(v * v) for v in variables]) * (1.0 + number + hvd.rank())
        for variable, gradient in zip(variables, tape.gradient(target, variables), strict=True):
            variable.assign_sub(0.01 * gradient)

    variables = make_variables(shapes=((35, 61), (7,)))
    for number in range(3):
        step(variables, number)
    checkpoint = tf.train.Checkpoint(variables=variables, tapes=hvd.tape_state())
    path = checkpoint.write(str(tmp_path / f"rank{hvd.rank()}"))
    for number in range(3, 6):
        step(variables, number)
    straight = values(variables)
    checkpoint.read(path).assert_consumed()
    for number in range(3, 6):
        step(variables, number)
    assert_equal(values(variables), straight)


def test_fit_saves_an_average_with_flush_before(tmp_path):
    class Save(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.save(tmp_path / "model.keras")

    model = compiled(wrap(period=4, compression=EDEN2))
    fit(model, 6, callbacks=[callbacks.FlushCallback(), Save()])
    saved = keras.models.load_model(tmp_path / "model.keras")
    assert_replicas_equal(saved)
    assert_equal(weights(saved), weights(model))
    assert [int(v) for v in (saved.optimizer._pqasgd_state.steps, saved.optimizer._pqasgd_state.rounds)] == [6, 2]


@pytest.mark.parametrize("period", [1, 3])
def test_a_file_of_a_plain_optimizer_starts_a_new_period(period):
    plain = compiled(sgd())
    train(plain, range(2), rank=0)
    model = compiled(wrap(sgd(), period=period, compression=EDEN2))
    model.optimizer.build(model.trainable_variables)
    model.set_weights(plain.get_weights())
    model.optimizer.load_own_variables(stored(plain.optimizer))
    assert_equal(values(model.optimizer.momentums), values(plain.optimizer.momentums))
    train(model, range(2, 2 + period))
    assert_replicas_equal(model)


def stored(optimizer):
    """What the optimizer's part of a model file holds."""
    store = {}
    optimizer.save_own_variables(store)
    return {key: np.array(value) for key, value in store.items()}


def test_horovods_load_model_wraps_a_plain_optimizer_and_keeps_what_it_was(tmp_path):
    plain = compiled(sgd(), make_model())
    train(plain, range(3), rank=0)
    plain.save(tmp_path / "plain.keras")
    model = hvd_keras.load_model(tmp_path / "plain.keras", compression=EDEN2, period=2)
    assert_equal(values(model.optimizer.momentums), values(plain.optimizer.momentums))
    assert int(model.optimizer.iterations) == 3
    train(model, range(4))
    assert_replicas_equal(model)
    model.save(tmp_path / "distributed.keras")
    again = hvd_keras.load_model(tmp_path / "distributed.keras")
    assert again.optimizer.get_config() == model.optimizer.get_config()
    train(model, range(4, 7))
    train(again, range(4, 7))
    assert_equal(weights(again), weights(model))
    bare = make_model()
    bare.save(tmp_path / "bare.keras")
    with pytest.raises(ArgumentError, match="the model was saved without an optimizer"):
        hvd_keras.load_model(tmp_path / "bare.keras")


@pytest.mark.filterwarnings("ignore:Skipping variable loading:UserWarning")  # Keras, of any optimizer without steps
@pytest.mark.parametrize("built", [False, True], ids=["at-once", "after-steps"])
def test_groups_of_variables_are_found_again(built, tmp_path):
    """By position: a model that is loaded has other paths, as Keras makes them."""

    def grouped(model):
        return [
            [next(i for i, v in enumerate(model.trainable_variables) if v is member) for member in group]
            for group in model.optimizer._pqasgd_settings.value["groups"]
        ]

    model = make_model()
    kernel, bias, *_, last = model.trainable_variables
    compiled(wrap(sgd(), groups=[[last, kernel], [bias]]), model)
    if built:
        train(model, range(2))
    model.save(tmp_path / f"rank{hvd.rank()}.keras")
    loaded = keras.models.load_model(tmp_path / f"rank{hvd.rank()}.keras")
    for each in (model, loaded):
        train(each, range(2, 4))
        assert grouped(each) == [[5, 0], [1]]
    assert_equal(weights(loaded), weights(model))
    config = model.optimizer.get_config()
    assert config == loaded.optimizer.get_config()
    smaller = type(model.optimizer).from_config(config)
    text = assert_raises_everywhere("ArgumentError", lambda: smaller.build(make_variables()))
    assert "groups has the variable at position 5, and 4 are trained" in text


def test_a_file_of_other_settings_or_of_another_world_is_refused_with_the_reason_and_nothing_changes():
    saved = wrap(sgd(), period=2, compression=EDEN2)
    variables = make_variables()
    apply(saved, variables, range(3))
    file = stored(saved)
    other_world = {key: value for key, value in file.items() if "anchor" not in key}
    cases = [
        ({"period": 1}, file, "pqasgd.rounds has shape [] in the file and absent here"),
        ({"period": 2, "backward_passes_per_step": 2}, file, "pqasgd.passes has shape absent in the file and [] here"),
    ]
    if hvd.size() > 1:
        cases += [
            ({"period": 2, "small_tensor_threshold": 100}, file, "pqasgd.anchor.0 has shape [4200] in the file and"),
            ({"period": 2}, other_world, "pqasgd.anchor.1 has shape absent in the file and [260] here"),
        ]
    for options, content, text in cases:
        other = wrap(sgd(), compression=EDEN2, **options)
        other.build(make_variables())
        before = values([*other.variables, *other._saved().values()])
        with pytest.raises(ArgumentError, match=re.escape(text)):
            other.load_own_variables(content)
        assert_equal(values([*other.variables, *other._saved().values()]), before)


@several_ranks
@pytest.mark.parametrize("period", [1, 2])
def test_an_optimizer_that_was_made_in_another_world_says_so(period, monkeypatch):
    optimizer, variables = wrap(compression=EDEN2, period=period), make_variables()
    apply(optimizer, variables, range(1))
    membership = optimizer._pqasgd_membership.value
    monkeypatch.setattr(membership, "_world", (0, 9, 9))  # as before elastic mode has lost ranks
    text = f"was made as rank 0 of 9, and this is rank {hvd.rank()} of {hvd.size()} now.*hvd.elastic.run"
    for act in (lambda: apply(optimizer, variables, range(1, 2)), optimizer.flush, optimizer.join):
        with pytest.raises(ArgumentError, match=text):
            act()


@several_ranks
def test_a_file_that_one_rank_alone_has_loaded_is_the_same_error_everywhere():
    model = compiled(wrap(period=3, compression=EDEN4))
    train(model, range(3))
    resumed = compiled(wrap(period=3, compression=EDEN4))
    resumed.optimizer.build(resumed.trainable_variables)
    if hvd.rank() == 0:
        resumed.set_weights(model.get_weights())
        resumed.optimizer.load_own_variables(stored(model.optimizer))
    text = assert_raises_everywhere("MismatchError", lambda: train(resumed, [3]))
    assert "steps" in text
    assert "restored on every rank" in text


@several_ranks
def test_a_file_that_one_rank_has_loaded_is_broadcast():
    model = compiled(wrap(period=3, compression=EDEN4))
    train(model, range(4))
    resumed = compiled(wrap(period=3, compression=EDEN4))
    resumed.optimizer.build(resumed.trainable_variables)
    if hvd.rank() == 0:
        resumed.set_weights(model.get_weights())
        resumed.optimizer.load_own_variables(stored(model.optimizer))
    fit(resumed, 2, first=4, callbacks=[callbacks.BroadcastGlobalVariablesCallback(0)])
    assert_replicas_equal(resumed)
    assert set(everybody(int(resumed.optimizer._pqasgd_state.steps))) == {6}


@several_ranks
@pytest.mark.parametrize("period", [1, 2])
def test_a_broadcast_of_the_initial_state_leaves_every_rank_its_own_residual(period):
    model = compiled(wrap(sgd(), period=period, **FED_BACK), make_model())
    fit(model, 4)
    residuals = model.optimizer._pqasgd_state.residuals
    before = values([*residuals.own, *residuals.means])
    assert differ(before)
    callback = callbacks.BroadcastGlobalVariablesCallback(0)
    callback.set_model(model)
    callback.on_train_begin()
    assert_equal(values([*residuals.own, *residuals.means]), before)


@two_ranks
def test_a_model_file_of_another_rank_brings_no_residual(tmp_path, capfd):
    model = compiled(wrap(sgd(), period=2, **FED_BACK), make_model())
    fit(model, 4)
    model.save(tmp_path / "model.keras")
    paths = everybody(str(tmp_path / "model.keras"))
    loaded = keras.models.load_model(paths[0])
    fit(loaded, 2, first=4)
    assert ("is that of (rank, world size) [0 2]" in capfd.readouterr().err) == (hvd.rank() == 1)


def trained(steps, **options):
    """An optimizer after so many steps, with what it was given."""
    variables = make_variables()
    optimizer = wrap(sgd(), **options)
    apply(optimizer, variables, steps)
    return optimizer, variables


@several_ranks
@pytest.mark.parametrize("period", [1, 2])
def test_the_states_of_all_ranks_combine_to_one_that_every_rank_loads(period):
    optimizer, variables = trained(range(4), period=period, **FED_BACK)
    states = everybody(stored(optimizer))
    combined = hvd.combine_states(states)
    resumed = wrap(sgd(), period=period, **FED_BACK)
    others = [tf.Variable(value) for value in values(variables)]
    resumed.build(others)
    resumed.load_own_variables(combined)
    expected = np.mean([state["pqasgd.residual.0"].astype("f8") for state in states], axis=0)
    expected += sum(state["pqasgd.mean_residual.0"].astype("f8") for state in states)
    assert np.any(expected)
    np.testing.assert_array_equal(combined["pqasgd.residual.0"], expected.astype("f4"))
    assert_equal([combined["0"], combined["2"]], [states[0]["0"], states[0]["2"]])
    with pytest.raises(ArgumentError, match=re.escape("pqasgd.passes has shape [] in the file and absent here")):
        resumed.load_own_variables({**combined, "pqasgd.passes": np.int64(0)})
    # Where it has laid out its residuals, and is in the midst of training.
    apply(resumed, others, range(4, 6))
    assert int(resumed._pqasgd_state.steps) == 6
    resumed.load_own_variables(combined)
    again = stored(resumed)
    np.testing.assert_array_equal(again["pqasgd.residual.0"], combined["pqasgd.residual.0"])
    assert not np.any(again["pqasgd.mean_residual.0"])
    assert again["pqasgd.residual_owner"].tolist() == [hvd.rank(), hvd.size()]


@several_ranks
def test_a_combined_state_fits_where_the_number_of_ranks_has_chosen_another_exchange_or_nobody_else_is_there():
    sets = [hvd.add_process_set([rank]) for rank in range(hvd.size())]
    try:
        for period in (1, 2):
            optimizer, variables = trained(range(2), period=period, **FED_BACK)
            combined = hvd.combine_states(everybody(stored(optimizer)))

            def go_on(state, first, variables=variables, **options):
                others = [tf.Variable(value) for value in values(variables)]
                other = wrap(sgd(), **{**FED_BACK, **options})
                other.build(others)
                other.load_own_variables(state)
                apply(other, others, range(first, first + 2))
                assert int(other._pqasgd_state.steps) == first + 2
                return stored(other), others

            state, _ = go_on(combined, 2, period=period, exchange="allgather")
            assert not any("mean_residual" in key for key in state)
            alone, _ = go_on(combined, 2, period=period, process_set=sets[hvd.rank()])
            assert not any("residual" in key or "anchor." in key for key in alone)
            of_one = hvd.broadcast_object(hvd.combine_states([alone]), root_rank=0)
            _, others = go_on(of_one, 4, period=period)
            if period > 1:
                assert_replicas_equal(others)
    finally:
        for process_set in sets:
            hvd.remove_process_set(process_set)


def test_states_that_do_not_combine_are_refused_with_the_reason():
    optimizer, _ = trained(range(3), period=2, **FED_BACK)
    state = stored(optimizer)
    one = {**state, "pqasgd.steps_since_average": np.int64(0), "pqasgd.residual_owner": np.array([0, 1])}
    plain = {key: value for key, value in one.items() if "residual" not in key}
    cases = [
        ([], "states is empty"),
        ([{"0": state["0"]}], "not of optimizers of this package"),
        ([{**one, "pqasgd.steps_since_average": np.int64(1)}], "1 steps after an average"),
        ([{**one, "pqasgd.sum.0": np.ones(3)}], "gradients were accumulated"),
        ([one, one], "there must be one of each rank of one world"),
        ([plain, {**plain, "pqasgd.steps": np.int64(7)}], "they must be of the same one"),
    ]
    if hvd.size() > 1:
        cases.append(([one, plain], "different residuals"))
    for states, text in cases:
        with pytest.raises(ArgumentError, match=re.escape(text)):
            hvd.combine_states(states)
