"""Where a host keeps what proves who it is: two files in its state folder.

    identity.pem    its key, which was made here and never leaves, and its certificate; for root alone
    authority.pem   the certificate of the farm's authority

The key and the certificate share a file, so that a renewal replaces both in one step.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from transhume.trust.token import is_certificate_of


@dataclass(frozen=True)
class IdentityFiles:
    """The two files below one state folder."""

    state_dir: Path

    @property
    def identity(self) -> Path:
        return self.state_dir / "identity.pem"

    @property
    def authority(self) -> Path:
        return self.state_dir / "authority.pem"

    def write(self, key_pem: str, certificate_pem: str, authority_pem: str) -> None:
        """Replace both, each whole or not at all. Raises `OSError`; what was there still holds then."""
        _replace(self.authority, authority_pem, 0o644)
        _replace(self.identity, key_pem + certificate_pem, 0o600)

    def is_of(self, fingerprint: bytes) -> bool:
        """Whether they are of the farm whose authority has this fingerprint."""
        try:
            return is_certificate_of(self.authority.read_text(), fingerprint)
        except OSError:
            return False

    def remove(self) -> None:
        for path in (self.identity, self.authority):
            path.unlink(missing_ok=True)


def _replace(path: Path, text: str, mode: int) -> None:
    draft = path.with_name(path.name + ".new")
    draft.unlink(missing_ok=True)
    try:
        # The mode must be right from the first byte on.
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(fd, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.rename(path)
    finally:
        draft.unlink(missing_ok=True)
