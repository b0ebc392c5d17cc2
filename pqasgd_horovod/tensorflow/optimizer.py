"""``DistributedOptimizer`` for Keras 3 optimizers, in ``model.fit`` and in loops of one's own.

Keras 3 calls none of what Horovod's wrapper overrides, so that under it ranks drift apart without a word. Here it is
``apply`` that is overridden, which everything else calls. The wrapped optimizer is of a subclass of the user's class,
made from its configuration, as Horovod does it.
"""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import horovod.tensorflow as horovod
import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

from ..averaging import ExchangeConfig, PeriodicAveraging
from ..averaging.config import DEFAULT_SMALL_TENSOR_THRESHOLD
from ..averaging.construction import Membership, check_timeout, construct_together, registered_process_set
from ..averaging.devices import check_anchor_device
from ..averaging.feedback import Feedback, MomentumCorrection, check_no_momentum, check_not_stock, feedback_from_config
from ..averaging.policy import Rule, check_names, make_policy, pattern_from_config
from ..averaging.schedule import Schedule
from ..averaging.strategy import resolve_averaging
from ..averaging.together import Telling, refused_together
from ..codecs.base import check_flag, check_integer, is_number
from ..errors import ArgumentError, MismatchError
from ..exchange import DEFAULT_BUCKET_CAP_BYTES
from ..exchange.base import NonFinitePolicy
from ..exchange.carriers.nodes import NodesCarrier
from .carrier import HorovodCarrier, allgather
from .compression import CodecCompressor, Compression, codec_of, vector_codec_of
from .functions import broadcast_variables
from .gradients import (
    CodedGradients,
    GradientAverager,
    GradientSettings,
    StockGradients,
    check_groups,
    first_computed,
    place_groups,
)
from .meeting import Meeting
from .outer import describe_outer
from .periodic import PeriodicAverager
from .state import PREFIX, fitted
from .state import named as saved_names
from .traced import after, as_written, counter, outside_of_graphs, run_once, when
from .variables import describe_variables, name_of, unwrap

logger = logging.getLogger("pqasgd_horovod")

REGISTERED_NAME = "DistributedOptimizer"
_PACKAGE = "pqasgd_horovod"


# Whatever class of Keras comes after it.
_Inner: Any = object


class DistributedMethods(_Inner):
    """What a wrapped optimizer does differently; the class of the user's optimizer comes after this one."""

    _inner_class: type[keras.optimizers.Optimizer]
    built: bool

    def _distribute(self, settings: dict[str, Any], membership: Membership, averager: Any, model: Any) -> None:
        self._pqasgd_settings = _Hidden(settings)
        self._pqasgd_membership = _Hidden(membership)
        self._pqasgd_averager = _Hidden(averager)
        self._pqasgd_model = _Hidden(model)
        self._pqasgd_local = _Hidden([])
        self._pqasgd_failure = _Hidden(None)
        self._pqasgd_warned = _Hidden(False)
        if isinstance(averager, GradientAverager):
            self._pqasgd_state: Any = averager.state

    # ---- Keras ----

    @as_written
    def build(self, variables: Sequence[Any]) -> None:
        """Make the optimizer's variables, and agree with the other ranks on what is averaged; collective."""
        if self.built:
            return
        variables, averager = list(variables), self._pqasgd_averager.value
        with self._until_agreed():
            with refused_together(_outside(self._pqasgd_membership.value.tell_in_layout)):
                self._check_graph()
                self._place_settings(variables)
                super().build(variables)
                buffers = self._prepare_averages(variables)
            if isinstance(averager, PeriodicAverager):
                trained = [v for v in variables if not self._is_local(v)]
                averager.build(trained, buffers, _moments_of(self))
                self._pqasgd_state = averager.state

    @contextlib.contextmanager
    def _until_agreed(self, final: type[Exception] = Exception) -> Iterator[None]:
        """Do what ranks do until they have agreed on what is averaged: a ``final`` error before that is the end.

        All of them have one then, and Keras cannot build again what it has built in part; so none may try again, and
        wait for the others.
        """
        self._check_usable()
        try:
            yield
        except final as error:
            if not self._pqasgd_averager.value.is_laid_out:
                self._pqasgd_failure.value = f"{type(error).__name__}: {error}"
                self.built = False
            raise

    def _check_graph(self) -> None:
        """Raise ArgumentError while a function is traced that XLA is to compile: its error would name none of this."""
        alone = self._pqasgd_membership.value.carrier is None
        if not alone and GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()):
            raise ArgumentError(
                "jit_compile is on, and XLA cannot compile Horovod's ops: pass jit_compile=False to model.compile() "
                "('auto' turns it on where there is a GPU) or to tf.function, or give model.fit the "
                "BroadcastGlobalVariablesCallback(0), which switches it off"
            )

    def _check_usable(self) -> None:
        if self._pqasgd_failure.value is not None:
            raise ArgumentError(
                f"the optimizer could not be built, for {self._pqasgd_failure.value}; make another one, on every rank"
            )

    def _place_settings(self, variables: list[Any]) -> None:
        """Find the variables that settings are about."""
        settings, averager = self._pqasgd_settings.value, self._pqasgd_averager.value
        settings["groups"] = place_groups(settings["groups"], variables)
        if settings["policy"]:
            check_names(settings["policy"], describe_variables(variables))
        if isinstance(averager, GradientAverager):
            averager.regroup(settings["groups"])

    def _prepare_averages(self, variables: list[Any]) -> list[Any]:
        """Make what Keras does not; return the buffers that are averaged."""
        if self._pqasgd_settings.value["backward_passes_per_step"] > 1:
            with outside_of_graphs():
                self._pqasgd_sums = [
                    tf.Variable(tf.zeros(v.shape, v.dtype), trainable=False) for v in map(unwrap, variables)
                ]
                self._pqasgd_passes = counter("backward_passes")
        model, averager = self._find_model(), self._pqasgd_averager.value
        if model is not None:
            switch_off_xla(model)
        return self._find_buffers(model, averager.averaging.buffers) if isinstance(averager, PeriodicAverager) else []

    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        """Update the variables with ``grads``, and average as the schedule says."""
        if len(grads) == 0:
            return
        if not self.built:
            self._check_usable()
            if trainable_variables is None:
                raise ArgumentError(
                    "trainable_variables is None and the optimizer is not built: pass the variables, or call "
                    "optimizer.build(model.trainable_variables) first"
                )
            with keras.name_scope(self.name, caller=self):
                self.build(list(trainable_variables))
        variables = list(self._trainable_variables if trainable_variables is None else trainable_variables)
        if len(grads) != len(variables):
            raise ArgumentError(f"grads has {len(grads)} entries for {len(variables)} variables; it must have as many")
        self._check_graph()
        self._pqasgd_membership.value.check_world()
        passes = self._pqasgd_settings.value["backward_passes_per_step"]
        if passes == 1:
            self._step(list(grads), variables)
        else:
            self._accumulate(list(grads), variables, passes)

    def _accumulate(self, grads: list[Any], variables: list[Any], passes: int) -> None:
        sums = [self._pqasgd_sums[self._get_variable_index(v)] for v in variables]
        present = [i for i, gradient in enumerate(grads) if gradient is not None]
        for i in present:
            sums[i].assign_add(tf.convert_to_tensor(grads[i]))
        count = self._pqasgd_passes.assign_add(1)
        divisor = passes if self._pqasgd_settings.value["average_aggregated_gradients"] else 1

        def step() -> None:
            summed = list(grads)
            for i in present:
                summed[i] = sums[i].value() / tf.cast(divisor, sums[i].dtype)
            self._step(summed, variables)
            for i in present:
                sums[i].assign(tf.zeros_like(sums[i]))

        def skip() -> None:
            self._iterations.assign_add(1)

        when(tf.equal(count % passes, 0), step, skip)

    def _step(self, grads: list[Any], variables: list[Any]) -> None:
        averager = self._pqasgd_averager.value
        if isinstance(averager, PeriodicAverager):
            if len(variables) < len(self._trainable_variables):
                self._warn_of_frozen()
            computed = first_computed(grads)
            with after(*computed):
                averager.before_step()
            learning_rate = keras.ops.convert_to_tensor(self.learning_rate)  # of this step: apply() counts it
            super().apply(grads, variables)
            with after(*computed):
                averager.count_step(learning_rate)
            return
        shared = [i for i, variable in enumerate(variables) if not self._is_local(variable)]
        means = self._average([grads[i] for i in shared], [variables[i] for i in shared])
        if self._pqasgd_settings.value["scale_local_gradients"]:
            carrier = self._pqasgd_membership.value.carrier
            grads = [g if g is None or carrier is None else scaled(g, 1.0 / carrier.size) for g in grads]
        for i, mean in zip(shared, means, strict=True):
            grads[i] = mean
        super().apply(grads, variables)

    def _warn_of_frozen(self) -> None:
        """Say once that what was frozen after the first step is still averaged."""
        if self._pqasgd_warned.value or self._pqasgd_membership.value.carrier is None:
            return
        settings = self._pqasgd_settings.value
        frozen = [name_of(v) for v in self._trainable_variables if not v.trainable and not self._is_local(v)]
        exact = settings["codec"] == Compression.none.codec.config() and not settings["policy"]
        if frozen and not exact:
            self._pqasgd_warned.value = True
            logger.warning(
                "%s and perhaps others were frozen after the first step, and are still averaged, so that the codec's "
                "noise moves them: compile with another DistributedOptimizer, on every rank",
                frozen[0],
            )

    @as_written
    def _average(self, grads: list[Any], variables: list[Any]) -> list[Any]:
        averager, carrier = self._pqasgd_averager.value, self._pqasgd_membership.value.carrier
        with contextlib.nullcontext() if carrier is None else self._until_agreed():
            means: list[Any] = averager.average(grads, variables)
        return means

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        """At the end of ``fit``: average what is left of a period, and the moving averages of parameters, if any."""
        self.flush()
        carrier = self._pqasgd_membership.value.carrier
        updater = _updater_of(self)
        if carrier is not None and updater.use_ema:
            averages = list(map(unwrap, updater._model_variables_moving_average))
            _assign_plain_means(averages, f"{self._pqasgd_membership.value.name}.ema", carrier)
        super().finalize_variable_values(var_list)

    # ---- what a model file holds ----

    def get_config(self) -> dict[str, Any]:
        """Return a configuration that ``from_config`` and Keras' ``load_model`` take back."""
        settings = dict(self._pqasgd_settings.value)
        if not isinstance(settings["groups"], int):
            settings["groups"] = self._positions_of(settings["groups"])
        settings["policy"] = [_serialize_rule(rule) for rule in settings["policy"]]
        inner = self._inner_class.from_config(super().get_config())
        return {"optimizer": keras.saving.serialize_keras_object(inner), **settings}

    def _positions_of(self, groups: Sequence[Sequence[Any]]) -> list[list[int]]:
        """Return groups by positions among what is trained: Keras does not keep paths when a model is loaded."""
        model = None if self.built else self._find_model()
        if not self.built and model is None:
            logger.warning("groups are not saved: the optimizer is not built, nor compiled with a model")
        variables = self._trainable_variables if self.built else [] if model is None else model.trainable_variables
        positions = {id(unwrap(variable)): i for i, variable in enumerate(variables)}
        placed = ([m if isinstance(m, int) else positions.get(id(unwrap(m))) for m in group] for group in groups)
        return [[position for position in group if position is not None] for group in placed]

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        """Return the optimizer of a configuration; collective, as its construction is."""
        settings = dict(config)
        inner = keras.saving.deserialize_keras_object(settings.pop("optimizer"), custom_objects=custom_objects)
        return _from_settings(inner, settings, custom_objects)

    def _saved(self) -> dict[str, tf.Variable]:
        """Return what is saved besides Keras' own variables, by the names that a model file has after a prefix."""
        state = getattr(self, "_pqasgd_state", None)
        named = {} if state is None else dict(state.named())
        for i, accumulated in enumerate(getattr(self, "_pqasgd_sums", ())):
            named[f"sum.{i}"] = accumulated
        if hasattr(self, "_pqasgd_passes"):
            named["passes"] = self._pqasgd_passes
        return named

    def save_own_variables(self, store: Any) -> None:
        """Add counters, anchors and accumulated gradients to what Keras saves."""
        super().save_own_variables(store)
        for name, variable in self._saved().items():
            store[PREFIX + name] = variable.numpy()

    def load_own_variables(self, store: Any) -> None:
        """Take counters, anchors and accumulated gradients out of what Keras has saved.

        Raises ArgumentError, and changes nothing, if they were saved with other settings or for another model. In a
        file of a plain optimizer there are none: a new period starts at the next step. What ``hvd.combine_states``
        gives fits a world of any size.
        """
        keras_own = {key: store[key] for key in store.keys() if not key.startswith(PREFIX)}  # noqa: SIM118
        ours = saved_names(store)
        averager, later = self._pqasgd_averager.value, {}
        if isinstance(averager, CodedGradients) and averager.awaits_residuals:
            later = {name: ours.pop(name) for name in list(ours) if "residual" in name}
        expected = self._saved() if self.built and ours else {}
        if expected:
            ours = fitted(ours, expected, self._pqasgd_membership.value.carrier is None)
            _check_saved(ours, expected)
        if isinstance(averager, PeriodicAverager):
            averager.settle()
        super().load_own_variables(keras_own)
        if later:
            averager.restore_residuals(later)
        for name, variable in expected.items():
            variable.assign(ours[name])

    @classmethod
    def _instantiate(cls, inner_config: dict[str, Any]) -> Any:
        """Return an instance made from the configuration of the user's optimizer."""
        return super().from_config(inner_config)

    # ---- this package ----

    def flush(self, timeout: float | None = None) -> None:
        """Average a last partial period: call it on every rank before evaluating, saving or ending.

        Nothing happens with ``period=1``, or right after an average. Raises CollectiveTimeoutError if the other ranks
        do not come in ``timeout`` seconds (None: wait as any collective does); nothing is lost then. Give a timeout on
        all ranks, or on none.
        """
        timeout = check_timeout("timeout", timeout)
        self._pqasgd_membership.value.check_world()
        averager = self._pqasgd_averager.value
        if isinstance(averager, PeriodicAverager):
            averager.flush(timeout)

    def join(self) -> int:
        """Say that this rank has no more data, for now, and wait until no rank has; return the rank that joined last.

        Call it on every rank, eagerly, at the end of each epoch; in ``model.fit`` ``JoinCallback`` does. Where ranks
        have different numbers of batches, those that have more go on. Each mean is then that of the ranks that have
        more data, and of what the others have done since the average before; a rank that has joined sends zeros. When
        all have joined what is left is averaged, as by :meth:`flush`, and all ranks have the same parameters; training
        can go on. Of several ranks that joined between two averages the one with the most steps is returned, of those
        the lowest.

        With ``period=1`` parameters, iterations and the optimizer's moments become those of the rank that joined last;
        moving statistics stay local. With a longer period moments stay local, and a learning rate schedule of Keras
        goes on from the iterations of all steps. Gradients that are accumulated
        (``backward_passes_per_step``) wait for this rank's next batches. What error feedback has not sent of a rank
        that has joined, and its velocity, stay with it until it has data again. Where a schedule or an outer optimizer
        depends on the learning rate those of the other ranks count.

        Raises ArgumentError, before anything is sent, where Horovod itself averages (``none`` or ``fp16`` with
        ``period=1``), with ``signsgd(scaled=False)``, and with local variables and ``period=1``; on all ranks if the
        optimizer is not built and not compiled with a model that is. Raises DesynchronizedError on every rank if one
        calls flush() while others have joined.

        >>> import keras, tensorflow as tf, pqasgd_horovod.tensorflow as hvd
        >>> hvd.init()
        >>> x = tf.Variable([1.0, 2.0])
        >>> optimizer = hvd.DistributedOptimizer(
        ...     keras.optimizers.SGD(0.1), averaging=hvd.PeriodicAveraging(period=8, buffers="local")
        ... )
        >>> for _ in range(3 + hvd.rank()):  # uneven data
        ...     optimizer.apply([tf.ones(2)], [x])
        >>> optimizer.join() == hvd.size() - 1
        True
        """
        averager, membership = self._pqasgd_averager.value, self._pqasgd_membership.value
        membership.check_world()
        self._check_for_join()
        self._build_without_step()
        if isinstance(averager, PeriodicAverager):
            before = averager.num_steps
            last = averager.join()
            self._catch_up(averager.num_steps - before)
        elif membership.carrier is not None:
            with self._until_agreed():
                last, uneven = averager.join(list(self._trainable_variables))
            if uneven:
                self._take_over(membership.carrier, last)
        return horovod.rank() if membership.carrier is None else int(membership.carrier.process_set.ranks[last])

    def _check_for_join(self) -> None:
        """Raise ArgumentError if :meth:`join` is not possible, on every rank."""
        averager, settings = self._pqasgd_averager.value, self._pqasgd_settings.value
        if isinstance(averager, CodedGradients):
            averager.check_for_join()
            local = [name_of(variable) for variable in self._pqasgd_local.value]
            if local:
                raise ArgumentError(
                    f"join() was called with period=1 and the local variables {local}: Keras does not tell which "
                    "moments are theirs, and all others become those of the rank that joined last. Take a longer "
                    "period, or give every rank as many batches"
                )
        elif isinstance(averager, StockGradients) and self._pqasgd_membership.value.carrier is not None:
            raise ArgumentError(
                f"join() was called with op={settings['op']} and period=1, where Horovod averages. Its own join(), in "
                "0.28.1, fails in some processes that have used other collectives before (its background loop ends "
                "with unordered_map::at), and divides by all ranks: use a codec, such as Compression.bf16, or a period"
            )

    def _build_without_step(self) -> None:
        """Build, for a rank that has no batch at all; the others build in their first step."""
        if self.built:
            return
        membership = self._pqasgd_membership.value
        # Where no rank can, which is no MismatchError, all can build and try again.
        with self._until_agreed(MismatchError), refused_together(membership.tell_in_layout):
            model = self._find_model()
            if model is None or not model.built:
                raise ArgumentError(
                    "join() was called and the optimizer is not built, as this rank has not made a step: call "
                    "optimizer.build(model.trainable_variables) first"
                )
        with keras.name_scope(self.name, caller=self):
            self.build(model.trainable_variables)

    def _catch_up(self, missed: int) -> None:
        """Let a learning rate schedule go on from the steps of all ranks."""
        updater = _updater_of(self)
        if isinstance(updater._learning_rate, keras.optimizers.schedules.LearningRateSchedule):
            updater.iterations.assign_add(missed * self._pqasgd_settings.value["backward_passes_per_step"])

    def _take_over(self, carrier: HorovodCarrier, last: int) -> None:
        """Take over parameters and the optimizer's state, without hyper-parameters, of one rank; collective."""
        updater = _updater_of(self)
        state = [v for v in self.variables if v is not updater._learning_rate]
        root_rank = int(carrier.process_set.ranks[last])
        broadcast_variables([*self._trainable_variables, *state], root_rank, carrier.process_set)

    def communication_stats(self) -> dict[str, Any]:
        """Return running totals of this process, as in PyTorch.

        ``steps``, ``rounds`` (averages), ``world_size``, ``num_elements`` (parameters that are exchanged),
        ``bytes_sent``, ``bytes_received``, ``uncompressed_bytes`` (what a float32 ring allreduce of all gradients would
        have sent for the same steps), ``compression_ratio`` (uncompressed over sent) and ``exchange_seconds`` (from the
        beginning to the end of averages).
        """
        result: dict[str, Any] = self._pqasgd_averager.value.communication_stats()
        return result

    def register_local_var(self, var: Any) -> None:
        """Keep a variable to this rank: neither its gradients nor its values are averaged; before the first step."""
        averager = self._pqasgd_averager.value
        if isinstance(averager, PeriodicAverager):
            if self.built:
                raise ArgumentError(
                    f"var is {name_of(var)!r}, and training has begun: register it before the first step"
                )
            if averager.averaging.moments != "local":
                raise ArgumentError(
                    f"var is {name_of(var)!r}, and moments is {averager.averaging.moments!r}: Keras does not tell "
                    "which ones are those of a local variable; use moments='local'"
                )
        self._pqasgd_local.value.append(unwrap(var))

    def _is_local(self, variable: Any) -> bool:
        return any(unwrap(variable) is local for local in self._pqasgd_local.value)

    def _find_model(self) -> Any:
        """Return the model that was compiled with this optimizer, or was named at construction."""
        if self._pqasgd_model.value is not None:
            return self._pqasgd_model.value
        # Keras tells an optimizer nothing of its model. This is done once, and takes about as long as a collection.
        for candidate in gc.get_objects():
            kind = type(candidate)
            if issubclass(kind, keras.optimizers.LossScaleOptimizer) and candidate.inner_optimizer is self:
                raise ArgumentError(
                    "the optimizer was wrapped in a LossScaleOptimizer after it was distributed, so that each rank "
                    "would decide by itself which steps to skip: pass "
                    "DistributedOptimizer(keras.optimizers.LossScaleOptimizer(optimizer), ...) to compile(), or set "
                    "the global dtype policy before the optimizer is distributed"
                )
            if issubclass(kind, keras.Model) and getattr(candidate, "optimizer", None) is self:
                return candidate
        return None

    def _find_buffers(self, model: Any, policy: str) -> list[Any]:
        if policy == "local":
            return []
        if model is None:
            if self._pqasgd_membership.value.carrier is not None and horovod.rank() == 0:
                logger.warning(
                    "no model was found that is compiled with this optimizer (after gc.freeze() none is), so "
                    "BatchNormalization's moving statistics are not known and not averaged: pass model=model, or "
                    "averaging=PeriodicAveraging(period=..., buffers='local') if that is meant"
                )
            return []
        found: list[Any] = []
        for layer in model._flatten_layers():
            if policy == "statistics" and not isinstance(layer, keras.layers.BatchNormalization):
                continue
            for variable in layer._non_trainable_variables:
                if keras.backend.is_float_dtype(variable.dtype) and not any(variable is other for other in found):
                    found.append(variable)
        return found


def switch_off_xla(model: Any) -> bool:
    """Let Keras not compile a model with XLA, and say so; return whether it would have."""
    if not getattr(model, "jit_compile", False):
        return False
    logger.warning("jit_compile=%s is set to False: XLA cannot compile Horovod's ops", model.jit_compile)
    model.jit_compile = False
    return True


def _check_kinds(model: Any, check_consistency: Any, gradient_predivide_factor: Any) -> None:
    """What else would be noticed in the first step, or never."""
    if model is not None and not isinstance(model, keras.Model):
        raise ArgumentError(f"model is {model!r}; it must be None or a keras.Model")
    check_flag("check_consistency", check_consistency)
    if not is_number(gradient_predivide_factor) or not 0 < gradient_predivide_factor < float("inf"):
        raise ArgumentError(
            f"gradient_predivide_factor is {gradient_predivide_factor!r}; it must be a number above 0, such as 1.0"
        )


def _check_saved(saved: dict[str, Any], expected: dict[str, tf.Variable]) -> None:
    shapes = [{key: list(np.shape(value)) for key, value in values.items()} for values in (saved, expected)]
    differences = [
        f"{PREFIX}{key} has shape {shapes[0].get(key, 'absent')} in the file and {shapes[1].get(key, 'absent')} here"
        for key in sorted({*saved, *expected})
        if shapes[0].get(key) != shapes[1].get(key)
    ]
    if differences:
        raise ArgumentError(
            f"the saved optimizer is not like this one: {'; '.join(differences)}. It was saved in a world of another "
            "size, with other settings or for another model: build the optimizer as it was, or load the weights alone"
        )


def _outside(tell: Telling | None) -> Telling | None:
    """Return what tells it also while a graph is made."""

    def tell_now(refusal: Mapping[str, Any]) -> None:
        assert tell is not None
        with outside_of_graphs():
            tell(refusal)

    return None if tell is None else tell_now


class _Hidden:
    """Something that Keras and TensorFlow are not to track."""

    def __init__(self, value: Any) -> None:
        self.value = value


def scaled(gradient: Any, factor: float) -> Any:
    """Return ``factor`` times a gradient, dense or sparse."""
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(gradient.values * factor, gradient.indices, gradient.dense_shape)
    return gradient * factor


def _assign_plain_means(variables: Sequence[tf.Variable], name: str, carrier: HorovodCarrier) -> None:
    def assign() -> None:
        for i, variable in enumerate(variables):
            gathered = allgather(variable.value()[None], f"{name}.{i}", carrier.process_set)
            variable.assign(tf.reduce_mean(gathered, axis=0))

    run_once(assign)


def make_class(inner_class: type[keras.optimizers.Optimizer]) -> Any:
    """Return the distributed subclass of an optimizer's class."""
    namespace = {"_inner_class": inner_class, "__doc__": inner_class.__doc__, "__module__": __name__}
    cls = type(REGISTERED_NAME, (DistributedMethods, inner_class), namespace)
    return keras.saving.register_keras_serializable(_PACKAGE, REGISTERED_NAME)(cls)


# Model files name the class; whichever was registered last makes the right one from the configuration.
make_class(keras.optimizers.SGD)


def _serialize_rule(rule: Rule) -> list[Any]:
    """Return a rule as a model file holds it; a function as Keras holds functions."""
    pattern, codec = rule.config()
    if isinstance(pattern, dict) and "function" in pattern:
        pattern = {"function": keras.saving.serialize_keras_object(rule.pattern)}
    return [pattern, codec]


def _deserialize_pattern(pattern: Any, custom_objects: Any) -> Any:
    if isinstance(pattern, dict) and "function" in pattern:
        return keras.saving.deserialize_keras_object(pattern["function"], custom_objects=custom_objects)
    return pattern_from_config(pattern)


def _from_settings(optimizer: Any, settings: dict[str, Any], custom_objects: Any = None) -> Any:
    known = dict(settings)
    codec, second, averaging = known.pop("codec"), known.pop("second_codec"), known.pop("averaging")
    known["process_set"] = _process_set_of(known["process_set"])
    known["feedback"] = feedback_from_config(known["feedback"])
    known["policy"] = [
        (_deserialize_pattern(pattern, custom_objects), CodecCompressor.from_config(config))
        for pattern, config in known["policy"]
    ]
    return distribute(
        optimizer,
        compression=CodecCompressor.from_config(codec),
        second_compression=None if second is None else CodecCompressor.from_config(second),
        averaging=PeriodicAveraging.from_config(averaging),
        **known,
    )


def _process_set_of(ranks: Sequence[int] | None) -> Any:
    if ranks is None:
        return horovod.global_process_set
    process_set = registered_process_set(horovod, ranks)
    if process_set is None:
        raise ArgumentError(
            f"the optimizer was saved with process_set of ranks {list(ranks)}, which is not registered: pass it to "
            "hvd.init(process_sets=[...]), or add it with hvd.add_process_set, before the model is loaded"
        )
    return process_set


def _check_optimizer(optimizer: Any) -> None:
    if keras.config.backend() != "tensorflow":
        raise ArgumentError(
            f"the backend of Keras is {keras.config.backend()!r}; it must be 'tensorflow': set KERAS_BACKEND="
            "tensorflow before Keras is imported"
        )
    if isinstance(optimizer, DistributedMethods):
        raise ArgumentError("optimizer is a DistributedOptimizer already; pass the plain optimizer")
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise ArgumentError(
            f"optimizer is a {type(optimizer).__module__}.{type(optimizer).__name__}; it must be a Keras 3 optimizer, "
            "such as keras.optimizers.SGD(0.1), which takes plain tf.Variables too"
        )


def check_op(op: Any, averaging: PeriodicAveraging, stock: bool, gradient_predivide_factor: float) -> None:
    """Raise ArgumentError unless gradients can be combined by ``op``."""
    if gradient_predivide_factor != 1.0 and op != horovod.Average:
        raise ArgumentError(
            f"gradient_predivide_factor is {gradient_predivide_factor} with op={op}; it needs op=hvd.Average"
        )
    if not averaging.exchanges_gradients and op != horovod.Average:
        raise ArgumentError(
            f"op is {op} with period={averaging.period}; replicas can only be averaged: use op=hvd.Average"
        )
    allowed = (horovod.Average, horovod.Sum, horovod.Adasum) if stock else (horovod.Average, horovod.Sum)
    if op not in allowed:
        raise ArgumentError(
            f"op is {op}; it must be hvd.Average or hvd.Sum, or, with Compression.none and period=1, hvd.Adasum"
        )


def _moments_of(optimizer: Any) -> list[Any]:
    """Return what a built optimizer keeps of its variables, but for copies of them and sums of gradients."""
    updater = _updater_of(optimizer)
    names = ("_learning_rate", "_u_product", "_accumulated_gradients", "_model_variables_moving_average")
    others = [id(other) for other in tf.nest.flatten([getattr(updater, name, None) for name in names])]
    return [v for v in updater.variables if keras.backend.is_float_dtype(v.dtype) and id(v) not in others]


def _check_moments(optimizer: Any, policy: str) -> None:
    updater = _updater_of(optimizer)
    counts = any(hasattr(updater, name) for name in ("beta_2", "adam_beta_2", "beta_2_decay"))
    if policy == "reset" and counts and not isinstance(updater, keras.optimizers.Lion):
        raise ArgumentError(
            f"moments is 'reset' and the optimizer is {type(updater).__name__}, which goes by its iterations, as "
            "learning rate schedules do, so that they cannot begin anew with the moments: use 'local' or 'average'"
        )


def _check_momentum(feedback: Feedback | None, optimizer: Any) -> None:
    """Raise ArgumentError if momentum is corrected and would be applied twice, or to gradients of changing scale."""
    if not isinstance(feedback, MomentumCorrection):
        return
    if _scales_loss(optimizer):
        raise ArgumentError(
            f"optimizer is a LossScaleOptimizer with feedback={feedback}; velocities of gradients of different scales "
            "cannot be added: train in float32 or bfloat16, without a loss scale"
        )
    check_no_momentum(feedback, [(name, getattr(optimizer, name, 0.0)) for name in ("momentum", "beta_1")])


def _scales_loss(optimizer: Any) -> bool:
    return isinstance(optimizer, keras.optimizers.LossScaleOptimizer)


def _updater_of(optimizer: Any) -> Any:
    """Return what changes variables: the optimizer, or the one in it that gets gradients without a scale."""
    return optimizer.inner_optimizer if _scales_loss(optimizer) else optimizer


def distribute(
    optimizer: Any,
    *,
    name: str | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = Compression.none,
    sparse_as_dense: bool = False,
    gradient_predivide_factor: float = 1.0,
    op: Any = horovod.Average,
    backward_passes_per_step: int = 1,
    average_aggregated_gradients: bool = False,
    num_groups: int = 0,
    groups: Any = None,
    process_set: Any = horovod.global_process_set,
    scale_local_gradients: bool = True,
    period: int | Schedule | None = None,
    averaging: PeriodicAveraging | None = None,
    second_compression: Any = None,
    exchange: str = "auto",
    small_tensor_threshold: int = DEFAULT_SMALL_TENSOR_THRESHOLD,
    bucket_cap_mb: float = DEFAULT_BUCKET_CAP_BYTES / 2**20,
    seed: int = 0,
    nonfinite: NonFinitePolicy = "raise",
    feedback: Feedback | None = None,
    policy: Sequence[tuple[Any, Any]] | None = None,
    hierarchy: str | None = None,
    model: Any = None,
    check_consistency: bool = False,
    anchor_device: str | None = None,
) -> Any:
    """Do what ``DistributedOptimizer`` of :mod:`pqasgd_horovod.tensorflow.keras` says."""
    membership = Membership(horovod, process_set, HorovodCarrier)
    with construct_together(membership):
        _check_optimizer(optimizer)
        backward_passes_per_step = check_integer("backward_passes_per_step", backward_passes_per_step, 1, 2**31)
        _check_kinds(model, check_consistency, gradient_predivide_factor)
        gradient_predivide_factor = float(gradient_predivide_factor)
        strategy = describe_outer(resolve_averaging(period, averaging))
        _check_moments(optimizer, strategy.moments)
        check_anchor_device(anchor_device)
        if strategy.buffers == "max_count":
            raise ArgumentError(
                "buffers is 'max_count', and Keras' BatchNormalization does not count its batches; steps cannot stand "
                "for them, as all ranks have made equally many when they average: use 'statistics', 'all' or 'local'"
            )
        codec = codec_of(compression)
        rules = make_policy(policy, codec_of)
        second_codec = None if second_compression is None else vector_codec_of(second_compression, "second_compression")
        stock = strategy.exchanges_gradients and not rules and (codec is None or codec.commutes_with_sum)
        if not stock and (codec is None or (second_compression is not None and second_codec is None)):
            raise ArgumentError(
                f"compression is {compression!r} with period={strategy.period}; a compressor of your own works with "
                "period=1 and no policy only, where Horovod averages: use one of pqasgd_horovod.tensorflow.Compression"
            )
        check_op(op, strategy, stock, gradient_predivide_factor)
        config = ExchangeConfig(
            codec or Compression.none.codec,
            second_codec,
            exchange,
            small_tensor_threshold,
            bucket_cap_mb,
            seed,
            nonfinite,
            feedback,
            rules,
            hierarchy,
        )
        if stock:
            check_not_stock(feedback, compression, hierarchy)
        if keras.config.dtype_policy().name == "mixed_float16" and not _scales_loss(optimizer):
            # As compile() would, but around the exchange: all ranks then skip the same steps.
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        _check_momentum(feedback, optimizer)
        if _scales_loss(optimizer) and strategy.exchanges_gradients and not stock:
            # An overflow is what a loss scale looks for, not an error.
            config = ExchangeConfig(**{**vars(config), "nonfinite": "propagate"})
        groups = check_groups(groups, num_groups, positions=True)
        gradients = GradientSettings(
            op, gradient_predivide_factor, groups, sparse_as_dense, device_dense, device_sparse
        )
        if hierarchy is not None:
            membership.find_nodes()
            if isinstance(membership.carrier, NodesCarrier):
                world: Any = membership.carrier.world
                world.nodes, membership.carrier = membership.carrier, world
        compressor = compression if codec is None else CodecCompressor(codec)
        averager = make_averager(
            strategy, config, gradients, compressor, stock, membership, check_consistency, anchor_device=anchor_device
        )
        inner_config = optimizer.get_config()
        if name is not None:
            inner_config["name"] = name
        wrapped = make_class(type(optimizer))._instantiate(inner_config)
        settings = {
            "codec": config.codec.config(),
            "second_codec": None if second_codec is None else second_codec.config(),
            "averaging": strategy.config(),
            "exchange": exchange,
            "small_tensor_threshold": config.small_tensor_threshold,
            "bucket_cap_mb": config.bucket_cap_mb,
            "seed": config.seed,
            "nonfinite": nonfinite,
            "feedback": None if feedback is None else feedback.config(),
            "policy": rules,
            "hierarchy": hierarchy,
            "check_consistency": check_consistency,
            "anchor_device": anchor_device,
            "sparse_as_dense": sparse_as_dense,
            "gradient_predivide_factor": gradient_predivide_factor,
            "op": op,
            "backward_passes_per_step": backward_passes_per_step,
            "average_aggregated_gradients": average_aggregated_gradients,
            "scale_local_gradients": scale_local_gradients,
            "device_dense": device_dense,
            "device_sparse": device_sparse,
            "groups": groups,
            "process_set": None if process_set is horovod.global_process_set else list(process_set.ranks),
        }
        wrapped._distribute(settings, membership, averager, model)
        membership.describe(
            type(optimizer).__name__,
            strategy,
            config,
            op=op,
            check_consistency=check_consistency,
            backward_passes_per_step=backward_passes_per_step,
        )
    return wrapped


def make_averager(
    averaging: PeriodicAveraging,
    config: ExchangeConfig,
    gradients: GradientSettings,
    compressor: Any,
    stock: bool,
    membership: Membership,
    check_consistency: bool,
    meeting: Meeting | None = None,
    anchor_device: str | None = None,
) -> PeriodicAverager | GradientAverager:
    """Return what averages: replicas, coded gradients, or gradients as Horovod does."""
    carrier: Any = membership.carrier
    if not averaging.exchanges_gradients:
        return PeriodicAverager(
            carrier,
            averaging,
            config,
            name=membership.name,
            check_consistency=check_consistency,
            anchor_device=anchor_device,
        )
    if not stock:
        return CodedGradients(
            carrier, gradients, config, name=membership.name, meeting=meeting, anchor_device=anchor_device
        )
    itemsize = 2 if config.codec.id == "fp16" else None
    return StockGradients(carrier, gradients, compressor, itemsize, name=membership.name, meeting=meeting)
