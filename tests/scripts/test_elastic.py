"""A rank of an elastic job is lost and another one takes its place: training goes on, with the same bits everywhere."""

from __future__ import annotations

import re
import socket
import sys
from pathlib import Path

import pytest

from .launch import BIN, launch


@pytest.mark.long
@pytest.mark.timeout(260)
def test_a_rank_that_is_lost_is_replaced(tmp_path):
    hosts = tmp_path / "hosts.sh"
    hosts.write_text(  # three names of this machine are three hosts
        "#!/bin/sh\necho localhost:2\necho 127.0.0.1:1\n"
        f"if [ -e {tmp_path / 'replacement'} ]; then echo {socket.gethostname()}:1; fi\n"
    )
    hosts.chmod(0o755)
    ranks = ["-np", "3", "--min-np", "3", "--max-np", "3", "--network-interface", "lo"]
    program = [sys.executable, str(Path(__file__).with_name("elastic.py")), str(tmp_path)]
    command = [str(BIN / "horovodrun"), "--gloo", *ranks, "--host-discovery-script", str(hosts), *program]
    result = launch(command, launcher="python")
    assert result.returncode == 0, result.stdout
    assert re.findall(r"from step \d+ as one of \d", result.stdout) == [
        *["from step 0 as one of 3"] * 3,
        *["from step 16 as one of 3"] * 3,
    ]
    ends = re.findall(r"the end: (\w+)", result.stdout)
    assert len(ends) == 3
    assert len(set(ends)) == 1
