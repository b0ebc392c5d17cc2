"""Communication-efficient distributed training for Horovod: periodic quantized averaging SGD and its family.

Import a front end (``pqasgd_horovod.torch``); this package itself imports no framework.
"""

__version__ = "0.1.0"
