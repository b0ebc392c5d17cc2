"""How coded bytes become the mean on every rank.

>>> from pqasgd_horovod.exchange import choose_exchange, cut_buckets, make_exchange, verify_same
"""

from __future__ import annotations

from .base import Exchange
from .carriers import Carrier, Handle
from .handshake import verify_same
from .layout import DEFAULT_BUCKET_CAP_BYTES, cut_buckets
from .low_rank import LowRankExchange
from .placement import verify_and_place
from .plan import choose_exchange, describe_exchange, make_exchange

__all__ = [
    "DEFAULT_BUCKET_CAP_BYTES",
    "Carrier",
    "Exchange",
    "Handle",
    "LowRankExchange",
    "choose_exchange",
    "cut_buckets",
    "describe_exchange",
    "make_exchange",
    "verify_and_place",
    "verify_same",
]
