#!/usr/bin/env python3
"""Makes several hosts on one Linux machine: each has its own network, name and sshd, and a link of a chosen rate. Needs root.

netlab.py up N [RATE]            makes hosts h1..hN on one switch; RATE is 1gbit, 100mbit, ... or unlimited; default 10gbit
netlab.py exec HOST COMMAND...   runs a command on h1, h2, ..., or on `all` of them at once
netlab.py rate RATE              changes every link's rate, both directions
netlab.py run N RATE COMMAND...  does up, runs the command on h1, and does down
netlab.py key                    prints the path of the ssh key that every host accepts (ssh on the hosts uses it automatically)
netlab.py status                 lists the labs that are up
netlab.py down                   ends every process on the hosts, and removes them
Options before the command: --name NAME makes a second lab beside the first; --subnet A.B.C sets its addresses.

From Python:  with Netlab(2, rate="1gbit") as lab: lab.run(["ssh", "h2", "hostname"])
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from netlab_host import PER_HOST_ETC, Host, NetlabError, bits_per_second, end_processes, sh, why_not

STATE = Path("/run/netlab")
Command = Sequence[str | os.PathLike[str]]
_labs = itertools.count()


class Netlab:
    """A lab of hosts h1..hN. Labs of different names are isolated from each other, even with the same addresses: each has its own switch.

    As a context manager, the lab is taken down at the end, whatever happens; if the process is killed, the next `up` takes it down.
    `name` is the prefix of everything that is made on the machine (namespaces, links); the default is a name that no other process uses.
    """

    def __init__(self, hosts: int = 2, rate: str = "10gbit", *, name: str | None = None, subnet: str = "10.77.0"):
        self.name = name or f"nl{os.getpid():x}{'abcdefghijklmnopqrstuvwxyz'[next(_labs) % 26]}"
        if not re.fullmatch(r"[a-z][a-z0-9]{0,9}", self.name):  # the kernel allows 15 characters in a link's name
            raise NetlabError(f"a lab's name must be a lowercase letter and up to 9 lowercase letters or digits, got {self.name!r}")
        if not 1 <= hosts <= 200:
            raise NetlabError(f"a lab must have 1 to 200 hosts, got {hosts}")
        if not re.fullmatch(r"\d{1,3}(\.\d{1,3}){2}", subnet) or any(int(x) > 255 for x in subnet.split(".")):
            raise NetlabError(f"a subnet must be the first three numbers of its addresses, such as 10.77.0, got {subnet!r}")
        bits_per_second(rate)
        self.rate, self.subnet, self.state = rate, subnet, STATE / self.name
        self._owner: list[Any] | None = None
        self._hosts = {f"h{i}": Host(self.name, f"h{i}", f"{subnet}.{i}", self.state) for i in range(1, hosts + 1)}
        self.addresses = {name: host.address for name, host in self._hosts.items()}

    @classmethod
    def attach(cls, name: str) -> Netlab:
        """Returns the lab of that name, which must be up."""
        try:
            there = json.loads((STATE / name / "lab.json").read_text())
        except (FileNotFoundError, NotADirectoryError):
            raise NetlabError(f"no lab named {name} is up: `netlab.py up N` makes one") from None
        lab = cls(there["hosts"], there["rate"], name=name, subnet=there["subnet"])
        lab._owner = there["owner"]
        return lab

    @property
    def key(self) -> Path:
        """Path of the private ssh key that every host accepts for root."""
        return self.state / "key"

    def up(self, keep: bool = False) -> Netlab:
        """Makes the hosts. With `keep` they outlive this process; without it, the next `up` removes them if this process has ended."""
        reason = why_not()
        if reason:
            raise NetlabError(reason)
        sweep()
        self._claim()
        try:
            for name in ("key", "hostkey"):
                sh("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"netlab {self.name}", "-f", str(self.state / name))
            switch = f"{self.name}-br"
            sh("ip", "link", "add", switch, "type", "bridge")
            sh("ip", "link", "set", switch, "up")
            for host in self._hosts.values():
                host.write_etc(self.addresses)
                host.plug_in(switch)
            for host in self._hosts.values():
                host.start_sshd()
            self._owner = None if keep else self._owner
            self.set_rate(self.rate)
        except BaseException:
            self.down()
            raise
        return self

    def _claim(self) -> None:
        """Claims the name. Its folder appears with the owner already in it, so that no other process mistakes it for remains to remove."""
        links, spaces = found(self.name)
        if self.state.exists() or links or spaces:
            seen = "is up already" if self.state.exists() else f"has left {', '.join(links + spaces)} behind"
            raise NetlabError(f"a lab named {self.name} {seen}: `netlab.py --name {self.name} down` first, or choose another --name")
        STATE.mkdir(exist_ok=True)
        fresh = STATE / f".{self.name}.{os.getpid()}"
        fresh.mkdir()
        self._owner = [os.getpid(), started(os.getpid())]
        self._remember(fresh)
        try:
            fresh.rename(self.state)
        except OSError as error:
            shutil.rmtree(fresh)
            raise NetlabError(f"another process has just made a lab named {self.name}: choose another --name") from error

    def _remember(self, folder: Path) -> None:
        lab = {"hosts": len(self._hosts), "rate": self.rate, "subnet": self.subnet, "owner": self._owner}
        file = folder / "lab.json"
        file.with_suffix(".new").write_text(json.dumps(lab))
        file.with_suffix(".new").rename(file)

    def down(self) -> None:
        """Ends every process on the hosts, and removes everything that was made. May be called at any time, and repeatedly."""
        with uninterrupted():
            remove(self.name)

    def __enter__(self) -> Netlab:
        return self.up()

    def __exit__(self, *error: object) -> None:
        self.down()

    def set_rate(self, rate: str) -> None:
        """Changes every link's rate, both directions."""
        bits = bits_per_second(rate)
        for host in self._hosts.values():
            host.shape(bits)
        self.rate = rate
        self._remember(self.state)

    def cut(self, host: str) -> None:
        """Takes a host's link down: packets are lost without any notice."""
        sh("ip", "link", "set", self._hosts[host].port, "down")

    def mend(self, host: str) -> None:
        """Brings the link up again."""
        sh("ip", "link", "set", self._hosts[host].port, "up")

    def command(self, command: Command, host: str = "h1") -> list[str]:
        """Returns the command line that runs a command on a host when it is started on this machine."""
        if host not in self._hosts:
            raise NetlabError(f"no host {host}: lab {self.name} has {', '.join(self._hosts)}")
        return self._hosts[host].command(command)

    def run(self, command: Command, host: str = "h1", **options: Any) -> subprocess.CompletedProcess[Any]:
        """Runs a command on a host, by subprocess.run."""
        return subprocess.run(self.command(command, host), **options)

    def start(self, command: Command, host: str = "h1", **options: Any) -> subprocess.Popen[Any]:
        """Starts a command on a host, by subprocess.Popen."""
        return subprocess.Popen(self.command(command, host), **options)

    def start_all(self, command: Command, **options: Any) -> list[subprocess.Popen[Any]]:
        """Starts the same command on every host, as `torchrun --nnodes` needs it."""
        return [self.start(command, host, **options) for host in self._hosts]


def found(name: str) -> tuple[list[str], list[str]]:
    """Returns the existing links and namespaces of this lab, even if it was not made completely."""
    links = [x for x in os.listdir("/sys/class/net") if re.fullmatch(rf"{name}-(br|\d+)", x)]
    spaces = [line.split()[0] for line in sh("ip", "netns", "list").splitlines() if line.strip()]
    return links, [x for x in spaces if re.fullmatch(rf"{name}-h\d+", x)]


def remove(name: str) -> None:
    links, spaces = found(name)
    end_processes(spaces)
    for command in [("ip", "netns", "del", space) for space in spaces] + [("ip", "link", "del", link) for link in links]:
        with suppress(NetlabError):  # a link disappears with its other end
            sh(*command)
    for etc in PER_HOST_ETC.glob(f"{name}-h*"):
        shutil.rmtree(etc, ignore_errors=True)
    shutil.rmtree(STATE / name, ignore_errors=True)
    for shared in (PER_HOST_ETC, STATE):
        with suppress(OSError):  # not empty: another lab has files there
            shared.rmdir()


def started(pid: int) -> str | None:
    """Returns when a process started, in ticks since boot, which tells it from a later process with the same number; None if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


def labs() -> dict[str, dict[str, Any]]:
    """Returns the recorded facts of each lab, by name."""
    known = {}
    for file in sorted(STATE.glob("*/lab.json")):
        with suppress(FileNotFoundError):  # another process is taking it down
            known[file.parent.name] = json.loads(file.read_text())
    return known


def sweep() -> None:
    """Takes down labs whose process was killed before it could do so."""
    for name, lab in labs().items():
        if lab["owner"] and started(lab["owner"][0]) != lab["owner"][1]:
            remove(name)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ignores Ctrl-C and SIGTERM inside: a second Ctrl-C must not leave half of the hosts behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("netlab.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="netlab")
    parser.add_argument("--subnet", default="10.77.0")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND")
    up, rate, execute, run = (verbs.add_parser(verb) for verb in ("up", "rate", "exec", "run"))
    up.add_argument("hosts", type=int)
    up.add_argument("rate", nargs="?", default="10gbit")
    rate.add_argument("rate")
    execute.add_argument("host")
    run.add_argument("hosts", type=int)
    run.add_argument("rate")
    for takes_command in (execute, run):
        takes_command.add_argument("command", nargs=argparse.REMAINDER)
    for verb in ("key", "status", "down"):
        verbs.add_parser(verb)
    parsed = parser.parse_args(argv)
    if "command" in parsed:
        parsed.command = parsed.command[parsed.command[:1] == ["--"] :]
        if not parsed.command:
            parser.error(f"{parsed.verb} needs a command to run")
    return parsed


def status() -> None:
    for name, lab in labs().items():
        owner = f", of process {lab['owner'][0]}" if lab["owner"] else ""
        print(f"{name}: {lab['hosts']} hosts h1..h{lab['hosts']}, {lab['subnet']}.0/24, {lab['rate']}{owner}")


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    reason = why_not()
    if reason:
        raise NetlabError(reason)
    if args.verb == "up":
        Netlab(args.hosts, args.rate, name=args.name, subnet=args.subnet).up(keep=True)
    elif args.verb == "run":
        with Netlab(args.hosts, args.rate, name=args.name, subnet=args.subnet) as lab:
            return lab.run(args.command).returncode
    elif args.verb == "status":
        status()
    elif args.verb == "down":
        Netlab(name=args.name).down()
    else:
        lab = Netlab.attach(args.name)
        if args.verb == "key":
            print(lab.key)
        elif args.verb == "rate":
            lab.set_rate(args.rate)
        elif args.host == "all":
            return max(abs(process.wait()) for process in lab.start_all(args.command))
        else:
            inside = lab.command(args.command, args.host)
            os.execv(inside[0], inside)
    return 0


def _terminated(number: int, frame: Any) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminated)  # so that `run` and a half-made `up` are taken down
    try:
        sys.exit(main())
    except NetlabError as error:
        sys.exit(f"netlab: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
