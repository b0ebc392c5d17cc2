"""Run a two-rank MPI job on one machine as if on two hosts joined by a slow link, and leave nothing behind.

    python scripts/two_hosts.py --rate 1gbit -- python train.py
    python scripts/two_hosts.py --link loopback -- python train.py

`--link shaped` gives every rank a network namespace of its own; a veth pair (eth0 on both sides) joins them, and a
token bucket shapes both directions. `--link loopback` runs both ranks over TCP on the loopback interface of one private
namespace. Everything happens inside fresh network, mount and process namespaces: the counters in /proc/net/dev count
this job only, and when the command ends, fails or is killed the kernel ends every process in there and removes the
interfaces. Ordinary users get a user namespace as well, where the system allows them one. Needs Linux, util-linux
(unshare) and iproute2 (ip, tc).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

LINKS = ("shaped", "loopback")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
INTERFACE = {"shaped": "eth0", "loopback": "lo"}
_RUN = Path("/run")  # replaced by a private tmpfs inside: `ip netns` keeps its mount points there
_AGENT = _RUN / "remote_shell"


class NotAvailableError(RuntimeError):
    """This machine cannot give us the namespaces; the message says why."""


def _sandbox_command() -> list[str]:
    tools = {
        name: shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
        for name in ("unshare", "ip", "tc")
    }
    missing = [name for name, path in tools.items() if path is None]
    if not sys.platform.startswith("linux"):
        raise NotAvailableError(f"network namespaces need Linux, and this is {sys.platform}")
    if missing:
        raise NotAvailableError(
            f"not found: {', '.join(missing)}; install util-linux and iproute2 (Debian: apt-get install iproute2)"
        )
    command = [str(tools["unshare"]), "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if os.geteuid() != 0:
        command += ["--user", "--map-root-user"]
    return command


def command_line(link: str, rate: str, mpirun_arguments: Sequence[str], command: Sequence[str]) -> list[str]:
    """The argument vector that runs `command` on two ranks; raises NotAvailableError if a tool is missing."""
    own = [sys.executable, os.path.abspath(__file__), "--inside", "--link", link, "--rate", rate]
    own += [f"--mpirun={argument}" for argument in mpirun_arguments]
    return [*_sandbox_command(), *own, "--", *command]


def check_available(link: str = "shaped", rate: str = "1gbit") -> None:
    """Set the namespaces up and throw them away again; raises NotAvailableError with the reason if that fails."""
    arguments = command_line(link, rate, (), ())
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    if result.returncode != 0:
        reason = "; ".join(result.stderr.strip().splitlines()[-2:]) or f"exit status {result.returncode}"
        raise NotAvailableError(f"namespaces cannot be made here: {reason}")


def run(
    link: str,
    command: Sequence[str],
    *,
    rate: str = "1gbit",
    mpirun_arguments: Sequence[str] = (),
    timeout: float | None = None,
) -> int:
    """Run `command` on two ranks and return its exit status.

    On timeout (subprocess.TimeoutExpired), error or Ctrl-C everything in there is ended.
    """
    # unshare's --kill-child ends the first process in there, and with it the kernel ends all the others.
    return _wait(subprocess.Popen(command_line(link, rate, mpirun_arguments, command)), timeout, kill_at_once=True)


def run_here(command: Sequence[str], *, mpirun_arguments: Sequence[str] = (), timeout: float | None = None) -> int:
    """Run `command` on two ranks over this host's own loopback interface, where there are no namespaces to be had."""
    return _wait(subprocess.Popen(_mpirun("loopback", mpirun_arguments, command)), timeout, kill_at_once=False)


def _wait(process: subprocess.Popen[bytes], timeout: float | None, kill_at_once: bool) -> int:
    try:
        return process.wait(timeout)
    except BaseException:
        if not kill_at_once:  # mpirun ends its ranks when it is asked to end
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
        process.kill()
        process.wait()
        raise


def end_on_sigterm() -> None:
    """Let SIGTERM unwind the program as Ctrl-C does, so that what it has started is ended with it.

    The first process of a process namespace would even ignore the signal if it had no handler.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def find_mpirun() -> str:
    """The mpirun that belongs to this Python, else the first one on the PATH."""
    beside = Path(sys.executable).parent / "mpirun"
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        raise NotAvailableError("mpirun was found neither beside this Python nor on the PATH; install Open MPI")
    return found


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _set_up(link: str, rate: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(_RUN)], check=True)
    _ip("link", "set", "lo", "up")
    if link == "loopback":
        return
    for index in (1, 2):
        _ip("netns", "add", f"w{index}")
    _ip("link", "add", "eth0", "netns", "w1", "type", "veth", "peer", "name", "eth0", "netns", "w2")
    for index, address in enumerate(ADDRESSES, start=1):
        _ip("-n", f"w{index}", "address", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", f"w{index}", "link", "set", device, "up")
        shape = f"tc qdisc replace dev eth0 root tbf rate {rate} burst 256kb latency 50ms"
        _ip("netns", "exec", f"w{index}", *shape.split())
    # mpirun starts the daemon of the second host as it would with ssh: AGENT host command...
    _AGENT.write_text('#!/bin/sh\nhost=$1\nshift\nexec ip netns exec "w${host##*.}" /bin/sh -c "$*"\n')
    _AGENT.chmod(0o755)


def _mpirun(link: str, extra: Sequence[str], command: Sequence[str]) -> list[str]:
    interface = INTERFACE[link]
    arguments = [find_mpirun(), "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-np", "2"]
    arguments += [
        "--mca",
        "btl",
        "tcp,self",
        "--mca",
        "pml",
        "ob1",
    ]  # over the interface, on one host too, so that bytes can be counted
    arguments += ["--mca", "btl_tcp_if_include", interface, "--mca", "oob_tcp_if_include", interface]
    if link == "shaped":
        arguments = ["ip", "netns", "exec", "w1", *arguments]
        arguments += ["--mca", "plm_rsh_agent", str(_AGENT), "-H", ",".join(f"{address}:1" for address in ADDRESSES)]
    return [*arguments, *extra, *command]


def _inside(link: str, rate: str, mpirun_arguments: Sequence[str], command: Sequence[str]) -> int:
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # the first process of a namespace ignores signals it does not handle
    os.environ["PATH"] = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    try:
        _set_up(link, rate)
    except (OSError, subprocess.CalledProcessError) as error:
        print(error, file=sys.stderr)
        return 1
    if not command:
        return 0
    private = ["--mca", "orte_tmpdir_base", str(_RUN)]  # session files vanish with everything else
    try:
        return subprocess.run(_mpirun(link, [*private, *mpirun_arguments], command), check=False).returncode
    except KeyboardInterrupt:
        return 130


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--link", choices=LINKS, default="shaped", help="two hosts on a shaped link, or one host and its loopback"
    )
    parser.add_argument(
        "--rate", default="1gbit", help="rate of the shaped link in tc's notation (default: %(default)s)"
    )
    parser.add_argument(
        "--mpirun", action="append", default=[], metavar="ARG", help="one more argument for mpirun (may be repeated)"
    )
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the program that every rank runs")
    options = parser.parse_args(argv)
    end_on_sigterm()
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if options.inside:
        return _inside(options.link, options.rate, options.mpirun, command)
    if not command:
        parser.error("say which program to run, after --")
    try:
        return run(options.link, command, rate=options.rate, mpirun_arguments=options.mpirun)
    except NotAvailableError as error:
        print(f"two_hosts: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
