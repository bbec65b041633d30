"""A file that is there whole and durably, or not at all."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from transhume.model.errors import Conflict, Refused


@contextlib.contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """A file beside `target`, for root alone, that becomes `target` when the block ends well, durably."""
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        yield partial
        _sync(partial)
        _put_in_place(partial, target)
        _sync(target.parent)
    except FileExistsError as error:
        raise Conflict(f"{target} exists already; name another file, or remove it first") from error
    except OSError as error:
        raise Refused(f"{target} cannot be written: {error.strerror}; choose another place") from error
    finally:
        partial.unlink(missing_ok=True)


def _put_in_place(partial: Path, target: Path) -> None:
    """Give the file its name. A file that has appeared there meanwhile is not written over."""
    try:
        os.link(partial, target)
    except FileExistsError:
        raise
    except OSError:
        # A file system without hard links, such as a USB stick's.
        if target.exists():
            raise FileExistsError from None
        partial.rename(target)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
