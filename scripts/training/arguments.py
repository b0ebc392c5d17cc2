"""The command line of every trainer."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

CASTS = ("none", "fp16", "bf16")
QUANTIZERS = ("quantize", "eden", "maxscale", "qsgd")
"""Those with a number of bits."""


class Defaults(NamedTuple):
    """What a dataset is trained with if the command line does not say otherwise."""

    optimizer: str
    epochs: int
    batch_size: int
    weight_decay: float


DATASETS = {
    "digits": Defaults(optimizer="sgd", epochs=16, batch_size=32, weight_decay=0.0),
    "cifar10": Defaults(optimizer="sgd", epochs=30, batch_size=64, weight_decay=5e-4),
    "text": Defaults(optimizer="adamw", epochs=10, batch_size=16, weight_decay=0.01),
}
SOURCES = {"cifar10": "the folder cifar-10-batches-py", "text": "a text file"}
"""What --data names."""

LEARNING_RATES = {"sgd": 0.1, "adamw": 2e-3}
DEFAULT_BITS = 4
DEFAULT_PERIOD = 8

# What makes a run the run it is: a checkpoint is resumed with the same values only.
SETTINGS = (
    "dataset", "context", "optimizer", "lr", "weight_decay", "warmup", "epochs", "batch_size", "seed",
    "compression", "bits", "period",
)  # fmt: skip


def parse_arguments(
    description: str | None, argv: list[str] | None = None, datasets: Sequence[str] = tuple(DATASETS)
) -> argparse.Namespace:
    """Return the command line's settings, defaults filled in; wrong ones end the program with a message.

    `datasets` are those that the program has a model for.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("data and model")
    data.add_argument("--dataset", choices=datasets, default="digits", help="(%(default)s)")
    sources = " or ".join(wanted for dataset, wanted in SOURCES.items() if dataset in datasets)
    data.add_argument("--data", type=Path, metavar="PATH", help=sources)
    if "text" in datasets:
        help_text = "characters the text model sees (%(default)s)"
        data.add_argument("--context", type=positive(int), default=128, help=help_text)

    training = parser.add_argument_group("training; defaults depend on the dataset")
    training.add_argument("--optimizer", choices=LEARNING_RATES, help="SGD with momentum 0.9, or AdamW")
    rates = ", ".join(f"{rate} for {name}" for name, rate in LEARNING_RATES.items())
    training.add_argument("--lr", type=positive(float), help=f"highest learning rate, used as it is ({rates})")
    training.add_argument("--weight-decay", type=non_negative(float))
    training.add_argument("--warmup", type=fraction, default=0.05, help="part of the steps (%(default)s); then cosine")
    training.add_argument("--epochs", type=positive(int))
    training.add_argument("--batch-size", type=positive(int), help="examples per rank and step")
    training.add_argument("--seed", type=non_negative(int), default=0, help="(%(default)s)")
    training.add_argument("--threads", type=positive(int), help="per rank (cores / ranks on the machine)")

    sending = parser.add_argument_group("communication")
    compressions = ("stock", *CASTS, *QUANTIZERS, "terngrad", "natural", "signsgd", "onebit")
    sending.add_argument("--compression", choices=compressions, help="what bytes stand for the numbers (quantize)")
    sending.add_argument("--bits", type=positive(int), help=f"per number, of a quantizer ({DEFAULT_BITS})")
    sending.add_argument(
        "--period", type=positive(int), help=f"steps between averages; 1: gradients at each step ({DEFAULT_PERIOD})"
    )
    sending.add_argument("--stock", action="store_true", help="plain Horovod; same as --compression stock")

    files = parser.add_argument_group("evaluation and files")
    files.add_argument(
        "--eval-every", type=positive(int), metavar="STEPS", help="at the first average after these steps (an epoch)"
    )
    files.add_argument("--checkpoint", type=Path, metavar="FILE", help="written at each evaluation")
    files.add_argument("--resume", action="store_true", help="go on from the checkpoint, bit by bit as before")
    files.add_argument(
        "--stop-after",
        type=positive(int),
        metavar="STEPS",
        help="stop at the first average after these steps, with a checkpoint to resume; for time-limited queues",
    )
    # Not "--log": horovodrun takes that for an abbreviation of options of its own, wherever it stands.
    files.add_argument("--log-file", type=Path, metavar="FILE", help="losses, accuracies, bytes: a JSON object a line")
    files.add_argument("--quiet", action="store_true", help="no progress bar")

    args = parser.parse_args(argv)
    _fill_in_training(args)
    _fill_in_communication(args, parser)
    _check_files(args, parser)
    return args


def settings_of(args: argparse.Namespace, num_ranks: int) -> dict[str, Any]:
    """Return what makes the run the run it is."""
    return {name: getattr(args, name) for name in SETTINGS if name in args} | {"num_ranks": num_ranks}


def _fill_in_training(args: argparse.Namespace) -> None:
    for name, value in DATASETS[args.dataset]._asdict().items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.lr is None:
        args.lr = LEARNING_RATES[args.optimizer]


def _fill_in_communication(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if args.stock and args.compression not in (None, "stock"):
        parser.error(f"--stock and --compression {args.compression} exclude each other")
    args.stock = args.stock or args.compression == "stock"
    args.compression = "stock" if args.stock else args.compression or "quantize"
    if args.stock and args.period not in (None, 1):
        parser.error(f"--period {args.period} has no meaning with --stock, which averages gradients at each step")
    args.period = 1 if args.stock else args.period or DEFAULT_PERIOD
    if args.compression in QUANTIZERS:
        args.bits = args.bits or DEFAULT_BITS
    elif args.bits is not None:
        parser.error(f"--bits is for {', '.join(QUANTIZERS)}; it has no meaning with {args.compression}")


def _check_files(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if args.dataset == "digits" and args.data is not None:
        parser.error("--data has no meaning with --dataset digits, which come with scikit-learn")
    if args.dataset != "digits" and args.data is None:
        parser.error(f"--dataset {args.dataset} needs --data: {SOURCES[args.dataset]}")
    for option, value in (("--resume", args.resume), ("--stop-after", args.stop_after)):
        if value and args.checkpoint is None:
            parser.error(f"{option} needs --checkpoint FILE")


def positive(kind: type) -> Callable[[str], Any]:
    """Return an argparse type for finite numbers above zero."""
    return _ranged(kind, lambda value: 0 < value < math.inf, "> 0")


def non_negative(kind: type) -> Callable[[str], Any]:
    """Return an argparse type for finite numbers from zero up."""
    return _ranged(kind, lambda value: 0 <= value < math.inf, ">= 0")


def _ranged(kind: type, allowed: Callable[[Any], bool], text: str) -> Callable[[str], Any]:
    def parse(argument: str) -> Any:
        value = kind(argument)
        if not allowed(value):
            raise argparse.ArgumentTypeError(f"{argument} is not {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names the type when `kind` refuses
    return parse


fraction = _ranged(float, lambda value: 0 <= value <= 1, "between 0 and 1")
