"""KVM: is it there, would VMs get it, and do guests really run with it?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transhume.host.doctor.kvm_trial import Trial, run_guest
from transhume.model.errors import Refused
from transhume.model.finding import Finding, error, note, ok
from transhume.model.vm import Accel
from transhume.vmm.capabilities import KVM_DEVICE, kvm_obstacle


@dataclass(frozen=True)
class KvmFacts:
    """`obstacle` is why the daemon would not use KVM, in a sentence; `trial` is None when no guest was
    run."""

    device: bool
    obstacle: str
    trial: Trial | None = None


async def gather(vm_user: str, *, try_anyway: bool, device: Path = KVM_DEVICE) -> KvmFacts:
    """Run the guest where VMs would get KVM; with `try_anyway` also where they would not."""
    try:
        obstacle = kvm_obstacle(vm_user, device=device)
    except Refused as refusal:
        return KvmFacts(device.exists(), refusal.message)
    wanted = not obstacle or (try_anyway and device.exists())
    # Where KVM is not for the user of the VMs anyway, root tells the most about KVM itself.
    user = "root" if obstacle else vm_user
    return KvmFacts(device.exists(), obstacle, await run_guest(Accel.KVM, user) if wanted else None)


def judge(facts: KvmFacts) -> list[Finding]:
    if not facts.obstacle:
        return [_used(facts.trial)]
    words = facts.obstacle
    if facts.trial is not None:
        words += f". A guest was tried all the same: {outcome(facts.trial)}"
    mend = "TCG is many times slower; "
    if not facts.device:
        mend += "switch virtualization on in the firmware (or nested virtualization where this is a guest)"
    else:
        mend += "where this is a guest itself, let its own host offer nested virtualization"
    return [note("kvm", words, mend)]


def outcome(trial: Trial) -> str:
    """How a trial went, in words."""
    if trial.ran:
        return f"it ran to its end in {trial.duration_s:.1f} s"
    far = {"": "before its first instruction", "R": "in real mode"}.get(trial.letters, "in 64-bit mode")
    words = f"it hung {far} for {trial.duration_s:.0f} s" if trial.hung else f"QEMU ended {far}"
    return f"{words}; QEMU said: {trial.said}" if trial.said else words


def _used(trial: Trial | None) -> Finding:
    if trial is None or trial.ran:
        return ok("kvm", "KVM runs guests" if trial else "KVM is there; no guest was tried")
    return error(
        "kvm",
        f"KVM is there and VMs would get it, but guests do not run with it: {outcome(trial)}",
        "mend the virtualization (nested, where this is a guest itself), or take KVM away with "
        "`modprobe -r kvm_intel kvm_amd`: then VMs run under TCG",
    )
