"""These tests run on as many ranks as a launcher starts (``make test-2``, ``make test-4``), or on one without."""

import os

import pytest

os.environ.setdefault("HOROVOD_DYNAMIC_PROCESS_SETS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")  # ranks share the cores

import keras
import tensorflow as tf

import pqasgd_horovod.tensorflow as hvd
from tests import heap

# Variables on the second one are somewhere else, as on a GPU (gpu.py).
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration() for _ in range(2)]
)
hvd.init()


@pytest.fixture(autouse=True)
def same_start():
    """Begin each test together, with the same random numbers, and the same names of layers, on every rank."""
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)
    heap.set_aside()
    hvd.allgather_object(None, name="test.start")
