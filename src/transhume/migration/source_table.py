"""What may happen to the source of a migration, in which state, and what may follow.

The methods are those of `source.SourceMachine`; what is not in the table may not happen.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from transhume.migration import events as ev
from transhume.migration.machine import Event, Rule, ignored
from transhume.model.migration import Phase


class SourceState(StrEnum):
    """Where the source stands."""

    STARTING = "starting"
    CONNECTING = "connecting"
    ARMING = "arming"
    PRECOPY = "precopy"
    SUSPENDING = "suspending"
    LAST_PAGES = "last-pages"
    STATE = "state"
    AWAITING_COMMIT = "awaiting-commit"
    RESOLVING = "resolving"
    RESUMING = "resuming"
    COMMITTED = "committed"
    PAGING = "paging"
    RECONNECTING = "reconnecting"
    REVIVING = "reviving"
    RETIRING = "retiring"
    DONE = "done"
    ABORTED = "aborted"


PHASES: dict[SourceState, Phase] = {
    SourceState.STARTING: Phase.REQUESTED,
    SourceState.CONNECTING: Phase.PREPARED,
    SourceState.ARMING: Phase.PREPARED,
    SourceState.PRECOPY: Phase.PRECOPY,
    SourceState.SUSPENDING: Phase.SUSPENDED,
    SourceState.LAST_PAGES: Phase.SUSPENDED,
    SourceState.STATE: Phase.SUSPENDED,
    SourceState.AWAITING_COMMIT: Phase.STATE_SENT,
    SourceState.RESOLVING: Phase.STATE_SENT,
    SourceState.RESUMING: Phase.ABORTED,
    SourceState.COMMITTED: Phase.COMMITTED,
    SourceState.PAGING: Phase.PAGING,
    SourceState.RECONNECTING: Phase.PAGING,
    SourceState.REVIVING: Phase.PAGING,
    SourceState.RETIRING: Phase.RUNNING_AT_DESTINATION,
    SourceState.DONE: Phase.DONE,
    SourceState.ABORTED: Phase.ABORTED,
}

S = SourceState
DESTINATION_MAY_COMMIT = frozenset({S.STATE, S.AWAITING_COMMIT, S.RESOLVING})

_TROUBLE: dict[type[Event], Rule[StrEnum]] = {
    ev.LinkLost: Rule("_give_up_link", (S.RESUMING,)),
    ev.PeerFailed: Rule("_give_up_peer", (S.RESUMING,)),
    ev.CommandFailed: Rule("_give_up_command", (S.RESUMING,)),
    ev.CancelRequested: Rule("_give_up_cancel", (S.RESUMING,)),
    ev.QemuDied: Rule("_vm_lost", (S.ABORTED,)),
    ev.PeerHeard: Rule("_heard", ()),
    ev.OptionsChanged: Rule("_options_changed", ()),
}
"""Before the destination may commit: every trouble ends with the VM going on at the source."""

_LATE = ignored(
    ev.Connected,
    ev.Armed,
    ev.PassEnded,
    ev.VmPaused,
    ev.RegisterSilent,
    ev.LastPagesSent,
    ev.StateSent,
    ev.PeerHeard,
)
"""Echoes of work that was given up."""

_UNDECIDED: dict[type[Event], Rule[StrEnum]] = {
    ev.LinkLost: Rule("_resolve_link", (S.RESOLVING,)),
    ev.CommandFailed: Rule("_resolve_command", (S.RESOLVING,)),
    ev.CancelRequested: Rule("_resolve_cancel", (S.RESOLVING,)),
    ev.PeerFailed: Rule("_peer_gave_up_undecided", (S.RESUMING, S.ABORTED)),
    ev.PeerCommitted: Rule("_committed", (S.COMMITTED,)),
    ev.PeerRunning: Rule("_running", (S.PAGING, S.RETIRING)),
    ev.PeerPaged: Rule("_note_paged", ()),
    ev.MemoryDiffers: Rule("_note_difference", ()),
    ev.QemuDied: Rule("_qemu_died_undecided", ()),
    ev.PeerHeard: Rule("_heard", ()),
    ev.OptionsChanged: Rule("_options_changed", ()),
}
"""While the destination may commit: only the register decides."""


_AFTER_COMMIT = ignored(
    ev.CancelRequested,
    ev.QemuDied,
    ev.PeerCommitted,
    ev.SwapWon,
    ev.SwapLost,
    ev.SwapUnknown,
    ev.SwapRefused,
    ev.PeerFailed,
    ev.StateSent,
)
"""Once the destination owns the VM nothing of this brings it back."""

TABLE: Mapping[StrEnum, Mapping[type[Event], Rule[StrEnum]]] = {
    S.STARTING: {
        # Whether this mover is the first or a successor is not known yet: nothing may be decided.
        ev.Started: Rule("_started", (S.CONNECTING, S.RESUMING, S.ABORTED)),
        ev.Recovered: Rule(
            "_recovered", (S.RESUMING, S.RESOLVING, S.RECONNECTING, S.REVIVING, S.RETIRING, S.ABORTED)
        ),
        ev.Tick: Rule("", ()),
        ev.CancelRequested: Rule("_cancel_early", ()),
        ev.CommandFailed: Rule("_resolve_command", (S.RESOLVING,)),
        ev.QemuDied: Rule("_qemu_died_undecided", ()),
    },
    S.CONNECTING: {
        **_TROUBLE,
        ev.SwitchRequested: Rule("_note_switch", ()),
        ev.Connected: Rule("_connected", (S.ARMING,)),
        ev.Tick: Rule("_tick_connecting", (S.RESUMING,)),
    },
    S.ARMING: {
        **_TROUBLE,
        ev.SwitchRequested: Rule("_note_switch", ()),
        ev.Armed: Rule("_armed", (S.PRECOPY, S.SUSPENDING)),
        ev.Tick: Rule("_tick_silence", (S.RESUMING,)),
    },
    S.PRECOPY: {
        **_TROUBLE,
        ev.PassEnded: Rule("_pass_ended", (S.SUSPENDING, S.RESUMING)),
        ev.VmPaused: Rule("_native_paused", (S.LAST_PAGES,)),
        ev.SwitchRequested: Rule("_switch_requested", ()),
        ev.Tick: Rule("_tick_precopy", (S.RESUMING,)),
    },
    S.SUSPENDING: {
        **_TROUBLE,
        ev.VmPaused: Rule("_paused", (S.LAST_PAGES,)),
        ev.RegisterSilent: Rule("_not_now", (S.PRECOPY, S.RESUMING)),
        ev.Tick: Rule("_tick_silence", (S.RESUMING,)),
    },
    S.LAST_PAGES: {
        **_TROUBLE,
        ev.LastPagesSent: Rule("_last_pages_sent", (S.STATE,)),
        ev.Tick: Rule("_tick_silence", (S.RESUMING,)),
    },
    S.STATE: {
        **_UNDECIDED,
        ev.StateSent: Rule("_state_sent", (S.AWAITING_COMMIT,)),
        ev.Tick: Rule("_tick_undecided", (S.RESOLVING,)),
    },
    S.AWAITING_COMMIT: {
        **_UNDECIDED,
        ev.Tick: Rule("_tick_awaiting", (S.RESOLVING,)),
    },
    S.RESOLVING: {
        **_LATE,
        ev.SwapWon: Rule("_abort_won", (S.RESUMING, S.ABORTED)),
        ev.SwapLost: Rule("_abort_lost", (S.RESUMING, S.RECONNECTING, S.RETIRING, S.ABORTED)),
        ev.SwapUnknown: Rule("_swap_unknown", ()),
        ev.SwapRefused: Rule("_swap_unknown", ()),
        ev.PeerFailed: Rule("_peer_gave_up_while_resolving", (S.RESUMING, S.ABORTED)),
        ev.PeerCommitted: Rule("_committed", (S.COMMITTED,)),
        ev.PeerRunning: Rule("_running", (S.PAGING, S.RETIRING)),
        ev.PeerPaged: Rule("_note_paged", ()),
        ev.MemoryDiffers: Rule("_note_difference", ()),
        ev.OptionsChanged: Rule("_options_changed", ()),
        ev.Tick: Rule("_tick_resolving", ()),
        ev.QemuDied: Rule("_qemu_died_undecided", ()),
        **ignored(ev.LinkLost, ev.CommandFailed, ev.CancelRequested),
    },
    S.RESUMING: {
        **_LATE,
        ev.VmResumed: Rule("_resumed", (S.ABORTED,)),
        ev.CommandFailed: Rule("_resume_failed", (S.ABORTED,)),
        ev.QemuDied: Rule("_vm_lost", (S.ABORTED,)),
        ev.Tick: Rule("_tick_resuming", ()),
        **ignored(
            ev.LinkLost,
            ev.PeerFailed,
            ev.CancelRequested,
            ev.SwapWon,
            ev.SwapLost,
            ev.SwapUnknown,
            ev.SwapRefused,
            ev.MigrationKnown,
            ev.ReviveRequested,
            ev.MemoryDiffers,
        ),
    },
    S.COMMITTED: {
        ev.PeerRunning: Rule("_running", (S.PAGING, S.RETIRING)),
        ev.PeerPaged: Rule("_note_paged", ()),
        ev.MemoryDiffers: Rule("_note_difference", ()),
        ev.OptionsChanged: Rule("_options_changed", ()),
        ev.LinkLost: Rule("_retire", (S.RECONNECTING, S.RETIRING)),
        ev.Tick: Rule("_tick_committed", (S.RECONNECTING, S.RETIRING)),
        **_AFTER_COMMIT,
        ev.QemuDied: Rule("_qemu_died_undecided", ()),
        **ignored(ev.PeerHeard, ev.CommandFailed),
    },
    S.PAGING: {
        ev.PeerPaged: Rule("_paged", (S.RETIRING,)),
        ev.MemoryDiffers: Rule("_note_difference", ()),
        ev.LinkLost: Rule("_look_again", (S.RECONNECTING,)),
        ev.CommandFailed: Rule("_look_again", (S.RECONNECTING,)),
        ev.PeerHeard: Rule("_heard", ()),
        ev.PeerRunning: Rule("_late_running", ()),
        ev.OptionsChanged: Rule("_options_changed", ()),
        ev.Tick: Rule("_tick_paging", (S.RECONNECTING,)),
        **_AFTER_COMMIT,
        ev.QemuDied: Rule("_qemu_died_undecided", ()),
        **ignored(ev.MigrationKnown, ev.ReviveRequested),
    },
    S.RECONNECTING: {
        ev.Reconnected: Rule("_reconnected", (S.PAGING, S.RETIRING)),
        ev.CommandFailed: Rule("_reconnect_failed", (S.REVIVING,)),
        ev.MigrationKnown: Rule("_migration_known", (S.RETIRING,)),
        ev.Tick: Rule("_tick_reconnecting", ()),
        ev.PeerPaged: Rule("_paged", (S.RETIRING,)),
        ev.MemoryDiffers: Rule("_note_difference", ()),
        ev.OptionsChanged: Rule("_options_changed", ()),
        ev.ReviveRequested: Rule("_revive", (S.REVIVING,)),
        **_AFTER_COMMIT,
        ev.QemuDied: Rule("_qemu_died_undecided", ()),
        **ignored(ev.LinkLost, ev.PeerHeard, ev.PeerRunning),
    },
    S.REVIVING: {
        ev.SwapWon: Rule("_revive_won", (S.RESUMING, S.ABORTED)),
        ev.SwapLost: Rule("_revive_lost", (S.RESUMING, S.RECONNECTING, S.ABORTED)),
        ev.SwapUnknown: Rule("_swap_unknown", ()),
        ev.SwapRefused: Rule("_swap_unknown", ()),
        ev.Tick: Rule("_tick_reviving", ()),
        ev.QemuDied: Rule("_qemu_died_undecided", ()),
        ev.OptionsChanged: Rule("_options_changed", ()),
        **ignored(
            ev.CancelRequested,
            ev.ReviveRequested,
            ev.CommandFailed,
            ev.LinkLost,
            ev.MigrationKnown,
            ev.PeerHeard,
            ev.PeerRunning,
            ev.PeerCommitted,
            ev.PeerFailed,
            ev.PeerPaged,
            ev.MemoryDiffers,
            ev.StateSent,
        ),
    },
    S.RETIRING: {
        ev.VmRetired: Rule("_retired", (S.DONE,)),
        ev.CommandFailed: Rule("_retire_failed", (S.DONE,)),
        ev.PeerRunning: Rule("_late_running", ()),
        **_AFTER_COMMIT,
        **ignored(
            ev.Tick,
            ev.LinkLost,
            ev.PeerHeard,
            ev.PeerPaged,
            ev.MemoryDiffers,
            ev.Reconnected,
            ev.MigrationKnown,
            ev.ReviveRequested,
        ),
    },
    S.DONE: {},
    S.ABORTED: {},
}
"""For each state the events that may come: who handles each, and which states may follow."""
