"""Numbers on a GPU: the same bits, in the same messages, as on a CPU; ranks of both kinds can train together.

The GPU is a CPU that runs the kernels thread by thread: tests/native/cuda_on_cpu.
"""

from __future__ import annotations

import gc

import numpy as np
import pytest

from pqasgd_horovod import codecs
from pqasgd_horovod.averaging import (
    AdaptivePeriod,
    ArrayView,
    ExchangeConfig,
    Feedback,
    GradientAverager,
    MomentumCorrection,
    Nesterov,
    PeriodicAverager,
    PeriodicAveraging,
    SparseAveraging,
)
from pqasgd_horovod.averaging.policy import Rule
from pqasgd_horovod.errors import ArgumentError, DeviceError, MismatchError, NonFiniteError, PqasgdError
from pqasgd_horovod.exchange.carriers.threads import run_ranks

from ..exchange.test_node import nodes_of
from ..native.cuda_on_cpu import DeviceCarrier, load, make_device

SHAPES = {"w": ((90, 100), "float32"), "b": (7, "float32"), "d": (1500, "float64"), "h": ((30, 40), "float16")}
RANKS = 3
EDEN = codecs.eden(bits=2)


def on_ranks(num_ranks, program, *arguments, **options):
    return run_ranks(num_ranks, lambda carrier: program(carrier, *arguments, **options))


def make_views(device, seed):
    """Arrays in memory of ``device``, or of the host."""
    generator = np.random.default_rng(seed)
    views = []
    for name, (size, dtype) in SHAPES.items():
        array = generator.standard_normal(size).astype(dtype)
        if device is not None:
            copy = device.zeros(array.size, dtype).reshape(size)
            copy[:] = array
            array = copy
        views.append(ArrayView(name, array, device))
    return views


def train(carrier, devices, averaging, num_steps=9, **options):
    device = devices[carrier.rank]
    config = ExchangeConfig(**{"codec": EDEN, **options})
    averager = PeriodicAverager(carrier, averaging, config, name="test", check_consistency=True)
    views = make_views(device, seed=1)
    averager.prepare(views)
    for step in range(num_steps):
        for view in views:
            noise = np.random.default_rng([carrier.rank, step, view.numel])
            view.array += (0.01 * noise.standard_normal(view.array.shape)).astype(view.array.dtype)
        averager.count_step(0.1)
    averager.flush()
    state = averager.state_dict()
    return (
        [view.array.tobytes() for view in views],
        {kind: {name: a.tobytes() for name, a in state[kind].items()} for kind in ("anchor", "residual", "momentum")},
        averager.communication_stats()["bytes_sent"],
    )


CASES = {
    "eden": ({}, {}),
    "allgather": ({}, {"method": "allgather", "codec": codecs.maxscale(bits=4)}),
    "feedback": ({}, {"feedback": Feedback()}),
    "topk": ({}, {"codec": codecs.topk(0.1), "feedback": Feedback()}),
    "randomk": ({}, {"codec": codecs.randomk(0.1), "feedback": Feedback(), "method": "two_phase"}),
    "powersgd": ({}, {"codec": codecs.powersgd(2), "feedback": Feedback()}),
    "powersgd-delay": ({"delay": 1}, {"codec": codecs.powersgd(2), "feedback": Feedback()}),
    "policy": ({}, {"policy": (Rule("w", codecs.natural()), Rule("*", codecs.onebit()))}),
    "nesterov": ({"outer": Nesterov()}, {}),
    "adaptive": ({"period": AdaptivePeriod(first=2, calibration_steps=4)}, {}),
    "delay": ({"delay": 1}, {"codec": codecs.qsgd(bits=4)}),
}


@pytest.mark.parametrize("on_host", [False, True], ids=["beside", "on-host"])
@pytest.mark.parametrize("case", CASES)
def test_periodic_averages_have_the_bits_of_cpus(case, on_host):
    strategy, options = CASES[case]
    averaging = PeriodicAveraging(**{"period": 2, **strategy})
    cpus = on_ranks(RANKS, train, [None] * RANKS, averaging, **options)
    gpus = on_ranks(RANKS, train, [make_device(on_host) for _ in range(RANKS)], averaging, **options)
    assert gpus == cpus
    both = on_ranks(RANKS, train, [None, make_device(on_host), None], averaging, **options)
    assert both == cpus


def test_sparse_averages_have_the_bits_of_cpus():
    averaging = SparseAveraging(period=4)
    cpus = on_ranks(RANKS, train, [None] * RANKS, averaging, codec=codecs.none())
    assert on_ranks(RANKS, train, [make_device(), None, make_device()], averaging, codec=codecs.none()) == cpus


def test_hierarchies_have_the_bits_of_cpus():
    def program(carrier, devices):
        return train(nodes_of(carrier, 2), devices, PeriodicAveraging(period=2), hierarchy="node")

    cpus = on_ranks(4, program, [None] * 4)
    assert on_ranks(4, program, [make_device(), None, make_device(), make_device()]) == cpus

    sent = []

    def from_devices(carrier, devices):
        carrier = DeviceCarrier(carrier)
        found = program(carrier, devices)
        sent.append({name.split(".")[2] for name in carrier.names})
        return found

    assert on_ranks(4, from_devices, [make_device(index=index) for index in range(4)]) == cpus
    assert set.intersection(*sent) == {"node"}
    assert set.union(*sent) == {"across", "node"}  # each bucket is the work of one rank of a node


def step_gradients(carrier, devices, num_steps=4, poison=None, **options):
    device = devices[carrier.rank]
    averager = GradientAverager(
        carrier, ExchangeConfig(**{"codec": EDEN, **options}), name="test", check_consistency=True
    )
    views = make_views(device, seed=carrier.rank)
    averager.prepare(views)
    found = []
    for step in range(num_steps):
        for view in views:
            view.array[:] = np.random.default_rng([carrier.rank, step, view.numel]).standard_normal(view.array.shape)
        if poison == (carrier.rank, step):
            views[0].array.flat[5] = np.inf
        for view in reversed(views):
            averager.ready(view.name)
        try:
            averager.finish()
        except NonFiniteError as error:
            found.append(str(error))
        found.append([view.array.tobytes() for view in views])
    return found, {name: a.tobytes() for name, a in averager.state_dict()["residual"].items()}


@pytest.mark.parametrize(
    "options",
    [
        {"method": "two_phase"},
        {"method": "allgather", "feedback": Feedback()},
        {"codec": codecs.topk(0.05), "feedback": MomentumCorrection(momentum=0.9, clip_norm=1.0)},
        {"codec": codecs.signsgd(majority_vote=True, scaled=False)},
        {"codec": codecs.powersgd(2), "feedback": Feedback()},
        {"codec": codecs.powersgd(2), "feedback": MomentumCorrection(momentum=0.9)},
    ],
    ids=["two_phase", "feedback", "dgc", "vote", "powersgd", "powersgd-dgc"],
)
def test_gradients_have_the_bits_of_cpus(options):
    cpus = on_ranks(RANKS, step_gradients, [None] * RANKS, **options)
    assert on_ranks(RANKS, step_gradients, [make_device(), make_device(), None], **options) == cpus


@pytest.mark.parametrize("method", ["two_phase", "allgather"])
@pytest.mark.parametrize("rank", [0, 2])
def test_numbers_that_are_not_finite_are_one_error_on_all_ranks(method, rank):
    devices = [make_device(), make_device(), None]
    cpus = on_ranks(RANKS, step_gradients, [None] * RANKS, poison=(rank, 1), method=method)
    gpus = on_ranks(RANKS, step_gradients, devices, poison=(rank, 1), method=method)
    assert gpus == cpus
    assert "NaN" in gpus[0][0][1]


def test_join_serves_zeros():
    def program(carrier, devices):
        device = devices[carrier.rank]
        averager = PeriodicAverager(
            carrier, PeriodicAveraging(period=2), ExchangeConfig(EDEN, feedback=Feedback()), name="test"
        )
        views = make_views(device, seed=1)
        averager.prepare(views)
        for step in range(1 + 2 * carrier.rank):
            views[0].array += np.float32(0.1 * step + 0.01 * carrier.rank)
            averager.count_step()
        return averager.join(), [view.array.tobytes() for view in views]

    cpus = on_ranks(RANKS, program, [None] * RANKS)
    assert on_ranks(RANKS, program, [make_device() for _ in range(RANKS)]) == cpus


@pytest.mark.parametrize(
    ("program", "options"),
    [
        (train, {"averaging": PeriodicAveraging(period=2, outer=Nesterov()), "feedback": Feedback()}),
        (train, {"averaging": SparseAveraging(period=4), "codec": codecs.randomk(0.1), "method": "two_phase"}),
        (step_gradients, {"codec": codecs.topk(0.05), "feedback": MomentumCorrection(momentum=0.9)}),
        (step_gradients, {"codec": codecs.signsgd(majority_vote=True), "poison": (1, 1)}),
    ],
    ids=["feedback", "sparse", "dgc", "vote"],
)
def test_messages_on_devices_change_nothing(program, options):
    sent = []

    def on_devices(carrier, devices, **options):
        carrier = DeviceCarrier(carrier)
        found = program(carrier, devices, **options)
        sent.append(len(carrier.names))
        return found

    cpus = on_ranks(RANKS, program, [None] * RANKS, **options)
    assert on_ranks(RANKS, on_devices, [make_device(index=index) for index in range(RANKS)], **options) == cpus
    assert len(sent) == RANKS
    assert min(sent) > 0


class Distant(ArrayView):
    """An array in memory of a GPU that the host does not reach, as a framework's tensors are: to touch it is fatal."""

    def __init__(self, view):
        super().__init__(view.name, view.array, make_device())
        self._memory = self.device.device_messages_memory(view.array.nbytes)
        self._copy(self._memory.pointer, self.array.ctypes.data)

    def pointer(self):
        return self._memory.pointer

    def fetch(self):
        self._copy(self.array.ctypes.data, self._memory.pointer)
        return self.array.tobytes()

    def _copy(self, to, origin):
        self.device.run("copy", to, origin, self.array.nbytes)


@pytest.mark.parametrize("codec", [EDEN, codecs.topk(0.1), codecs.powersgd(2)], ids=str)
def test_tensors_are_not_touched_by_the_host(codec):
    def program(carrier, is_distant):
        config = ExchangeConfig(codec, feedback=Feedback())
        periodic = PeriodicAverager(carrier, PeriodicAveraging(period=1, outer=Nesterov()), config, name="periodic")
        gradients = GradientAverager(carrier, config, name="gradients")
        found = []
        for averager in (periodic, gradients):
            views = make_views(None, seed=1 if averager is periodic else carrier.rank)
            views = [Distant(view) for view in views] if is_distant else views
            averager.prepare(views)
            for _ in range(2):
                averager.count_step(0.1) if averager is periodic else averager.finish()
            found.append([view.fetch() if is_distant else view.array.tobytes() for view in views])
        return found

    assert on_ranks(2, program, True) == on_ranks(2, program, False)


def test_mixed_tensors_are_refused():
    views = [*make_views(make_device(), 1)[:1], *make_views(None, 1)[1:]]

    def program(carrier):
        averager = PeriodicAverager(carrier, PeriodicAveraging(period=2), ExchangeConfig(EDEN), name="test")
        with pytest.raises(ArgumentError, match="b is on cpu, w is on cuda:0; all tensors of an optimizer must be on"):
            averager.prepare([views[0], views[1]])

    run_ranks(2, program)


def test_out_of_memory_says_what_to_do():
    device, library = make_device(), load()._library
    library.pq_cuda_on_cpu_limit(1000)
    try:
        with pytest.raises(
            DeviceError, match=r"40,000 bytes of memory .* on cuda:0: .*out of memory.*anchor_device='cpu'"
        ):
            device.zeros(10000)
        with pytest.raises(DeviceError, match=r"40,000 bytes .* on cuda:0: .*out of memory.*PQASGD_GPU_MESSAGES=host"):
            device.device_messages_memory(40000)
    finally:
        library.pq_cuda_on_cpu_limit(-1)
    assert not device.zeros(10000).any()


@pytest.fixture
def limit():
    """Let GPUs have so many more bytes."""
    library = load()._library
    yield library.pq_cuda_on_cpu_limit
    library.pq_cuda_on_cpu_limit(-1)


MANY = 100_000  # so many that a round needs more memory than those of other tests


@pytest.mark.parametrize("kind", ["periodic", "gradients"])
@pytest.mark.parametrize("left", [0, 5 * MANY], ids=["none", "for anchors"])
def test_all_ranks_learn_of_one_that_has_no_memory(kind, left, limit):
    device = make_device()
    array = device.zeros(MANY)

    def program(carrier):
        averager = (
            PeriodicAverager(carrier, PeriodicAveraging(period=2), ExchangeConfig(EDEN), name="test")
            if kind == "periodic"
            else GradientAverager(carrier, ExchangeConfig(EDEN, feedback=Feedback()), name="test")
        )
        of_rank = ArrayView("w", array, device) if carrier.rank == 1 else ArrayView("w", np.zeros(MANY, np.float32))
        with pytest.raises(PqasgdError, match=r"on cuda:0: .*out of memory.*(anchor_device='cpu'|bucket_cap_mb)") as e:
            averager.prepare([of_rank])
        return type(e.value)

    limit(left)
    errors = on_ranks(RANKS, program)
    assert errors[0] is errors[2] is MismatchError
    assert errors[1] in (MismatchError, DeviceError)  # before, or after the ranks have compared layouts
    limit(-1)
    on_ranks(RANKS, train, [None, device, None], PeriodicAveraging(period=2))


@pytest.mark.parametrize(
    ("case", "joins"), [*((case, False) for case in [*CASES, "dgc"]), ("feedback", True), ("dgc", True)]
)
def test_rounds_need_no_memory(case, joins, limit):
    devices = [make_device(index=index, host_messages="tested") for index in range(RANKS)]

    def program(carrier):
        views = [
            ArrayView(view.name, np.tile(view.array, 4), devices[carrier.rank])
            for view in make_views(None, seed=carrier.rank if case == "dgc" else 1)
        ]
        if case == "dgc":
            correction = MomentumCorrection(momentum=0.9, clip_norm=1.0)
            averager = GradientAverager(carrier, ExchangeConfig(codecs.topk(0.05), feedback=correction), name="test")
        else:
            strategy, options = CASES[case]
            averaging = PeriodicAveraging(**{"period": 2, **strategy})
            averager = PeriodicAverager(carrier, averaging, ExchangeConfig(**{"codec": EDEN, **options}), name="test")
        averager.prepare(views)
        limit(0)
        for _ in range(4 + 2 * carrier.rank if joins else 4):
            averager.finish() if case == "dgc" else averager.count_step(0.1)
        if joins:
            averager.join()

    on_ranks(RANKS, program)


def test_rounds_of_many_tensors_need_no_memory(limit):
    device = make_device()

    def program(carrier):
        averager = GradientAverager(carrier, ExchangeConfig(EDEN), name="test")
        averager.prepare([ArrayView(f"w{i}", device.zeros(1), device) for i in range(3000)])
        limit(0)
        averager.finish()

    on_ranks(2, program)


def test_a_layout_that_fails_leaves_others_their_memory(limit):
    device = make_device()

    def program(carrier):
        averagers = [GradientAverager(carrier, ExchangeConfig(EDEN), name=name) for name in ("small", "large")]
        views = [[ArrayView("w", device.zeros(size), device)] for size in (3 * MANY, 5 * MANY)]
        averagers[0].prepare(views[0])
        limit(100)
        with pytest.raises(DeviceError, match="out of memory"):
            averagers[1].prepare(views[1])
        averagers[0].finish()

    on_ranks(2, program)


def test_a_refusal_while_an_average_is_under_way():
    device = make_device()

    def program(carrier):
        averaging = PeriodicAveraging(period=2, delay=1)
        averager = PeriodicAverager(carrier, averaging, ExchangeConfig(EDEN), name="test", check_consistency=True)
        view = ArrayView("w", np.zeros(100, np.float32))
        averager.prepare([view])
        for _ in range(2):
            averager.count_step()
        other = ArrayView("v", device.zeros(5), device) if carrier.rank else ArrayView("v", np.zeros(5, np.float32))
        with pytest.raises(PqasgdError, match="w is on cpu, v is on cuda:0; all tensors") as e:
            averager.prepare([view, other])
        averager.prepare([view])
        averager.count_step()
        return type(e.value)

    assert on_ranks(2, program) == [MismatchError, MismatchError]


def test_a_moment_on_another_device():
    class Moments:
        def __init__(self, device):
            self._view = ArrayView("m", make_device().zeros(5) if device else np.zeros(5, np.float32), device)

        def views(self):
            return [self._view]

    def program(carrier):
        averager = PeriodicAverager(
            carrier,
            PeriodicAveraging(period=2, moments="average"),
            ExchangeConfig(EDEN),
            name="test",
            moments=Moments(make_device() if carrier.rank else None),
        )
        averager.prepare([ArrayView("w", np.zeros(100, np.float32))])
        averager.count_step()
        with pytest.raises(PqasgdError, match="w is on cpu, m is on cuda:0; all tensors") as e:
            averager.count_step()
        return type(e.value)

    assert on_ranks(2, program) == [MismatchError, MismatchError]


def test_memory_is_given_back():
    library = load()._library
    gc.collect()
    before = library.pq_cuda_on_cpu_allocated()
    arrays = [make_device().zeros(100, np.float64), make_device(True).zeros(3), make_device().device_messages_memory(7)]
    assert library.pq_cuda_on_cpu_allocated() == before + 3
    view = arrays[0][10:20]
    arrays.clear()
    gc.collect()
    assert library.pq_cuda_on_cpu_allocated() == before + 1
    view[:] = 1
    del view
    gc.collect()
    assert library.pq_cuda_on_cpu_allocated() == before


def test_a_device_that_is_not_there():
    from pqasgd_horovod.native.cuda import Device

    with pytest.raises(DeviceError, match="invalid device ordinal"):
        Device(5, library=load()).zeros(10)
