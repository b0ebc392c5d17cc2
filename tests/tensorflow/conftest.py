"""TensorFlow in one process, on one rank."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import pqasgd_horovod.tensorflow as hvd

hvd.init()
