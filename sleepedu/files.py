"""Files that are whole or not there at all, and a folder that one process at a time writes to."""

import hashlib
import io
import os
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

try:
    import fcntl
except ImportError:  # Windows has other locks; nothing keeps two processes apart there
    fcntl = None  # type: ignore[assignment]

_mine = threading.local()  # the folders that this thread has to itself


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
    with suppress(OSError, AttributeError):  # not every system can do this with a folder
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


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


def checksum(content: bytes) -> str:
    """Return the SHA-256 of bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


@contextmanager
def sole_use(folder: Path) -> Iterator[None]:
    """Have a folder to oneself meanwhile; it is made where it is missing.

    The lock is the operating system's and on the folder itself, so it leaves no file behind and ends with the process,
    however that ends. A thread that has the folder may ask again. Raises BlockingIOError when it is another's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place = folder.resolve()
    mine = vars(_mine).setdefault("folders", set())
    if fcntl is None or place in mine:
        yield
        return
    descriptor = os.open(place, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(
                f"{folder} is in use: another process is training there; wait for it or use another folder"
            ) from None
        except OSError:
            pass  # some network drives have no locks
        mine.add(place)
        yield
    finally:
        mine.discard(place)
        os.close(descriptor)
