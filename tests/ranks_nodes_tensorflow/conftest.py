"""These tests run on two nodes of two ranks each, two names of this machine: tests/test_ranks.py starts them."""

from tests.ranks_tensorflow.conftest import same_start as same_start  # initialises Horovod, too
