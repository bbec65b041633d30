"""The systemd unit that runs a host's daemon: its text, made from where the program and its state are."""

from __future__ import annotations

from pathlib import Path

UNIT_NAME = "transhume.service"
MARK = "# Made by `transhume install-service`; `transhume uninstall-service` takes it away."
"""The unit's first line. A file without it is somebody else's and is not touched."""

_TEMPLATE = """\
{mark}
[Unit]
Description=Transhume, a host of virtual machines
Documentation=man:transhume(1)
Wants=network-online.target
After=network-online.target time-sync.target remote-fs.target
# Before `transhume up` or `transhume join` this server is no host yet.
ConditionPathExists={config}

[Service]
Type=exec
ExecStart={command}
WorkingDirectory=/
# VMs and movers are children of the daemon and outlive it: only the daemon itself is ended.
KillMode=process
TimeoutStopSec=30
Restart=on-failure
RestartSec=2
# When the kernel kills one QEMU for want of memory, the daemon and the others go on.
OOMPolicy=continue
LimitNOFILE=1048576
LimitMEMLOCK=infinity
TasksMax=infinity
# QEMU and the movers inherit what stands here. So there is nothing that gives the daemon a view of its own of
# files or devices: disks and safe copies lie anywhere, and a mover reads and writes the memory of a QEMU.
LockPersonality=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native

[Install]
WantedBy=multi-user.target
"""


def unit_text(python: Path, state_dir: Path) -> str:
    """The whole unit. `python` is an interpreter that finds Transhume, both paths are absolute."""
    words = (str(python), "-m", "transhume.daemon", "--state-dir", str(state_dir))
    return _TEMPLATE.format(
        mark=MARK,
        command=" ".join(_quoted(word) for word in words),
        config=_escaped(str(state_dir / "host.json")),
    )


def _quoted(word: str) -> str:
    """A word of a command line, so that systemd neither splits it nor puts variables into it."""
    text = _escaped(word).replace("$", "$$")
    if any(sign in text for sign in " \t'\"\\;"):
        text = '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return text


def _escaped(text: str) -> str:
    """Percent signs begin systemd's own specifiers."""
    return text.replace("%", "%%")
