"""TensorFlow in one process, on one rank."""

import os

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import pqasgd_horovod.tensorflow as hvd
from tests import heap

hvd.init()


@pytest.fixture(autouse=True)
def light_heap():
    """Begin each test without the graphs of those before."""
    heap.set_aside()
