"""Where a run is: its steps, its clock, its log and its bar; when to evaluate, and when to stop."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from training.arguments import settings_of
from training.log import JsonLog
from training.ranks import ring_allreduce_nbytes
from training.schedule import warmup_cosine


class Progress:
    """The same for all frameworks: they tell what they have done, and ask what is due.

    Args:
        args: the command line.
        rank: this rank, of `num_ranks`; rank 0 writes.
        num_ranks: the ranks of the job.
        steps_per_epoch: of each rank.
        num_parameters: of the model.
    """

    def __init__(
        self, args: argparse.Namespace, rank: int, num_ranks: int, *, steps_per_epoch: int, num_parameters: int
    ) -> None:
        self.args = args
        self.settings = settings_of(args, num_ranks)
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = args.epochs * steps_per_epoch
        self.num_parameters = num_parameters
        self.step = 0
        self.rate_factor = warmup_cosine(round(args.warmup * self.total_steps), self.total_steps)
        self._rank, self._num_ranks = rank, num_ranks
        self._seconds = 0.0
        self._bytes_before = 0
        self._accuracy = 0.0
        self._log = JsonLog(None)

    # What a checkpoint holds.

    def common_state(self) -> dict[str, Any]:
        """Return what all ranks have in common."""
        return {"settings": self.settings, "step": self.step, "seconds": self._seconds}

    def resume(self, common: dict[str, Any], bytes_sent: int) -> None:
        """Take over what `common_state` has returned, and the bytes that this rank had sent."""
        self.step, self._seconds, self._bytes_before = common["step"], common["seconds"], bytes_sent

    # What is due.

    @property
    def learning_rate(self) -> float:
        """The rate of the next step."""
        return float(self.args.lr * self.rate_factor(self.step))

    @property
    def is_complete(self) -> bool:
        """Whether that was the last step of all."""
        return self.step == self.total_steps

    @property
    def evaluation_is_due(self) -> bool:
        """Whether to evaluate now: between averages each rank has a model of its own."""
        averaged = self.is_complete or self.step % self.args.period == 0
        return averaged and (self.step >= self._due or self.is_over)

    @property
    def is_over(self) -> bool:
        """Whether to stop now, if ranks have averaged."""
        return self.step >= min(self.args.stop_after or self.total_steps, self.total_steps)

    # What was sent.

    def bytes_sent(self, counted: int | None) -> int:
        """Return what this rank has sent to train, before a resume included; `counted` is None if nobody counts."""
        return self._uncompressed_bytes if counted is None else self._bytes_before + counted

    @property
    def _uncompressed_bytes(self) -> int:
        """What each rank sends in as many steps if all gradients travel as float32, by the ring formula."""
        return self.step * ring_allreduce_nbytes(self.num_parameters, self._num_ranks)

    # What was done.

    def start(self, sizes: tuple[int, int]) -> None:
        """Begin; `sizes` are the numbers of training and test examples."""
        args = self.args
        self._log = JsonLog(args.log_file if self._rank == 0 else None, self.step if args.resume else None)
        self._log.write(
            "start",
            step=self.step,
            total_steps=self.total_steps,
            parameters=self.num_parameters,
            train_examples=sizes[0],
            test_examples=sizes[1],
            settings=self.settings,
            losses="training: of rank 0's batch; test: of all test data",
            bytes="2 (n - 1) / n * 4 * parameters per step, the ring formula" if args.stock else "counted by optimizer",
        )
        self._bar = tqdm(
            total=self.total_steps,
            initial=self.step,
            unit="step",
            disable=args.quiet or self._rank != 0,
            mininterval=0.2 if sys.stderr.isatty() else 10,
        )
        self._set_due()
        self._started = time.perf_counter() - self._seconds

    def _set_due(self) -> None:
        every = self.args.eval_every or self.steps_per_epoch
        self._due = (self.step // every + 1) * every

    def count_step(self, loss: float, counted_bytes: int | None) -> None:
        """Count a step."""
        learning_rate = self.learning_rate
        self.step += 1
        sent = self.bytes_sent(counted_bytes)
        self._log.write("step", step=self.step, loss=loss, learning_rate=learning_rate, bytes_sent=sent)
        self._bar.update()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Stop the clock to evaluate and to save."""
        self._seconds = time.perf_counter() - self._started
        yield
        self._started = time.perf_counter() - self._seconds

    def evaluated(self, loss: float, accuracy: float, counted_bytes: int | None) -> None:
        """Report an evaluation."""
        self._accuracy = accuracy
        self._set_due()
        self._bar.set_postfix(test_loss=f"{loss:.3f}", accuracy=f"{accuracy:.2%}")
        sent = self.bytes_sent(counted_bytes)
        self._log.write("eval", step=self.step, loss=loss, accuracy=accuracy, bytes_sent=sent)

    def end(self, counted_bytes: int | None) -> None:
        """End here, with a line on the screen, and one in the log if all steps are done."""
        self._bar.close()
        sent, uncompressed = self.bytes_sent(counted_bytes), self._uncompressed_bytes
        ratio = uncompressed / sent if sent else None
        if self.is_complete:
            self._log.write(
                "end",
                step=self.step,
                final_test_accuracy=self._accuracy,
                bytes_sent=sent,
                uncompressed_bytes=uncompressed,
                compression_ratio=ratio,
                seconds=self._seconds,
            )
        self._log.close()
        if self._rank == 0:
            sending = "nothing sent" if ratio is None else f"{sent / 1e6:,.2f} MB sent per rank, ratio {ratio:,.1f}"
            print(f"step {self.step}: test accuracy {self._accuracy:.2%}, {sending}, {self._seconds:.1f} s", flush=True)
