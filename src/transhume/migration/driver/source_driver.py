"""Carries out the source machine's commands: QEMU, guest RAM, and the connection to the destination.

Threads: the event loop runs the machine and talks to QEMU; one data thread reads and sends memory; one
reader thread takes what the destination says.
"""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from transhume.memory import runs as page_runs
from transhume.memory.ram import GuestRam
from transhume.memory.runs import Runs
from transhume.migration import events as ev
from transhume.migration import wire
from transhume.migration.driver.attach import TrackedRam
from transhume.migration.driver.control import ControlServer
from transhume.migration.driver.dirty_probe import DirtyProbe
from transhume.migration.driver.handshake import Identity, connect
from transhume.migration.driver.job import MoverJob
from transhume.migration.driver.journal import Journal
from transhume.migration.driver.loop import Driver, Handler, clock_of, end
from transhume.migration.driver.owed_file import OwedFile
from transhume.migration.driver.passes import Passes, page_count
from transhume.migration.driver.reach import reach
from transhume.migration.driver.safe_copying import SafeCopying
from transhume.migration.machine import Command, Event
from transhume.migration.path_choice import PathChoice
from transhume.migration.policy import pace_bytes_s
from transhume.migration.progress import ProgressTracker
from transhume.migration.register import Register
from transhume.migration.source import SourceMachine
from transhume.migration.source_table import DESTINATION_MAY_COMMIT, SourceState
from transhume.migration.transfer.channel import FrameChannel
from transhume.migration.transfer.native_relay import NativeRelay
from transhume.migration.transfer.owed_pages import OwedPages
from transhume.migration.transfer.pace import Pace
from transhume.migration.transfer.safe_copy import safe_copy_path
from transhume.migration.transfer.sender import PageSender
from transhume.migration.transfer.verification import Comparison
from transhume.model.errors import (
    HostLost,
    PagesLost,
    PeerProtocolError,
    StoreError,
    TimedOut,
    TranshumeError,
    VmmError,
)
from transhume.model.migration import Engine, MigrationOptions, Mode, Outcome, Phase, Rest
from transhume.model.orders import Adjustment, AdjustReply, MigrationUpdate, Prepared, ReviveReply
from transhume.model.vm import PAGE_BYTES, Accel, Display
from transhume.trust.credentials import Credentials
from transhume.vmm.device_state import OutgoingState, prepare_save
from transhume.vmm.image_lock import has_writer
from transhume.vmm.log import last_words
from transhume.vmm.migrate_command import end_abandoned
from transhume.vmm.monitor import Monitor
from transhume.vmm.native import NativeOptions, NativeOutgoing
from transhume.vmm.niceness import LEAST_URGENT, put_this_thread_first, set_niceness
from transhume.vmm.paths import VmPaths
from transhume.vmm.process import QemuProcess, find_running

REGISTER_LIMIT_S = 1.0
"""A register that does not answer within this time is not trusted with a suspended VM."""

REGISTER_RETRY_S = 0.5

STALLED_PAUSE_S = 0.05
"""A migration that waits for the guest to calm down does not spin meanwhile."""

LAST_WORDS_S = 0.3
STUCK_S = 1.0
QUIT_LIMIT_S = 3.0
Result = TypeVar("Result")

COMMITTED_STATES = frozenset({SourceState.COMMITTED.value, SourceState.RETIRING.value})
PAGING_STATES = frozenset({SourceState.PAGING.value, SourceState.RECONNECTING.value})
REVIVE_POLL_S = 0.05
HEARD_S = 0.5
"""While hashes are compared nothing else is heard: that they come is a sign of life."""

MAY_COMMIT_STATES = frozenset(state.value for state in DESTINATION_MAY_COMMIT)


class SourceDriver(Driver[SourceState]):
    """The source's mover."""

    lasting = frozenset(
        {
            ev.SwapToSource,
            ev.ResumeVm,
            ev.TellPeerAborted,
            ev.RetireVm,
            ev.TellPeerFinished,
            ev.Reconnect,
            ev.AskController,
            ev.SwapBack,
        }
    )

    def __init__(
        self,
        job: MoverJob,
        paths: VmPaths,
        journal: Journal,
        register: Register,
        control: ControlServer,
        credentials: Credentials,
    ) -> None:
        self._predecessor_state = journal.last_state()
        ram_bytes = sum(block.size_bytes for block in job.ram_blocks)
        self._owed_file = OwedFile(journal.folder)
        owed = self._owed_file.read()
        machine = SourceMachine(job.migration, ram_bytes, time.monotonic(), owed is not None)
        super().__init__(job, machine, journal, register, control)
        self._source = machine
        self._paths = paths
        self._credentials = credentials
        self._options = job.migration.options
        self._progress = ProgressTracker(job.migration.id, job.migration.vm, self._options, time.monotonic())
        self._data_thread = ThreadPoolExecutor(1, thread_name_prefix="data")
        self._data_busy = False
        self._process: QemuProcess | None = None
        self._monitor: Monitor | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._tracked: TrackedRam | None = None
        self._native_relay: NativeRelay | None = None
        self._reader: threading.Thread | None = None
        self._stop = threading.Event()
        self._pace = Pace(self._options.bandwidth_bytes_s)
        self._passes: Passes | None = None
        self._answers: dict[wire.FrameType, asyncio.Future[wire.Message]] = {}
        self._outgoing: OutgoingState | None = None
        self._native: NativeOutgoing | None = None
        self._load_ms = 0.0
        self._commit_ms = 0.0
        self._beat_s = 0.0
        self._ram: GuestRam | None = None
        self._fault_channel: FrameChannel | None = None
        self._fault_server: threading.Thread | None = None
        self._owed = OwedPages()
        self._streamed: tuple[bytes, int, str] | None = None
        self._missing: list[Runs] = []
        self._resumed_there = asyncio.Event()
        self._safe_copying = SafeCopying(safe_copy_path(job.migration), job.migration.id, self._log)
        self._owed_before: list[Runs] = owed or []
        self._choice = PathChoice(_addresses_of(job.prepared), self._options.peer_silence_limit_s)
        self._address = self._choice.last_worked

    # --- the frame's questions -------------------------------------------------------------------

    def handlers(self) -> Mapping[type[Command], Handler]:
        return {
            ev.ConnectPeer: self._connect_peer,
            ev.ArmTracking: self._arm_tracking,
            ev.SendPass: self._send_pass,
            ev.InterruptPass: self._interrupt_pass,
            ev.RunNative: self._run_native,
            ev.PauseVm: self._pause_vm,
            ev.SendLastPages: self._send_last_pages,
            ev.SendState: self._send_state,
            ev.SwapToSource: self.swap_to_source,
            ev.ResumeVm: self._resume_vm,
            ev.TellPeerAborted: self._tell_peer_aborted,
            ev.RetireVm: self._retire_vm,
            ev.TellPeerFinished: self._tell_peer_finished,
            ev.StartPush: self._start_push,
            ev.Reconnect: self._reconnect,
            ev.AskController: self.ask_controller,
            ev.SwapBack: self.swap_back,
        }

    @property
    def past_point_of_no_return(self) -> bool:
        return self._source.past_point_of_no_return

    async def begin(self) -> Event | None:
        """Find the VM; a successor also finds how far its predecessor came."""
        await self._attach_vm()
        before = self._predecessor_state
        if before is None:
            return ev.Started()
        if before in PAGING_STATES:
            self._copy_what_is_owed()
            return ev.Recovered(state_may_be_sent=True, paging=True)
        if before == SourceState.REVIVING.value:
            return ev.Recovered(state_may_be_sent=True, reviving=True)
        if before in COMMITTED_STATES:
            # The register has the last word, and it cannot have changed since.
            return ev.Recovered(state_may_be_sent=True)
        return ev.Recovered(state_may_be_sent=before in MAY_COMMIT_STATES)

    def update(self) -> MigrationUpdate:
        now_s = time.monotonic()
        machine = self._source
        report = machine.report(now_s)
        left_pages = self._owed.left_pages
        if left_pages is not None:
            self._progress.paging(left_pages, machine.state is SourceState.RECONNECTING)
            wire_bytes = report.wire_bytes + self._owed.wire_bytes
            report = report.model_copy(
                update={"wire_bytes": wire_bytes, "suspended_at_s": self._owed_file.written_at_s()}
            )
        if report.paging is not None:
            paging = self._safe_copying.report(report.paging)
            path = self._choice.last_worked if self._choice.is_choice else ""
            report = report.model_copy(update={"paging": paging.model_copy(update={"path": path})})
        return MigrationUpdate(
            migration=self.migration.id,
            host=self.migration.source,
            phase=machine.phase,
            outcome=machine.outcome if machine.finished else Outcome.RUNNING,
            runs_at=machine.runs_at,
            error_code=machine.error_code,
            error=machine.error,
            progress=self._progress.snapshot(machine.phase, now_s, clock_of),
            report=report,
        )

    def taken(self, event: Event) -> None:
        if isinstance(event, ev.PassEnded):
            self._progress.pass_ended(event.result, self._source.last_decision)
        elif isinstance(event, ev.PeerRunning):
            self._copy_what_is_owed()  # not while the VM stands still
        elif isinstance(event, ev.Reconnected) and event.missing_pages:
            self._copy_what_is_owed()  # the word that it runs may have been lost

    def _copy_what_is_owed(self) -> None:
        """Begin the safe copy, if there is to be one; it goes on by itself."""
        owed = self._owed_before if self._passes is None else self._passes.owed
        if owed and self._ram is not None:
            self._safe_copying.begin(self._ram, owed)

    def adjust(self, adjustment: Adjustment) -> AdjustReply:
        """Take other limits, now; or say why not, and change nothing."""
        phase = self._source.phase
        if self._options.engine is Engine.QEMU:
            return AdjustReply(accepted=False, message="QEMU's own engine takes no other limits on its way")
        if adjustment.switch_to_post_copy and not self._options.may_page:
            return AdjustReply(
                accepted=False,
                message="the destination was not prepared for page faults: the migration began with "
                f"{_why_no_paging(self._options)}",
            )
        if adjustment.switch_to_post_copy and phase not in (Phase.PREPARED, Phase.PRECOPY):
            return AdjustReply(
                accepted=False, message=f"it is past or before its pre-copy, in phase {phase.value}"
            )
        changes = adjustment.model_dump(exclude_none=True, exclude={"switch_to_post_copy"})
        if "bandwidth_bytes_s" in changes:
            changes["bandwidth_bytes_s"] = changes["bandwidth_bytes_s"] or None
        if changes:
            self._options = MigrationOptions.model_validate(self._options.model_dump() | changes)
            self._set_pace()
            self._progress.options = self._options
            self.post(ev.OptionsChanged(self._options))
        if adjustment.switch_to_post_copy:
            self.post(ev.SwitchRequested())
        return AdjustReply(accepted=True)

    def _set_pace(self) -> None:
        self._pace.rate_bytes_s = pace_bytes_s(self._options, self._owed.left_pages or 0)

    async def revive(self) -> ReviveReply:
        """Take the VM back from a destination that is lost; or say why not, and change nothing."""
        machine, destination = self._source, self.migration.destination
        if machine.state is not SourceState.RECONNECTING:
            return self._not_revived(
                f"host {destination} is not lost to it: the source is in state {machine.state.value}"
            )
        written = await asyncio.to_thread(self._why_disks_forbid)
        if written:
            return self._not_revived(written)
        self.post(ev.ReviveRequested())
        while (why := self._why_no_revival()) == "" and not machine.finished:
            await asyncio.sleep(REVIVE_POLL_S)
        if why:
            return self._not_revived(why)
        return ReviveReply(revived=True, runs_at=machine.runs_at)

    def _why_disks_forbid(self) -> str:
        """Why the VM may still run somewhere, as its disks tell; empty when they do not."""
        for disk in self.job.spec.disks:
            try:
                if not disk.read_only and has_writer(disk.path):
                    return (
                        f"disk {disk.path} is open for writing: the VM still runs somewhere, so host "
                        f"{self.migration.destination} is not dead; switch it off first"
                    )
            except OSError as error:
                return f"whether disk {disk.path} is still written cannot be told: {error.strerror}"
        return ""

    def _why_no_revival(self) -> str:
        """Why the revival that was asked for does not come; empty while it may, or has."""
        machine = self._source
        if machine.state is SourceState.RECONNECTING and machine.vm_died:
            return "the source's QEMU has ended, so nothing is left that could run"
        if machine.state is SourceState.RECONNECTING and machine.revival_refused:
            return "the register has given the VM to somebody else meanwhile"
        if machine.state in (SourceState.PAGING, SourceState.RETIRING, SourceState.DONE):
            return f"host {self.migration.destination} has answered after all"
        return ""

    def _not_revived(self, why: str) -> ReviveReply:
        return ReviveReply(revived=False, message=why, runs_at=self._source.runs_at)

    def stop_work(self) -> None:
        self._stop.set()
        self._loop.call_later(STUCK_S, self._cut_if_stuck, self._channel)

    def _cut_if_stuck(self, channel: FrameChannel | None) -> None:
        """A data thread that does not stop by itself hangs on a dead link."""
        if self._data_busy and channel is not None and channel is self._channel:
            channel.shutdown("the migration was given up")

    async def tick(self, now_s: float) -> None:
        """A sign of life when nothing else travels; QEMU's own numbers for its own engine."""
        beat_s = min(1.0, self._options.peer_silence_limit_s / 4)
        if self._channel is not None and not self._data_busy and now_s - self._beat_s >= beat_s:
            self._beat_s = now_s
            await asyncio.to_thread(self._send_if_open, wire.Ping(token=int(now_s * 1000)))
        if self._native is not None and self._source.phase is Phase.PRECOPY:
            native = await self._native.progress()
            self._progress.native(
                native.transferred_bytes,
                native.remaining_bytes,
                native.dirty_pages_s * 4096.0,
                native.iteration,
                native.expected_downtime_ms,
                now_s,
            )

    async def close(self) -> None:
        self._stop.set()
        if self._native_relay is not None:
            self._native_relay.shutdown()
        for channel in (self._channel, self._fault_channel):
            if channel is not None:
                channel.shutdown()
        await end(self._watcher)
        await asyncio.to_thread(self._safe_copying.close)
        self._data_thread.shutdown(wait=True)
        await self._close_connections()
        if self._native_relay is not None:
            await asyncio.to_thread(self._native_relay.close)
        if self._ram is not None:
            self._ram.close()
        if self._tracked is not None:
            self._tracked.close()
        if self._monitor is not None:
            await self._monitor.close()
        if self._process is not None:
            self._process.close()

    # --- on the way ------------------------------------------------------------------------------

    async def _attach_vm(self) -> None:
        process = find_running(self._paths)
        if process is None:
            self.post(ev.QemuDied("it was not running when the mover started"))
            return
        self._process = process
        if self._predecessor_state is not None:
            self._ram = GuestRam.of_process(process.pid)  # held from now on, whatever becomes of QEMU
        self._watcher = asyncio.create_task(self._watch(process), name="watch QEMU")
        self._monitor = await Monitor.connect(self._paths.mover_qmp_socket)

    async def _watch(self, process: QemuProcess) -> None:
        await process.wait()
        words = last_words(self._paths)
        self.post(ev.QemuDied(f"its process ended; its last words: {words}"))

    def _qemu(self) -> Monitor:
        if self._monitor is None:
            raise VmmError(f"QEMU of VM {self.migration.vm} cannot be reached")
        return self._monitor

    async def _connect_peer(self, _: ev.ConnectPeer) -> Event:
        channel = await asyncio.to_thread(self._open_main_channel)
        self._channel = channel
        self._reader = threading.Thread(target=self._read, args=(channel,), name="reader", daemon=True)
        self._reader.start()
        if self._options.may_page:
            await self._open_fault_connection()
        self._choice.worked(self._address)
        return ev.Connected()

    async def _open_fault_connection(self) -> None:
        """Faults travel on a connection of their own, made before the VM depends on it."""
        channel = await asyncio.to_thread(self._open_channel, wire.Role.FAULT)
        assert self._ram is not None
        self._fault_channel = channel
        self._fault_server = threading.Thread(
            target=self._serve_faults, args=(channel, self._ram), name="fault server", daemon=True
        )
        self._fault_server.start()

    def _serve_faults(self, channel: FrameChannel, ram: GuestRam) -> None:
        put_this_thread_first()
        try:
            self._owed.answer_faults(channel, ram)
        except (HostLost, PeerProtocolError) as error:
            self._loop.call_soon_threadsafe(self._lose_fault_connection, channel, error)
        except OSError as error:
            self._log(f"a page could not be read: {error}")
            channel.shutdown("a page could not be read")

    def _lose_fault_connection(self, channel: FrameChannel, error: TranshumeError) -> None:
        """A destination that gives up closes both connections, and tells why on the main one: hear it
        first.
        """

        def lose() -> None:
            if self._fault_channel is channel:
                self._lose_link(error)

        self._loop.call_later(LAST_WORDS_S, lose)

    async def _close_connections(self) -> None:
        """End both connections and wait for their threads. The data thread must be idle or ending."""
        for channel in (self._channel, self._fault_channel):
            if channel is not None:
                channel.shutdown()
        for thread in (self._reader, self._fault_server):
            if thread is not None:
                await asyncio.to_thread(thread.join)
        for channel in (self._channel, self._fault_channel):
            if channel is not None:
                channel.close()
        self._channel = self._fault_channel = self._reader = self._fault_server = None

    def _open_main_channel(self, again: bool = False) -> FrameChannel:
        """To the first of the destination's addresses that answers. All other connections follow it there."""
        prepared = self.job.prepared
        assert prepared is not None
        channel, self._address = reach(
            self._choice, prepared.port, self._identity(), self._credentials, self._stop, again
        )
        return channel

    def _open_channel(self, role: wire.Role) -> FrameChannel:
        prepared = self.job.prepared
        assert prepared is not None
        return connect(self._address, prepared.port, self._identity(), role, self._credentials)

    def _identity(self) -> Identity:
        prepared = self.job.prepared
        assert prepared is not None
        if self._ram is None:
            if self._process is None:
                raise self._memory_is_gone()
            self._ram = GuestRam.of_process(self._process.pid)
        blocks = self._ram.ram_blocks
        return Identity(
            migration=self.migration.id,
            source=self.migration.source,
            destination=self.migration.destination,
            key=bytes.fromhex(prepared.key),
            ram_blocks=blocks,
            silence_limit_s=self._options.peer_silence_limit_s,
        )

    def _memory_is_gone(self) -> TranshumeError:
        """QEMU has ended, and its mover before: what the safe copy holds, the destination reads by itself."""
        if self._safe_copying.holds_all([each.size_bytes // PAGE_BYTES for each in self.job.ram_blocks]):
            return HostLost(f"the memory of VM {self.migration.vm} is in its safe copy alone")
        return PagesLost(f"QEMU of VM {self.migration.vm} has ended, and nobody else has its memory")

    async def _arm_tracking(self, _: ev.ArmTracking) -> Event:
        monitor = self._qemu()
        self.warm_up_register()
        if self._options.engine is Engine.TRANSHUME:
            assert self._process is not None
            self._tracked = await TrackedRam.attach(monitor, self._process.pid)
            await self._in_data_thread(self._tracked.tracker.arm)
            assert self._channel is not None
            self._passes = Passes(
                self._channel,
                self._tracked.ram,
                self._tracked.tracker,
                self._pace,
                self._stop,
                self._on_progress,
            )
            await prepare_save(monitor)
            self._outgoing = await OutgoingState.prepare(monitor)
        return ev.Armed(self.job.switchover_cost_s)

    async def _send_pass(self, command: ev.SendPass) -> Event:
        tracked, passes = self._tracked, self._passes
        assert tracked is not None
        assert passes is not None
        decision = self._source.last_decision
        if decision is not None and decision.stalled:
            await asyncio.sleep(STALLED_PAUSE_S)
        runs = tracked.ram.populated_runs() if command.index == 0 else passes.left
        passes.interrupt.clear()
        probe = None
        if command.index == 0 and self._options.mode is Mode.AUTO and self._options.may_page:
            probe = DirtyProbe(tracked.tracker, time.monotonic())
        self._progress.pass_started(command.index, page_count(runs))
        began_s = time.monotonic()
        sent, unsent = await self._in_data_thread(passes.send, runs, probe)
        acknowledged = self._expect(wire.FrameType.PASS_ACK)
        await self._send(wire.PassEnd(iteration=command.index, pages=sent.pages, zero_pages=sent.zero_pages))
        await acknowledged
        duration_s = time.monotonic() - began_s
        await self._in_data_thread(passes.scan, unsent, probe)
        dirty_pages = page_count(passes.latest)
        result = ev.PassResult(
            index=command.index,
            pages=sent.pages,
            zero_pages=sent.zero_pages,
            wire_bytes=sent.wire_bytes,
            duration_s=duration_s,
            dirty_pages_after=dirty_pages,
            unsent_pages=page_count(passes.left) - dirty_pages,
            written_bytes_s=None if probe is None else probe.written_bytes_s,
        )
        return ev.PassEnded(result)

    async def _interrupt_pass(self, _: ev.InterruptPass) -> None:
        if self._passes is not None:
            self._passes.interrupt.set()

    def _on_progress(self, pages: int, wire_bytes: int) -> None:
        now_s = time.monotonic()
        self._loop.call_soon_threadsafe(self._progress.sent, pages, wire_bytes, now_s)

    async def _pause_vm(self, _: ev.PauseVm) -> Event:
        """Let QEMU set its part up while the VM still runs; stop the vCPUs; let QEMU write its devices.

        A TCG guest with a frame buffer is stopped first: QEMU would track the frame buffer's changes
        meanwhile, and before 9.0 it loses some under TCG (see `vmm.command_line.TCG_TRIM_BYTES`).
        """
        assert self._outgoing is not None
        try:
            async with asyncio.timeout(REGISTER_LIMIT_S):
                await self._register.ownership(self.migration.vm)
        except (HostLost, StoreError, TimeoutError) as error:
            await asyncio.sleep(REGISTER_RETRY_S)
            return ev.RegisterSilent(str(error) or f"no answer within {REGISTER_LIMIT_S:g} s")
        spec = self.job.spec
        stop_first = spec.accel is Accel.TCG and spec.display is not Display.NONE
        if not stop_first:
            await self._outgoing.start()
        stopping_s = time.monotonic()
        await self._qemu().stop()
        if stop_first:
            await self._outgoing.start()
        self._outgoing.release()
        return ev.VmPaused(stopping_s)

    async def _send_last_pages(self, command: ev.SendLastPages) -> Event:
        passes, verify = self._passes, self._options.verify
        assert passes is not None
        began_s = time.monotonic()
        verified = self._expect(wire.FrameType.PAGES_VERIFIED)
        if command.rest.after_resume:
            first = not self._source.passes
            owed_pages, sent = await self._in_data_thread(
                passes.name_owed, self._owed, self._owed_file, command.budget_pages, first, verify
            )
            result = ev.PassResult(
                index=len(self._source.passes),
                pages=sent.pages,
                zero_pages=sent.zero_pages,
                wire_bytes=sent.wire_bytes,
                duration_s=time.monotonic() - began_s,
                dirty_pages_after=owed_pages,
            )
            if owed_pages or not verify:
                return ev.LastPagesSent(result, owed_pages=owed_pages)
            await verified  # nothing is left for later, so this is the time to compare
            return ev.LastPagesSent(result, time.monotonic() - began_s - result.duration_s)
        if command.rest is Rest.AFTER_STATE:
            self._streamed = await self._stream_state()
        sent, last_page_s = await self._in_data_thread(passes.send_rest, verify)
        if verify:
            await verified
        result = ev.PassResult(
            index=len(self._source.passes),
            pages=sent.pages,
            zero_pages=sent.zero_pages,
            wire_bytes=sent.wire_bytes,
            duration_s=last_page_s - began_s,
            dirty_pages_after=0,
        )
        verify_s = time.monotonic() - last_page_s if verify else 0.0
        return ev.LastPagesSent(result, verify_s)

    async def _send_state(self, _: ev.SendState) -> Event:
        if self._options.engine is Engine.QEMU:
            return await self._end_native_state()
        passes = self._passes
        assert passes is not None
        held, length_bytes, digest_hex = self._streamed or await self._stream_state()
        end = wire.StateEnd(length_bytes=length_bytes, sha256=digest_hex)
        await self._in_data_thread(passes.end_state, held, end, self._owed, self._owed_file)
        return ev.StateSent(length_bytes)

    async def _stream_state(self) -> tuple[bytes, int, str]:
        """Send the device state but for its last piece, which comes back with the length and hash of all."""
        channel, outgoing = self._channel, self._outgoing
        assert channel is not None
        assert outgoing is not None
        fingerprint = hashlib.sha256()
        length_bytes = 0
        # One piece is held back until the next one has come, to go together with the end: a small state has
        # come whole by now, and each turn of the data thread is downtime.
        held = b""
        async for chunk in outgoing.chunks():
            if held:
                await self._in_data_thread(channel.send_state, held)
            fingerprint.update(chunk)
            length_bytes += len(chunk)
            held = chunk
        await outgoing.finish()
        return held, length_bytes, fingerprint.hexdigest()

    # --- QEMU's own engine -----------------------------------------------------------------------

    async def _end_native_state(self) -> Event:
        """QEMU has sent everything through its own connection: only the end marks are ours."""
        await self._send(
            wire.LastPagesEnd(pages=0, zero_pages=0),
            wire.StateEnd(length_bytes=0, sha256=hashlib.sha256().hexdigest()),
        )
        return ev.StateSent(0)

    async def _run_native(self, _: ev.RunNative) -> Event:
        """QEMU copies, stops the VM by itself and sends everything; the end mark goes through our channel."""
        channel = await asyncio.to_thread(self._open_channel, wire.Role.NATIVE)
        relay = self._native_relay = NativeRelay(channel)
        options = NativeOptions(
            downtime_limit_ms=max(1, int(self._options.max_downtime_ms)),
            max_bandwidth_bytes_s=self._options.bandwidth_bytes_s,
        )
        self._native = await NativeOutgoing.begin(self._qemu(), relay.qemu_end, options)
        relay.release()
        began_s = time.monotonic()
        self.post(ev.VmPaused(await self._native.wait_stopped()))
        native = await self._native.finish()
        self._progress.native(native.transferred_bytes, 0, 0.0, native.iteration, None, time.monotonic())
        return ev.LastPagesSent(
            ev.PassResult(
                index=native.iteration,
                pages=native.normal_pages,
                zero_pages=native.zero_pages,
                wire_bytes=native.transferred_bytes,
                duration_s=time.monotonic() - began_s,
                dirty_pages_after=0,
            )
        )

    # --- pages owed after the resume -------------------------------------------------------------

    async def _start_push(self, _: ev.StartPush) -> None:
        """Send everything that is owed, in the order of `PushOrder`; on demand alone, only from the deadline
        on: what nobody ever needs would otherwise be owed for ever.
        """
        if self._source.rest is not Rest.BACKGROUND:
            await self._resumed_there.wait()  # the first faults are worth more than any push
        if self._source.rest is Rest.ON_DEMAND:
            await asyncio.sleep(max(0.0, self._source.deadline_s - time.monotonic()))
        assert self._channel is not None
        assert self._ram is not None
        self._set_pace()
        sender = PageSender(self._channel, self._ram, self._stop, self._on_progress)
        await self._in_data_thread(self._owed.push, self._channel, sender, self._pace, self._stop)

    async def _reconnect(self, _: ev.Reconnect) -> Event:
        """Make both connections anew and learn what is missing there: only the destination knows."""
        for channel_before in (self._channel, self._fault_channel):
            if channel_before is not None:
                channel_before.shutdown()  # a push that hangs on it ends
        await asyncio.wrap_future(self._data_thread.submit(lambda: None))  # the push has stopped
        await self._close_connections()
        self._stop.clear()
        channel = await asyncio.to_thread(self._open_main_channel, again=True)
        self._channel = channel
        self._missing = [page_runs.empty() for _ in channel.decoder.block_pages]
        told = self._expect(wire.FrameType.MISSING_END)
        self._reader = threading.Thread(target=self._read, args=(channel,), name="reader", daemon=True)
        self._reader.start()
        message = await told
        assert isinstance(message, wire.MissingEnd)
        if message.pages == 0 and not message.to_compare:
            self._owed_file.remove()
        await self._open_fault_connection()
        self._choice.worked(self._address)
        self._owed.owe(channel.decoder.block_pages, [self._missing])
        self._resumed_there.set()
        return ev.Reconnected(message.pages, message.to_compare)

    # --- back, or on -----------------------------------------------------------------------------

    async def _resume_vm(self, _: ev.ResumeVm) -> Event:
        """Let the VM go on here, first of all; then take the tracking off it."""
        if self._monitor is None and self._process is not None:
            self._monitor = await Monitor.connect(self._paths.mover_qmp_socket)
        self._safe_copying.remove()
        monitor = self._qemu()
        if self._outgoing is not None:
            await self._outgoing.cancel()
        if self._native is not None:
            await self._native.cancel()
        elif self._predecessor_state is not None:
            await end_abandoned(monitor)
        if await monitor.status() != "running":
            await monitor.cont()
        await self._untrack()
        return ev.VmResumed()

    async def _untrack(self) -> None:
        """Best effort: a guest that is still tracked is slower, and right all the same."""
        try:
            if self._tracked is None and self._predecessor_state is not None and self._process is not None:
                self._tracked = await TrackedRam.attach(self._qemu(), self._process.pid)
            if self._tracked is not None:
                await self._in_data_thread(self._tracked.tracker.disarm)
        except TranshumeError as error:
            self._log(f"tracking could not be taken off: {error.message}")

    async def _tell_peer_aborted(self, command: ev.TellPeerAborted) -> None:
        if self._channel is not None:
            await self._in_data_thread(self._send_if_open, wire.Abort(reason=command.message))

    async def _tell_peer_finished(self, _: ev.TellPeerFinished) -> None:
        if self._channel is not None:
            await self._in_data_thread(self._send_if_open, wire.Finished())

    async def _retire_vm(self, _: ev.RetireVm) -> Event:
        process = self._process
        await end(self._watcher)
        if not self._source.ended_owing:
            self._safe_copying.remove()  # otherwise the destination may still read it
        if process is not None:
            try:
                set_niceness(process.pid, LEAST_URGENT)
                await self._qemu().quit()
                await process.wait(QUIT_LIMIT_S)
            except (VmmError, TimedOut):
                await process.kill()
        shutil.rmtree(self._paths.directory, ignore_errors=True)
        return ev.VmRetired()

    # --- the connection --------------------------------------------------------------------------

    def _read(self, channel: FrameChannel) -> None:
        """The reader thread: everything that the destination says, until the connection ends."""
        assert self._ram is not None
        comparison = Comparison(self._ram)
        heard_s = 0.0
        try:
            while True:
                header = channel.receive_header()
                if header.type is wire.FrameType.MISSING:
                    table = bytearray(header.table_bytes)
                    channel.receive_into(memoryview(table))
                    runs = channel.decoder.runs(header, table)
                    self._missing[header.block_index] = page_runs.union(
                        self._missing[header.block_index], runs
                    )
                    continue
                if header.type in (wire.FrameType.DIGEST, wire.FrameType.EMPTY):
                    comparison.take(channel, header)
                    if time.monotonic() - heard_s > HEARD_S:
                        heard_s = time.monotonic()
                        self.post_from_thread(ev.PeerHeard())
                    continue
                message = channel.receive_message(header)
                if isinstance(message, wire.DigestsEnd):
                    self._tell_compared(channel, comparison.end())
                self._loop.call_soon_threadsafe(self._hear, message)
        except (HostLost, PeerProtocolError) as error:
            self._loop.call_soon_threadsafe(self._lose_link, error)

    def _tell_compared(self, channel: FrameChannel, compared: wire.Compared) -> None:
        """The machine hears of a difference first: the destination may end as soon as it is told."""
        if compared.difference:
            self._log(f"the destination's memory differs: {compared.difference}")
            self.post_from_thread(ev.MemoryDiffers(compared.difference))
        channel.send(compared)

    def _hear(self, message: wire.Message) -> None:
        self.post(ev.PeerHeard())
        waiting = self._answers.pop(message.frame_type, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(message)
        if isinstance(message, wire.StateLoaded):
            self._load_ms = message.load_ms
        elif isinstance(message, wire.Committed):
            self._commit_ms = message.commit_ms
            self.post(ev.PeerCommitted())
        elif isinstance(message, wire.Running):
            self._resumed_there.set()
            self.post(ev.PeerRunning(self._load_ms / 1000, self._commit_ms / 1000, message.resume_ms / 1000))
        elif isinstance(message, wire.Paged):
            self._owed_file.remove()  # a successor must not take for owed what has come
            self.post(ev.PeerPaged(message.paging))
        elif isinstance(message, wire.Failed):
            if message.definitive:
                self.post(ev.PeerFailed(message.code, message.message))
            else:
                self.post(ev.LinkLost(message.code, message.message))

    def _lose_link(self, error: TranshumeError) -> None:
        self.post(ev.LinkLost(error.code, error.message))
        for waiting in self._answers.values():
            if not waiting.done():
                waiting.set_exception(error)
                waiting.exception()  # whoever waits hears it; nobody waiting is no mistake
        self._answers.clear()

    def _expect(self, kind: wire.FrameType) -> asyncio.Future[wire.Message]:
        """The next frame of a kind. Ask before the frame that causes it is sent."""
        future: asyncio.Future[wire.Message] = self._loop.create_future()
        self._answers[kind] = future
        return future

    async def _send(self, *messages: wire.Message) -> None:
        channel = self._channel
        assert channel is not None

        def send_all() -> None:
            for message in messages:
                channel.send(message)

        await self._in_data_thread(send_all)

    async def _in_data_thread(self, call: Callable[..., Result], *arguments: object) -> Result:
        self._data_busy = True
        try:
            return await self._loop.run_in_executor(self._data_thread, call, *arguments)
        finally:
            self._data_busy = False


def _addresses_of(prepared: Prepared | None) -> tuple[str, ...]:
    return ("",) if prepared is None else (prepared.address, *prepared.other_addresses)


def _why_no_paging(options: MigrationOptions) -> str:
    return f"mode {options.mode.value}" if options.post_copy else "--no-post-copy"
