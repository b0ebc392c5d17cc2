"""The parts of the trainer `scripts/train.py`: data, models, ranks, checkpoints and the log."""
