"""A system call is made in another process, and the process never knows."""

from __future__ import annotations

import contextlib
import os
import signal
import threading

import pytest
from tests.memory.processes import needs_tracking, python_child, wait_until

from transhume.memory.inject import inject_syscall
from transhume.model.errors import KernelError, VmmError

pytestmark = needs_tracking

GETPID, IOCTL, PAUSE, CLOSE = 39, 16, 34, 3

SLEEPER = """
import sys, time, select, os
print("ready", flush=True)
began = time.monotonic()
time.sleep(0.3)
select.select([], [], [], 0.3)
print("slept", time.monotonic() - began, flush=True)
sys.stdin.readline()
print("read", flush=True)
sys.stdin.readline()
"""

COUNTER = """
import os, signal, sys
seen = 0
inlet, outlet = os.pipe()
os.set_blocking(outlet, False)
signal.set_wakeup_fd(outlet)
signal.signal(signal.SIGRTMIN, lambda *_: None)
print("ready", flush=True)
while seen < int(sys.argv[1]):
    seen += len(os.read(inlet, 1000))
print("seen", seen, flush=True)
sys.stdin.readline()
"""


def test_the_result_comes_back() -> None:
    with python_child(SLEEPER) as child:
        assert child.hear() == "ready"
        assert inject_syscall(child.pid, GETPID) == child.pid


def test_a_failed_call_returns_its_errno() -> None:
    with python_child(SLEEPER) as child:
        assert child.hear() == "ready"
        assert inject_syscall(child.pid, IOCTL, 999, 0, 0) == -9
        assert inject_syscall(child.pid, CLOSE, 2**64 - 1) == -9


def test_interrupted_waits_go_on_as_if_nothing_had_happened() -> None:
    with python_child(SLEEPER) as child:
        assert child.hear() == "ready"
        done = threading.Event()

        def disturb() -> None:
            while not done.is_set():
                assert inject_syscall(child.pid, GETPID) == child.pid
                done.wait(0.003)

        thread = threading.Thread(target=disturb)
        thread.start()
        try:
            word, slept_s = child.hear().split()
            child.say("")
            assert child.hear() == "read"
        finally:
            done.set()
            thread.join()
        assert word == "slept"
        assert float(slept_s) >= 0.6


def test_no_signal_is_lost_or_doubled() -> None:
    count = 300
    with python_child(COUNTER, count) as child:
        assert child.hear() == "ready"

        def signal_it() -> None:
            for _ in range(count):
                os.kill(child.pid, signal.SIGRTMIN)

        thread = threading.Thread(target=signal_it)
        thread.start()
        while thread.is_alive():
            assert inject_syscall(child.pid, GETPID) == child.pid
        thread.join()
        assert child.hear() == f"seen {count}"
        assert child.process.poll() is None


def test_a_stopped_process_answers_and_stays_stopped() -> None:
    with python_child(SLEEPER) as child:
        assert child.hear() == "ready"
        os.kill(child.pid, signal.SIGSTOP)
        wait_until(lambda: _state(child.pid) == "T")
        assert inject_syscall(child.pid, GETPID) == child.pid
        wait_until(lambda: _state(child.pid) == "T")
        os.kill(child.pid, signal.SIGCONT)
        assert child.hear().startswith("slept")


def test_a_call_that_blocks_is_broken_off_and_the_process_goes_on() -> None:
    with python_child(SLEEPER) as child:
        assert child.hear() == "ready"
        with pytest.raises(KernelError, match="did not stop"):
            inject_syscall(child.pid, PAUSE, timeout_s=0.05)
        assert child.hear().startswith("slept")
        child.say("")
        assert child.hear() == "read"


def test_a_process_that_dies_meanwhile() -> None:
    with python_child(SLEEPER) as child:
        assert child.hear() == "ready"
        timer = threading.Timer(0.05, child.process.kill)
        timer.start()
        with pytest.raises(VmmError, match="ended"):
            inject_syscall(child.pid, PAUSE, timeout_s=20)
        timer.join()


def test_a_process_that_does_not_exist() -> None:
    with python_child(SLEEPER) as child:
        child.process.kill()
        child.process.wait()
        with pytest.raises(VmmError, match="does not run"):
            inject_syscall(child.pid, GETPID)


def test_a_process_that_somebody_else_traces() -> None:
    with python_child(SLEEPER) as child, python_child(_TRACER, child.pid) as tracer:
        assert child.hear() == "ready"
        assert tracer.hear() == "attached"
        with pytest.raises(KernelError, match="refused to trace"):
            inject_syscall(child.pid, GETPID)


_TRACER = """
import ctypes, sys
ctypes.CDLL(None).ptrace(0x4206, int(sys.argv[1]), None, None)
print("attached", flush=True)
sys.stdin.readline()
"""


def test_any_thread_may_ask_at_any_time() -> None:
    with python_child(SLEEPER) as child:
        assert child.hear() == "ready"
        results: list[int] = []
        for _ in range(20):
            thread = threading.Thread(target=lambda: results.append(inject_syscall(child.pid, GETPID)))
            thread.start()
            thread.join()
        assert results == [child.pid] * 20


def _state(pid: int) -> str:
    with contextlib.suppress(FileNotFoundError), open(f"/proc/{pid}/stat", encoding="ascii") as stat:
        return stat.read().rpartition(")")[2].split()[0]
    return ""
