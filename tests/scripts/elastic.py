"""Trains in Horovod's elastic mode; the rank on the host 127.0.0.1 is killed, and a host is there to replace it.

horovodrun --gloo -np 3 --host-discovery-script hosts.sh python elastic.py FOLDER
"""

import hashlib
import os
import signal
import sys
import time
from pathlib import Path

import torch

import pqasgd_horovod.torch as hvd

PERIOD = 4


def main(folder: Path) -> None:
    hvd.init()
    model = torch.nn.Linear(64, 32)
    state = hvd.elastic.TorchState(model=model, step=0)

    @hvd.elastic.run
    def train(state: hvd.elastic.TorchState) -> None:
        print(f"from step {state.step} as one of {hvd.size()}", flush=True)
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
            model.named_parameters(),
            compression=hvd.Compression.quantize(bits=4),
            period=PERIOD,
        )
        while state.step < 40:
            optimizer.zero_grad()
            model(torch.randn(8, 64)).square().mean().backward()
            optimizer.step()
            state.step += 1
            if state.step % (2 * PERIOD) == 0:
                state.commit()
            if state.step == 20 and os.environ["HOROVOD_HOSTNAME"] == "127.0.0.1":
                (folder / "replacement").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.02)
        optimizer.flush()
        print(f"the end: {hashlib.sha256(model.weight.detach().numpy().tobytes()).hexdigest()}", flush=True)

    train(state)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
