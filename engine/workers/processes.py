"""Processes of one machine that work together: started, restarted and ended by one supervisor.

A command may stand for a group of processes with torchrun's environment, which start and die
together. torchrun itself gives each process a session of its own: killed, it would leave them at
work. Here every process leads a session, and what remains of the session is killed with it.

A supervisor that is killed sends no signal, so the kernel does (PR_SET_PDEATHSIG, on Linux): each
process gets SIGTERM when the supervisor is gone. A pipe that closes would need a thread in every
program; this works for any. SIGTERM, because a worker finishes its unit then.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from logitcask.engine.errors import (
    ConfigError,
    IncompleteError,
    IntegrityError,
    LogitcaskError,
    ProcessError,
)
from logitcask.engine.events import EventHandler

POLL_S = 0.1
WINDOW_S = 600.0
"""Time in which the restarts of a process are counted."""
BACKOFF_S, LONGEST_BACKOFF_S = 1.0, 60.0
"""Wait before the first restart, which doubles with each further one, up to the second."""
GRACE_S = 30.0
"""Time between SIGTERM and SIGKILL."""
LINES = 20
"""Last lines of a log that are shown with an error."""

ERRORS: Mapping[int, type[LogitcaskError]] = {
    1: ProcessError,
    2: ConfigError,
    3: IncompleteError,
    4: IntegrityError,
}
"""Exit code of a command line of ours -> its error, which would come again: no restart."""

_BOUND = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))  # PR_SET_PDEATHSIG
if os.getppid() == int(sys.argv[1]):
    os.execvp(sys.argv[2], sys.argv[2:])
"""
"""Program that becomes the command, unless its parent died first."""

OnLine = Callable[[str, str], None]
"""Called with the name of a process and a line of its log."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """One process, or several that form a group."""

    role: str
    index: int
    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    ranks: int = 1
    """Processes of the group; more than one get the environment that torchrun gives."""
    leads: bool = False
    """True for the one command whose end is the end of all."""

    @property
    def name(self) -> str:
        return f"{self.role}-{self.index}"


def supervise(
    commands: Sequence[Command],
    logs: Path,
    *,
    restarts: int,
    on_event: EventHandler = lambda line: None,
    on_line: OnLine | None = None,
) -> str:
    """Run the commands until the one that leads has ended with 0; return its standard output.

    That output goes to logs/NAME.out, all else that they print to logs/NAME.log and `on_line`. A
    process that dies by a signal, or with an exit code outside of ERRORS, is started again, after a
    pause, up to `restarts` times in WINDOW_S. A process that ends with 0 is done. SIGINT and
    SIGTERM are passed on.

    Raises the error of the exit code of a process, ProcessError after too many restarts,
    KeyboardInterrupt after SIGINT, and IncompleteError after SIGTERM. All processes have ended
    then.
    """
    logs.mkdir(parents=True, exist_ok=True)
    groups = [_Group(each, logs / f"{each.name}.log", on_line) for each in commands]
    (lead,) = (group for group in groups if group.command.leads)
    with _signals() as received:
        try:
            while not received:
                for group in groups:
                    group.step(restarts, on_event)
                if lead.done:
                    return lead.output()
                time.sleep(POLL_S)
        except LogitcaskError:
            if on_line is None:
                for group in groups:
                    for line in group.last if group.failed else ():
                        on_event(f"{group.command.name}  {line}")
            raise
        finally:
            _end(groups, received)
    if received[0] == signal.SIGINT:
        raise KeyboardInterrupt
    raise IncompleteError(
        "SIGTERM came before the end",
        hint="run the same command again: it resumes",
    )


class _Group:
    """The processes of a command, now and before."""

    def __init__(self, command: Command, log: Path, on_line: OnLine | None) -> None:
        self.command, self.log, self._on_line = command, log, on_line
        self.done = self.failed = False
        self.last: deque[str] = deque(maxlen=LINES)
        """Last lines of the log."""
        self._processes: list[subprocess.Popen[bytes]] = []
        self._deaths: list[float] = []
        self._due_s = 0.0
        self._read_to, self._rest = log.stat().st_size if log.exists() else 0, b""
        self._output = log.with_suffix(".out")

    def step(self, restarts: int, on_event: EventHandler) -> None:
        """Start the processes if that is due, and look if they have ended.

        Raises the error of a process that must not be started again.
        """
        if self.done:
            return
        if not self._processes:
            if time.monotonic() >= self._due_s:
                self._start()
            return
        codes = [each.poll() for each in self._processes]
        self.pass_lines()
        if all(code == 0 for code in codes):
            self.kill()
            self.done = True
        elif any(codes):
            self.kill()
            self.pass_lines(whole=True)
            self.failed = True
            self._restart(_cause([code for code in codes if code]), restarts, on_event)

    def _restart(self, code: int, restarts: int, on_event: EventHandler) -> None:
        name, how, now_s = self.command.name, _how(code), time.monotonic()
        last = f": {self.last[-1]}" if self.last else ""
        if code in ERRORS:
            cause, hint = self._printed() or (f"{name} ended {how}{last}", f"read {self.log}")
            raise ERRORS[code](cause, hint=hint)
        self._deaths = [*(at for at in self._deaths if now_s - at < WINDOW_S), now_s]
        if len(self._deaths) > restarts:
            raise ProcessError(
                f"{name} died {len(self._deaths)} times in {WINDOW_S / 60:.0f} minutes, the last "
                f"time {how}{last}",
                hint=f"read {self.log}, then run the same command again: it resumes",
            )
        wait_s = min(LONGEST_BACKOFF_S, BACKOFF_S * 2 ** (len(self._deaths) - 1))
        self._due_s, self.failed = now_s + wait_s, False
        on_event(f"{name} ended {how}: restart {len(self._deaths)} of {restarts} in {wait_s:g} s")

    def _start(self) -> None:
        command = self.command
        argv = command.argv
        with self.log.open("ab", buffering=0) as log, ExitStack() as stack:
            output = stack.enter_context(self._output.open("wb")) if command.leads else log
            log.write(f"--- {time.strftime('%Y-%m-%dT%H:%M:%S')} {' '.join(argv)}\n".encode())
            self._read_to = log.tell()
            port = free_port() if command.ranks > 1 else 0
            for rank in range(command.ranks):
                self._processes.append(
                    subprocess.Popen(
                        [sys.executable, "-ISc", _BOUND, str(os.getpid()), *argv]
                        if sys.platform == "linux"
                        else argv,
                        env={**os.environ, **command.env, **_group_env(rank, command.ranks, port)},
                        stdin=subprocess.DEVNULL,
                        stdout=output if rank == 0 else log,
                        stderr=log,
                        start_new_session=True,
                    )
                )

    def signal(self, number: int) -> None:
        """Send a signal to the processes, which end their own children."""
        for each in self._processes:
            each.send_signal(number)

    def alive(self) -> bool:
        return any(each.poll() is None for each in self._processes)

    def kill(self) -> None:
        """Kill what is left of the processes and of their sessions."""
        for each in self._processes:
            # A session whose leader has ended keeps its number while it has members.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(each.pid, signal.SIGKILL)
            each.wait()
        self._processes = []

    def pass_lines(self, *, whole: bool = False) -> None:
        """Pass on the new lines of the log; whole: also one that is not complete."""
        if not self.log.exists():
            return
        with self.log.open("rb") as log:
            log.seek(self._read_to)
            data = log.read()
        self._read_to += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        if whole and self._rest:
            lines, self._rest = [*lines, self._rest], b""
        for line in lines:
            # A bar of a library draws itself again and again.
            text = line.decode(errors="replace").rstrip("\r").rpartition("\r")[2]
            if text.strip():
                self.last.append(text)
                if self._on_line is not None:
                    self._on_line(self.command.name, text)

    def output(self) -> str:
        """Return the standard output of the last start."""
        return self._output.read_text(errors="replace")

    def _printed(self) -> tuple[str, str] | None:
        """Return cause and hint of an error that the process printed as its last lines."""
        match = re.search("^error: (.*)\nhint: (.*)\\Z", "\n".join(self.last), re.MULTILINE)
        return (f"{self.command.name}: {match[1]}", match[2]) if match else None


def _end(groups: Sequence[_Group], received: Sequence[int]) -> None:
    """End all processes: by the signal that was received, else SIGTERM; by SIGKILL after GRACE_S,
    or at the next signal.
    """
    number, before = received[0] if received else signal.SIGTERM, len(received)
    for group in groups:
        group.signal(number)
    end_s = time.monotonic() + GRACE_S
    while any(group.alive() for group in groups):
        if time.monotonic() >= end_s or len(received) > before:
            break
        time.sleep(POLL_S)
    for group in groups:
        group.kill()
        group.pass_lines(whole=True)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list, in place of their usual effects."""
    received: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: received.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _cause(codes: Sequence[int]) -> int:
    """Return the code that ended a group: the death of one makes others end with an error."""
    return next((code for code in codes if code not in ERRORS), codes[0])


def _how(code: int) -> str:
    if code >= 0:
        return f"with exit code {code}"
    try:
        return f"by {signal.Signals(-code).name}"
    except ValueError:
        return f"by signal {-code}"


def _group_env(rank: int, ranks: int, port: int) -> dict[str, str]:
    """Return the environment of one process of a group, as torchrun gives it."""
    if ranks == 1:
        return {}
    return {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank)},
        **{"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }


def free_port(host: str = "127.0.0.1") -> int:
    """Return a free port of this machine; host: of the interface, empty = of all."""
    with socket.socket() as free:
        free.bind((host, 0))
        return int(free.getsockname()[1])
