"""Files that are whole or not there at all, and a folder that one process at a time writes to."""

import hashlib
import io
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout


def write(path: Path, content: bytes) -> None:
    """Write a file as a whole or not at all, through to the disk; its folder is made where it is missing.

    Raises OSError, in a line that names the file, when that fails; what stood there before is then untouched.
    """
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written ({error.strerror or error}); what stood there stays") from error


def pack(tensors: Any) -> bytes:
    """Return as bytes what torch.save would write: a file of its own fails with no word of a full disk."""
    content = io.BytesIO()
    torch.save(tensors, content)
    return content.getvalue()


def unpack(content: bytes) -> Any:
    """Return on the CPU what ``pack`` was given. Raises whatever broken or foreign bytes lead torch to.

    Every file inside has its checksum, but torch does not look at it: a flipped bit would be another weight.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f"{damaged} in it is damaged")
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def first_line(error: Exception) -> str:
    """Return what an error says in one line; its kind, when it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raise ValueError, in a line that names the file, for whatever its bytes lead to: broken ones lead anywhere."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        told = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"{path} cannot be used ({told}): delete it, or take another folder") from error


def checksum(content: bytes) -> str:
    """Return the SHA-256 of bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


@contextmanager
def sole_use(folder: Path) -> Iterator[None]:
    """Have a folder to oneself meanwhile; it is made where it is missing.

    The lock ends with the process, however that ends; a thread that has the folder may ask again. Where the file system
    has no locks, nothing keeps two processes apart. Raises BlockingIOError when the folder is another's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.resolve() / ".lock", timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        raise BlockingIOError(
            f"{folder} is in use: another process is training there; wait for it or use another folder"
        ) from None
    except (OSError, NotImplementedError):  # some network drives have no locks
        yield
        return
    try:
        yield
    finally:
        if lock.lock_counter == 1:
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
