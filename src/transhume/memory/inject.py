"""Make a running process execute one system call, without a line of code of ours inside it.

QEMU offers no way to create a userfaultfd in its own address space, and such a descriptor is bound to
the address space that it was created in. So its main thread is stopped with ptrace, pointed at the
`syscall` instruction of its vDSO, stepped once, and put back exactly as it was: registers, signal mask
and an interrupted system call, which the kernel restarts. That takes about a millisecond.

While the thread is borrowed its signals are blocked (they stay pending, with all their details, until
the mask is restored), so that only SIGTRAP, SIGKILL and a job-control stop can occur. The idea of the
blocked mask and of `orig_rax = -1` (no restart of a system call while ours is in the registers) is
that of CRIU's compel.

ptrace belongs to one thread of the tracer: all the work happens in a thread of its own, and when that
ends the kernel lets go of the process whatever happened. No other thread of this process may be
waiting for `pid` in waitpid() meanwhile (a parent that waits for its child), or it takes our events.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import threading
import time

from transhume.memory.syscalls import checked, libc
from transhume.model.errors import KernelError, TranshumeError, VmmError

_GETREGS, _SETREGS, _SINGLESTEP, _DETACH = 12, 13, 9, 17
_CONT, _SEIZE, _INTERRUPT = 7, 0x4206, 0x4207
_GETSIGMASK, _SETSIGMASK = 0x420A, 0x420B
_EVENT_STOP = 128
_WALL = 0x40000000
_SYSCALL_INSTRUCTION = b"\x0f\x05"
_ALL_SIGNALS_BUT_TRAP = 0xFFFF_FFFF_FFFF_FFFF & ~(1 << (signal.SIGTRAP - 1))
_RESTART_ERRNOS = (512, 513, 514, 516)
"""What the kernel leaves in the registers for a call that it means to restart (ERESTARTSYS and kin)."""

_GRACE_S = 5.0

_REGISTERS = (
    "r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax rip cs eflags rsp ss fs_base "
    "gs_base ds es fs gs"
)
_ARGUMENTS = ("rdi", "rsi", "rdx", "r10", "r8", "r9")


class _Registers(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in _REGISTERS.split())


class _Ended(Exception):
    """The process died, or is being killed, while it was stopped."""


class _Late(Exception):
    """The thread did not stop by the deadline."""


def inject_syscall(pid: int, number: int, *arguments: int, timeout_s: float = 5.0) -> int:
    """Let the main thread of process `pid` make the system call `number`; return what it returned.

    A failed call returns the negative errno, as the kernel gives it. Raises `VmmError` when the process
    does not exist or dies meanwhile, `KernelError` when tracing is refused or the thread cannot be
    stopped within `timeout_s`. In each case the thread goes on as if nothing had happened.
    Blocks; call it from a worker thread, at any moment, from any thread.
    """
    outcome: list[int | TranshumeError] = []

    def work() -> None:
        try:
            outcome.append(_inject(pid, number, arguments, timeout_s))
        except _Ended:
            outcome.append(VmmError(f"Process {pid} ended while it was asked for a system call."))
        except _Late:
            outcome.append(
                KernelError(
                    f"The main thread of process {pid} did not stop within {timeout_s:g} s; it may wait for "
                    "a disk. Try again."
                )
            )
        except TranshumeError as error:
            outcome.append(error)
        except OSError as error:
            outcome.append(
                KernelError(f"The kernel refused to trace process {pid}: {error.strerror}. Run as root.")
            )

    thread = threading.Thread(target=work, name=f"inject-{pid}")
    thread.start()
    thread.join()
    if not outcome:
        raise KernelError(f"Tracing process {pid} failed in an unforeseen way; see the log.")
    if isinstance(outcome[0], TranshumeError):
        raise outcome[0]
    return outcome[0]


def _inject(pid: int, number: int, arguments: tuple[int, ...], timeout_s: float) -> int:
    instruction = _find_syscall_instruction(pid)
    deadline_s = time.monotonic() + timeout_s
    try:
        _ptrace(_SEIZE, pid)
    except ProcessLookupError:
        raise VmmError(f"Process {pid} does not run.") from None
    _ptrace(_INTERRUPT, pid)
    _wait_for_interrupt(pid, deadline_s)
    try:
        return _borrow(pid, instruction, number, arguments, deadline_s)
    finally:
        _detach(pid)


def _borrow(pid: int, instruction: int, number: int, arguments: tuple[int, ...], deadline_s: float) -> int:
    """With the thread stopped: make the call and restore everything."""
    saved_mask = ctypes.c_uint64()
    _ptrace(_GETSIGMASK, pid, 8, ctypes.addressof(saved_mask))
    saved = _read_registers(pid)
    try:
        mask = ctypes.c_uint64(_ALL_SIGNALS_BUT_TRAP)
        _ptrace(_SETSIGMASK, pid, 8, ctypes.addressof(mask))
        for _ in range(8):
            result = _step(pid, saved, instruction, number, arguments, deadline_s)
            if -result not in _RESTART_ERRNOS:
                return result
        raise KernelError(f"The system call {number} in process {pid} was interrupted again and again.")
    finally:
        _swallow_trap(pid)
        _write_registers(pid, saved)
        _ptrace(_SETSIGMASK, pid, 8, ctypes.addressof(saved_mask))


def _step(
    pid: int,
    saved: _Registers,
    instruction: int,
    number: int,
    arguments: tuple[int, ...],
    deadline_s: float,
) -> int:
    registers = _Registers.from_buffer_copy(saved)
    registers.rip = instruction
    registers.rax = number
    registers.orig_rax = 0xFFFF_FFFF_FFFF_FFFF
    for name, value in zip(_ARGUMENTS, arguments, strict=False):
        setattr(registers, name, value & 0xFFFF_FFFF_FFFF_FFFF)
    _write_registers(pid, registers)
    done = instruction + len(_SYSCALL_INSTRUCTION)
    while True:
        _ptrace(_SINGLESTEP, pid)
        try:
            _wait_for_stop(pid, deadline_s)
        except _Late:
            # The call itself blocks. Break it off: the registers can be restored only in a stop.
            _ptrace(_INTERRUPT, pid)
            _wait_for_stop(pid, time.monotonic() + _GRACE_S)
            raise
        # A job-control stop may come before the step, and the step is then still to be made.
        registers = _read_registers(pid)
        if registers.rip == done:
            return int(ctypes.c_int64(registers.rax).value)
        if registers.rip != instruction:
            raise KernelError(f"Process {pid} left the injected system call for {registers.rip:#x}.")


def _swallow_trap(pid: int) -> None:
    """Take a SIGTRAP of our step that another stop overtook: left pending, it would kill the process."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as status:
            pending = next(int(line.split()[1], 16) for line in status if line.startswith("SigPnd:"))
    except (FileNotFoundError, ProcessLookupError, StopIteration):
        raise _Ended from None
    if pending >> (signal.SIGTRAP - 1) & 1:
        # The signal comes before any instruction is executed.
        _ptrace(_CONT, pid)
        _wait_for_stop(pid, time.monotonic() + _GRACE_S)


def _wait_for_interrupt(pid: int, deadline_s: float) -> None:
    """Wait for the stop that was asked for; signals that come first are delivered as if untraced."""
    while True:
        status = _wait_for_stop(pid, deadline_s)
        if status >> 16 == _EVENT_STOP:
            return
        _ptrace(_CONT, pid, 0, os.WSTOPSIG(status))


def _wait_for_stop(pid: int, deadline_s: float) -> int:
    while True:
        try:
            waited, status = os.waitpid(pid, os.WNOHANG | _WALL)
        except ChildProcessError:
            raise _Ended from None
        if waited == pid:
            if not os.WIFSTOPPED(status):
                raise _Ended
            return status
        if time.monotonic() > deadline_s:
            raise _Late
        time.sleep(0.0001)


def _ptrace(request: int, pid: int, address: int = 0, data: int = 0) -> None:
    try:
        checked(libc.ptrace(request, pid, address, data))
    except ProcessLookupError:
        if request == _SEIZE:
            raise
        raise _Ended from None  # a stopped tracee disappears only when it is killed


def _read_registers(pid: int) -> _Registers:
    registers = _Registers()
    _ptrace(_GETREGS, pid, 0, ctypes.addressof(registers))
    return registers


def _write_registers(pid: int, registers: _Registers) -> None:
    _ptrace(_SETREGS, pid, 0, ctypes.addressof(registers))


def _detach(pid: int) -> None:
    try:
        _ptrace(_DETACH, pid)
    except (_Ended, OSError) as error:
        # Dead or being killed: there is nothing to let go of.
        if isinstance(error, OSError) and error.errno != errno.ESRCH:
            raise


def _find_syscall_instruction(pid: int) -> int:
    """The address of any `syscall` instruction in the process's vDSO."""
    try:
        with open(f"/proc/{pid}/maps", encoding="ascii", errors="replace") as maps:
            lines = [line for line in maps if line.rstrip().endswith("[vdso]")]
        if not lines:
            raise KernelError(f"Process {pid} has no vDSO (boot without vdso=0).")
        start, end = (int(bound, 16) for bound in lines[0].split()[0].split("-"))
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            memory.seek(start)
            code = memory.read(end - start)
    except FileNotFoundError:
        raise VmmError(f"Process {pid} does not run.") from None
    except (ProcessLookupError, PermissionError, OSError) as error:
        raise KernelError(f"The memory of process {pid} cannot be read: {error}. Run as root.") from None
    offset = code.find(_SYSCALL_INSTRUCTION)
    if offset < 0:
        raise KernelError(f"The vDSO of process {pid} holds no syscall instruction.")
    return start + offset
