"""Several hosts on one machine, for the demo and the tests.

Each host is a network namespace with one wire, an address of its own, a state folder and a daemon; what
runs in it cannot tell that the others are not machines of their own.

    with Lab() as lab:
        lab.form_farm()
        lab["alpha"].transhume("vm", "list")

Everything that a lab makes is written down in /run/transhume-lab first, in a file that stays locked as
long as its maker lives, so that `sweep` finds what a killed maker left behind.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from transhume.demo import namespaces
from transhume.demo.namespaces import Shape
from transhume.model.errors import TimedOut, TranshumeError

RECORDS_DIR = Path("/run/transhume-lab")
DEFAULT_NAMES = ("alpha", "beta")
_COMMAND_LIMIT_S = 120.0


@dataclass(frozen=True)
class CommandResult:
    """What a command said and how it ended."""

    command: tuple[str, ...]
    exit_code: int
    stdout: str
    stderr: str

    def json(self) -> Any:
        """The one JSON document on its standard output."""
        return json.loads(self.stdout)

    def json_lines(self) -> list[Any]:
        return [json.loads(line) for line in self.stdout.splitlines() if line.strip()]

    def require_success(self) -> CommandResult:
        if self.exit_code != 0:
            words = (self.stderr or self.stdout).strip()
            raise TranshumeError(f"'{' '.join(self.command)}' ended with {self.exit_code}: {words}")
        return self


@dataclass
class LabHost:
    """One host. `transhume` runs the CLI as a person on that host would.

    `other_address` is the one on its second wire; empty when it has none.
    """

    name: str
    namespace: str
    address: str
    state_dir: Path
    other_address: str = ""
    _started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def run(self, *command: str, timeout_s: float = _COMMAND_LIMIT_S) -> CommandResult:
        """Run a program on this host and wait for its end. Raises `TimedOut` after having killed it."""
        try:
            done = subprocess.run(
                namespaces.command_inside(self.namespace, command),
                capture_output=True,
                text=True,
                check=False,
                stdin=subprocess.DEVNULL,
                timeout=timeout_s,
                env=_environment(),
            )
        except subprocess.TimeoutExpired as error:
            words = " ".join(command)
            raise TimedOut(f"'{words}' on {self.name} did not end within {timeout_s} s") from error
        return CommandResult(tuple(command), done.returncode, done.stdout, done.stderr)

    def start(self, *command: str, **options: Any) -> subprocess.Popen[bytes]:
        """Start a program on this host; it ends with the lab at the latest. `options` go to Popen."""
        options.setdefault("stdin", subprocess.DEVNULL)
        options.setdefault("env", _environment())
        process = subprocess.Popen(namespaces.command_inside(self.namespace, command), **options)
        self._started.append(process)
        return process

    def transhume_command(self, *arguments: str) -> list[str]:
        """The words of a `transhume` command that speaks to this host's daemon."""
        return [sys.executable, "-m", "transhume", "--state-dir", str(self.state_dir), *arguments]

    def transhume(self, *arguments: str, timeout_s: float = _COMMAND_LIMIT_S) -> CommandResult:
        return self.run(*self.transhume_command(*arguments), timeout_s=timeout_s)

    def up(self) -> Mapping[str, Any]:
        """Start the daemon of a new farm. What it answers holds the token that `join` takes."""
        answer = self.transhume("up", *self._own_words(), "--json").require_success().json()
        assert isinstance(answer, dict)
        return answer

    def join(self, controller_address: str, token: str) -> None:
        """Start the daemon as a member of the farm whose controller is at `controller_address`."""
        self.transhume("join", controller_address, "--token", token, *self._own_words()).require_success()

    def _own_words(self) -> list[str]:
        words = ["--name", self.name, "--address", self.address]
        return [*words, "--also-address", self.other_address] if self.other_address else words

    def daemon_pid(self) -> int:
        return int((self.state_dir / "daemon.pid").read_text())

    def processes(self) -> list[int]:
        """The ids of all processes that run on this host."""
        return list(namespaces.processes(self.namespace))

    def vm_dir(self, vm: str) -> Path:
        return self.state_dir / "vms" / vm

    def reap(self) -> None:
        """Wait for the programs of `start`, which have been ended."""
        for process in self._started:
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
        self._started.clear()


class Lab:
    """Hosts that can reach each other and nothing else.

    Two hosts are joined by one wire, or with `second_link` by two; more by a switch. Leaving the `with`
    block ends every process on the hosts and removes all that was made, also after an error or Ctrl-C.
    """

    def __init__(self, names: Sequence[str] = DEFAULT_NAMES, second_link: bool = False) -> None:
        if second_link and len(names) != 2:
            raise ValueError("a second link joins two hosts")
        self._second_link = second_link
        self._record = _Record()
        self._switch = f"{self._record.id}-sw" if len(names) > 2 else None
        self.hosts = tuple(self._host(number, name) for number, name in enumerate(names))

    def __getitem__(self, name: str) -> LabHost:
        return next(host for host in self.hosts if host.name == name)

    def __enter__(self) -> Self:
        try:
            self._record.open(self.hosts, self._switch)
            self._make()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def form_farm(self) -> None:
        """Start all daemons: the first host carries the controller, the others join it."""
        first, *others = self.hosts
        token = str(first.up()["token"])
        for number, host in enumerate(others):
            if number:
                token = str(first.transhume("token", "--json").require_success().json()["token"])
            host.join(first.address, token)

    def shape(self, rate_bits_s: int | None = None, delay_ms: float | None = None) -> None:
        """Make every wire so fast and so long, in each direction; without arguments as fast as it can be.

        Raises `KernelError` when the kernel has no tbf (rate) or no netem (delay).
        """
        for host in self.hosts:
            namespaces.shape(host.namespace, Shape(rate_bits_s, delay_ms))

    def cut(self) -> None:
        """From now on everything that one host sends to another is lost, without a word to anyone."""
        self.cut_first()
        if self._second_link:
            for host, other in self._pairs():
                namespaces.lose_everything(host.namespace, other.other_address, namespaces.SECOND_INTERFACE)

    def cut_first(self) -> None:
        """As `cut`, and leave the second link alone."""
        for host, other in self._pairs():
            namespaces.lose_everything(host.namespace, other.address)

    def take_down_first(self) -> None:
        """Switch the first link off at both ends: each kernel knows that it has no way through it."""
        for host in self.hosts:
            namespaces.take_down(host.namespace, namespaces.INTERFACE)

    def restore(self) -> None:
        """The end of `cut`, `cut_first` and `take_down_first`."""
        for host, other in self._pairs():
            namespaces.bring_up(host.namespace, namespaces.INTERFACE)
            namespaces.lose_nothing(host.namespace, other.address)
            if self._second_link:
                namespaces.lose_nothing(host.namespace, other.other_address, namespaces.SECOND_INTERFACE)

    def close(self) -> None:
        """End and remove everything; a second call does nothing."""
        with _undisturbed():
            _remove([host.namespace for host in self.hosts], self._switch, self._record.folder)
            for host in self.hosts:
                host.reap()
            self._record.close()

    def _host(self, number: int, name: str) -> LabHost:
        letter = chr(ord("a") + number)
        namespace = f"{self._record.id}-{letter}"
        other = f"10.78.0.{number + 1}" if self._second_link else ""
        return LabHost(name, namespace, f"10.77.0.{number + 1}", self._record.folder / letter, other)

    def _make(self) -> None:
        self._record.folder.mkdir()
        self._record.folder.chmod(0o711)  # QEMU's user must pass through it, whatever the umask
        for host in self.hosts:
            namespaces.create(host.namespace)
            host.state_dir.mkdir()
            host.state_dir.chmod(0o711)
        if self._switch is not None:
            namespaces.create(self._switch)
            namespaces.join_by_switch([host.namespace for host in self.hosts], self._switch)
        elif len(self.hosts) == 2:
            namespaces.join_two(self.hosts[0].namespace, self.hosts[1].namespace)
        if len(self.hosts) > 1:
            for host in self.hosts:
                namespaces.set_address(host.namespace, host.address)
        if self._second_link:
            self._make_second_link()

    def _make_second_link(self) -> None:
        first, second = self.hosts
        namespaces.join_two(first.namespace, second.namespace, namespaces.SECOND_INTERFACE)
        for host in self.hosts:
            namespaces.set_address(host.namespace, host.other_address, namespaces.SECOND_INTERFACE)

    def _pairs(self) -> Iterator[tuple[LabHost, LabHost]]:
        for host in self.hosts:
            for other in self.hosts:
                if host is not other:
                    yield host, other


def sweep() -> list[str]:
    """Remove what labs of dead processes left; the labs of living ones are not touched.

    Returns the ids of the labs that were removed.
    """
    swept = []
    for path in sorted(RECORDS_DIR.glob("th*")):
        try:
            record = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(record, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove_recorded(path)
            swept.append(path.name)
        except BlockingIOError:
            continue
        finally:
            os.close(record)
    return swept


class _Record:
    """The file that tells what a lab makes, locked as long as this process lives or the lab is open."""

    def __init__(self) -> None:
        self.id = f"th{secrets.token_hex(3)}"
        # Short, because the paths of Unix sockets have a limit.
        self.folder = Path("/tmp") / f"th-{self.id[2:]}"
        self._path = RECORDS_DIR / self.id
        self._file: int | None = None

    def open(self, hosts: Sequence[LabHost], switch: str | None) -> None:
        """Write down what will be made, before it is made."""
        made = {
            "namespaces": [host.namespace for host in hosts],
            "switch": switch,
            "folder": str(self.folder),
        }
        RECORDS_DIR.mkdir(mode=0o700, exist_ok=True)
        while self._file is None:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file).st_nlink:
                self._file = file
            else:  # a sweep came between the creation and the lock, and removed the file
                os.close(file)
        os.pwrite(self._file, json.dumps(made).encode(), 0)

    def close(self) -> None:
        if self._file is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = None


def _remove_recorded(path: Path) -> None:
    # An empty record is of a lab that had made nothing yet.
    with suppress(json.JSONDecodeError, FileNotFoundError):
        made = json.loads(path.read_text())
        _remove(made["namespaces"], made["switch"], Path(made["folder"]))
    path.unlink(missing_ok=True)


def _remove(hosts: Sequence[str], switch: str | None, folder: Path) -> None:
    for name in [*hosts, *([switch] if switch else [])]:
        namespaces.remove(name)
    shutil.rmtree(folder, ignore_errors=True)


def _environment() -> dict[str, str]:
    """The environment of commands on a host: without this machine's own choice of a state folder."""
    return {name: value for name, value in os.environ.items() if name != "TRANSHUME_STATE_DIR"}


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Hold Ctrl-C back while cleaning up: an impatient second one would leave half of it behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
