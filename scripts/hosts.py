"""Run an MPI job on one machine as if on several hosts joined by a slow network, and leave nothing behind.

    python scripts/hosts.py --rate 1gbit -- python train.py
    python scripts/hosts.py --hosts 8 --rate 500mbit -- python train.py
    python scripts/hosts.py --link loopback -- python train.py

One rank runs on each host. `--link shaped` gives every host a network namespace of its own. Two are joined by a veth
pair (eth0 on both sides), more of them each by a pair to a bridge, the switch, in a namespace that nobody else is in. A
token bucket shapes what leaves a host and what leaves a port of the switch, so that a host neither sends nor receives
faster than the rate. `--link loopback` runs all ranks over TCP on the loopback interface of one private namespace.
Everything happens inside fresh network, mount and process namespaces: the counters in /proc/net/dev count this job
only, and when the command ends, fails or is killed the kernel ends every process in there and removes the interfaces.
Ordinary users get a user namespace as well, where the system allows them one. Needs Linux, util-linux (unshare) and
iproute2 (ip, tc).
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
MOST_HOSTS = 254  # of one network
BURST_BYTES = 256 * 1024  # what a link lets through at once after a rest
INTERFACE = {"shaped": "eth0", "loopback": "lo"}
_RUN = Path("/run")  # replaced by a private tmpfs inside: `ip netns` keeps its mount points there
_AGENT = _RUN / "remote_shell"


class NotAvailableError(RuntimeError):
    """This machine cannot give us the namespaces; the message says why."""


def number_of_hosts(text: str) -> int:
    """Return what `--hosts` says; raises ArgumentTypeError for what is no number of hosts."""
    if not text.isascii() or not text.isdigit() or not 2 <= int(text) <= MOST_HOSTS:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of hosts; it must be from 2 to {MOST_HOSTS}")
    return int(text)


def _address(host: int) -> str:
    return f"10.77.0.{host}"


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


def command_line(
    link: str, rate: str, mpirun_arguments: Sequence[str], command: Sequence[str], hosts: int = 2
) -> list[str]:
    """The argument vector that runs `command` on every host; raises NotAvailableError if a tool is missing."""
    own = [sys.executable, os.path.abspath(__file__), "--inside", "--link", link, "--rate", rate, "--hosts", str(hosts)]
    own += [f"--mpirun={argument}" for argument in mpirun_arguments]
    return [*_sandbox_command(), *own, "--", *command]


def check_available(link: str = "shaped", rate: str = "1gbit", hosts: int = 2) -> None:
    """Set the namespaces up and throw them away again; raises NotAvailableError with the reason if that fails."""
    arguments = command_line(link, rate, (), (), hosts)
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    if result.returncode != 0:
        reason = "; ".join(result.stderr.strip().splitlines()[-2:]) or f"exit status {result.returncode}"
        raise NotAvailableError(f"namespaces cannot be made here: {reason}")


def run(
    link: str,
    command: Sequence[str],
    *,
    rate: str = "1gbit",
    hosts: int = 2,
    mpirun_arguments: Sequence[str] = (),
    timeout: float | None = None,
) -> int:
    """Run `command` on every host, one rank on each, and return its exit status.

    On timeout (subprocess.TimeoutExpired), error or Ctrl-C everything in there is ended.
    """
    # unshare's --kill-child ends the first process in there, and with it the kernel ends all the others.
    arguments = command_line(link, rate, mpirun_arguments, command, hosts)
    return _wait(subprocess.Popen(arguments), timeout, kill_at_once=True)


def run_here(
    command: Sequence[str], *, hosts: int = 2, mpirun_arguments: Sequence[str] = (), timeout: float | None = None
) -> int:
    """Run `command` on as many ranks over this host's own loopback interface, where no namespaces are to be had."""
    arguments = _mpirun("loopback", hosts, mpirun_arguments, command)
    return _wait(subprocess.Popen(arguments), timeout, kill_at_once=False)


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


def _shape(namespace: str, device: str, rate: str) -> None:
    shape = f"tc qdisc replace dev {device} root tbf rate {rate} burst {BURST_BYTES} latency 50ms"
    _ip("netns", "exec", namespace, *shape.split())


def _set_up(link: str, rate: str, hosts: int) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(_RUN)], check=True)
    _ip("link", "set", "lo", "up")
    if link == "loopback":
        return
    for host in range(1, hosts + 1):
        _ip("netns", "add", f"w{host}")
    if hosts == 2:
        _ip("link", "add", "eth0", "netns", "w1", "type", "veth", "peer", "name", "eth0", "netns", "w2")
    else:
        _ip("netns", "add", "switch")
        _ip("-n", "switch", "link", "add", "bridge", "type", "bridge")
        _ip("-n", "switch", "link", "set", "bridge", "up")
        for host in range(1, hosts + 1):
            port = f"port{host}"
            _ip("link", "add", "eth0", "netns", f"w{host}", "type", "veth", "peer", "name", port, "netns", "switch")
            _ip("-n", "switch", "link", "set", port, "master", "bridge", "up")
            _shape("switch", port, rate)
    for host in range(1, hosts + 1):
        _ip("-n", f"w{host}", "address", "add", f"{_address(host)}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", f"w{host}", "link", "set", device, "up")
        _shape(f"w{host}", "eth0", rate)
    # mpirun starts the daemons of other hosts as it would with ssh: AGENT host command...
    _AGENT.write_text('#!/bin/sh\nhost=$1\nshift\nexec ip netns exec "w${host##*.}" /bin/sh -c "$*"\n')
    _AGENT.chmod(0o755)


def _mpirun(link: str, hosts: int, extra: Sequence[str], command: Sequence[str]) -> list[str]:
    interface = INTERFACE[link]
    arguments = [find_mpirun(), "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-np", str(hosts)]
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
        slots = ",".join(f"{_address(host)}:1" for host in range(1, hosts + 1))
        arguments = ["ip", "netns", "exec", "w1", *arguments, "--mca", "plm_rsh_agent", str(_AGENT), "-H", slots]
        # The daemons of all hosts would share one segment of this machine's memory; one of them crashed now and then.
        arguments += ["--mca", "rtc_hwloc_vmhole", "none"]
    return [*arguments, *extra, *command]


def _inside(link: str, rate: str, hosts: int, mpirun_arguments: Sequence[str], command: Sequence[str]) -> int:
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # the first process of a namespace ignores signals it does not handle
    os.environ["PATH"] = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    try:
        _set_up(link, rate, hosts)
    except (OSError, subprocess.CalledProcessError) as error:
        print(error, file=sys.stderr)
        return 1
    if not command:
        return 0
    private = ["--mca", "orte_tmpdir_base", str(_RUN)]  # session files vanish with everything else
    try:
        return subprocess.run(_mpirun(link, hosts, [*private, *mpirun_arguments], command), check=False).returncode
    except KeyboardInterrupt:
        return 130


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--link", choices=LINKS, default="shaped", help="hosts on a shaped network, or one host and its loopback"
    )
    parser.add_argument(
        "--hosts",
        type=number_of_hosts,
        default=2,
        metavar="N",
        help="how many, with a rank each (default: %(default)s)",
    )
    parser.add_argument(
        "--rate", default="1gbit", help="rate of the shaped links in tc's notation (default: %(default)s)"
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
        return _inside(options.link, options.rate, options.hosts, options.mpirun, command)
    if not command:
        parser.error("say which program to run, after --")
    try:
        return run(options.link, command, rate=options.rate, hosts=options.hosts, mpirun_arguments=options.mpirun)
    except NotAvailableError as error:
        print(f"hosts: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
