"""The parts of the trainers.

Here: what needs no framework, and imports none. In `torch` and `tensorflow`: the models, and what else is theirs.
"""
