"""Makes one host of a netlab: its namespace and link, its own files in /etc, its sshd and its link's rate; and ends its processes."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PER_HOST_ETC = Path("/etc/netns")  # `ip netns exec X` mounts the files of /etc/netns/X over /etc, for the processes that it starts
TOOLS = {"ip": "iproute2", "tc": "iproute2", "sshd": "openssh-server", "ssh-keygen": "openssh-client", "unshare": "util-linux"}
SEARCH = f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin"  # sbin is not on every user's PATH
UNITS = {"bit": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
SSH_CONFIG = """Host *
  IdentityFile {key}
  IdentitiesOnly yes
  StrictHostKeyChecking yes
  UserKnownHostsFile /dev/null
  BatchMode yes
"""
SSHD_CONFIG = """ListenAddress {address}
HostKey {hostkey}
AuthorizedKeysFile {key}.pub
PidFile {pid}
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
MaxStartups 200
Subsystem sftp internal-sftp
"""


class NetlabError(RuntimeError):
    """Says what could not be done, and what to do about it."""


def tool(name: str) -> str:
    found = shutil.which(name, path=SEARCH)
    if found is None:
        raise NetlabError(f"`{name}` is missing: install {TOOLS[name]} (Debian, Ubuntu: apt-get install iproute2 openssh-server)")
    return found


def sh(*command: str) -> str:
    """Runs a tool and returns its output. Raises NetlabError with the tool's message if it fails."""
    done = subprocess.run([tool(command[0]), *command[1:]], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise NetlabError(f"`{shlex.join(command)}` failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def why_not() -> str | None:
    """Returns the reason why no lab can be made here; None if one can."""
    if sys.platform != "linux":
        return "network namespaces are a Linux feature"
    if os.geteuid() != 0:
        return "netlab makes network namespaces, which needs root: use sudo"
    try:
        for name in TOOLS:
            tool(name)
    except NetlabError as error:
        return str(error)
    return None


def bits_per_second(rate: str) -> int | None:
    """Returns the bits per second of a rate such as 1gbit or 2.5gbit; None for 'unlimited'."""
    if rate == "unlimited":
        return None
    parts = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg]?bit)", rate)
    bits = round(float(parts[1]) * UNITS[parts[2]]) if parts else 0
    if bits < 100_000:
        raise NetlabError(f"a rate must be 100kbit or more, such as 100mbit, 2.5gbit or unlimited; got {rate!r}")
    return bits


@dataclass(frozen=True)
class Host:
    """The host `name` of a lab. The lab made its keys in the folder `state`."""

    lab: str
    name: str
    address: str
    state: Path

    @property
    def space(self) -> str:
        return f"{self.lab}-{self.name}"

    @property
    def port(self) -> str:
        """Name of the switch's end of the host's link; the host's end is eth0."""
        return f"{self.lab}-{self.name[1:]}"

    def plug_in(self, switch: str) -> None:
        sh("ip", "netns", "add", self.space)
        sh("ip", "link", "add", self.port, "type", "veth", "peer", "name", "eth0", "netns", self.space)
        sh("ip", "link", "set", self.port, "master", switch, "up")
        sh("ip", "-n", self.space, "addr", "add", f"{self.address}/24", "dev", "eth0")
        sh("ip", "-n", self.space, "link", "set", "eth0", "up")
        sh("ip", "-n", self.space, "link", "set", "lo", "up")

    def shape(self, bits: int | None) -> None:
        """Limits both directions by a token bucket of 2 ms, or of 128 KiB (two of the largest packets) if that is more; None: no limit."""
        for where, device in ((["-n", self.space], "eth0"), ([], self.port)):
            if bits is not None:
                burst = max(131072, bits // 8 // 500)
                limit = burst + bits // 8 // 10  # bytes that may wait: 100 ms, as in a switch with large buffers
                words = f"rate {bits}bit burst {burst} limit {limit}".split()
                sh("tc", *where, "qdisc", "replace", "dev", device, "root", "tbf", *words)
            elif " tbf " in sh("tc", *where, "qdisc", "show", "dev", device):
                sh("tc", *where, "qdisc", "del", "dev", device, "root")

    def write_etc(self, addresses: dict[str, str]) -> None:
        """Writes this host's own files of /etc: only the lab's host names, and an ssh configuration with the lab's key and known hosts."""
        etc = PER_HOST_ETC / self.space
        (etc / "ssh").mkdir(parents=True)
        # Horovod's Gloo and Open MPI resolve a host's own name to choose its interface: it must not be a 127.* address.
        names = [f"{address} {host}" for host, address in addresses.items()]
        (etc / "hosts").write_text("\n".join(["127.0.0.1 localhost", *names, ""]))
        known = ",".join([*addresses, *addresses.values()])
        (etc / "ssh/ssh_known_hosts").write_text(f"{known} {(self.state / 'hostkey.pub').read_text()}")
        (etc / "ssh/ssh_config").write_text(SSH_CONFIG.format(key=self.state / "key"))
        switch = Path("/etc/nsswitch.conf")
        if switch.exists():  # resolve names by /etc/hosts only, because no name server can be reached
            (etc / switch.name).write_text(re.sub(r"(?m)^hosts:.*", "hosts: files", switch.read_text()))
        shadow = Path("/etc/shadow")
        if shadow.exists() and re.search(r"(?m)^root:!", shadow.read_text()):  # as on Ubuntu: such an account refuses even logins by key
            (etc / "shadow").touch(mode=0o600)
            (etc / "shadow").write_text("root:*:19000:0:99999:7:::\n")

    def start_sshd(self) -> None:
        pid, log, config = (self.state / f"{self.name}.{kind}" for kind in ("pid", "log", "sshd"))
        keys = {"hostkey": self.state / "hostkey", "key": self.state / "key"}
        config.write_text(SSHD_CONFIG.format(address=self.address, pid=pid, **keys))
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        command = self.command([tool("sshd"), "-f", str(config), "-E", str(log)])
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while not pid.exists():  # sshd writes it once it listens
            if done.returncode or time.monotonic() > deadline:
                said = done.stderr + (log.read_text() if log.exists() else "")
                raise NetlabError(f"sshd of {self.name} did not start: {said.strip()}")
            time.sleep(0.02)

    def command(self, command: Sequence[str | os.PathLike[str]]) -> list[str]:
        """Returns the command line that runs a command on this host when it is started on this machine."""
        named = 'hostname "$0" 2>/dev/null || echo "$0" >/proc/sys/kernel/hostname; exec "$@"'
        inside = [tool("ip"), "netns", "exec", self.space, tool("unshare"), "--uts", "sh", "-c", named, self.name]
        return [*inside, *map(os.fspath, command)]


def end_processes(spaces: Sequence[str]) -> None:
    """Ends every process on these hosts, orphans included, because a namespace lives as long as a process in it."""
    for number, patience in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 10.0)):
        deadline = time.monotonic() + patience
        told: set[int] = set()
        while True:
            there = {int(pid) for space in spaces for pid in _pids(space)} - {os.getpid()}
            for pid in there - told:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            told |= there
            if not there:
                return
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)


def _pids(space: str) -> list[str]:
    try:
        return sh("ip", "netns", "pids", space).split()
    except NetlabError:  # a namespace that was only half made
        return []
