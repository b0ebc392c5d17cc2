"""The parts of `scripts/train.py` that are PyTorch's."""
