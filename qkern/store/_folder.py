# SPDX-License-Identifier: Apache-2.0
"""A folder that appears whole or not at all.

It is written beside its target under a hidden name, its bytes are brought to the disk, and then the
two change places in one step. Whatever interrupts that, the target is the old folder or the new
one. What an interruption leaves beside it is removed by the next one that writes the same target.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_PIECE = 64 << 20  # bytes of one call: enough for the disk, and Ctrl-C is heard between calls


class NewFile:
    """A file of a NewFolder, not buffered: an error shows where it happens."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def write(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        while len(view):
            view = view[os.write(self._fd, view[:_PIECE]) :]

    def write_at(self, offset: int, data: bytes) -> None:
        os.lseek(self._fd, offset, os.SEEK_SET)
        self.write(data)

    def close(self) -> None:
        """The bytes are on the disk afterwards."""
        try:
            os.fsync(self._fd)
        finally:
            self.abandon()

    def abandon(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class NewFolder:
    """`with NewFolder(target) as folder:` writes files; leaving the block puts it in place.

    `ours(name)` says of the names at the top of an old target which files the new folder replaces;
    all others (a tokenizer, a README) move along.
    """

    def __init__(self, target: Path, ours: Callable[[str], bool]) -> None:
        self.target, self._ours = Path(os.path.realpath(target)), ours
        self._files: list[NewFile] = []

    def __enter__(self) -> NewFolder:
        if self.target.exists() and not self.target.is_dir():
            raise NotADirectoryError(f"{self.target} is a file; name a folder to save into.")
        self.target.parent.mkdir(parents=True, exist_ok=True)
        clean_up(self.target)
        self.path, self._lock = _new_locked(self.target)
        return self

    def create(self, name: str) -> NewFile:
        file = NewFile(self.path / name)
        self._files.append(file)
        return file

    def write(self, name: str, data: bytes) -> None:
        file = self.create(name)
        file.write(data)
        file.close()

    def rename(self, old: str, new: str) -> None:
        os.rename(self.path / old, self.path / new)

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            if kind is None:
                self._put_in_place()
        finally:
            self._give_up()

    def _put_in_place(self) -> None:
        old = self.target.is_dir()
        if old:
            self._take_along()
        _sync_folder(self.path)
        if old:
            self.path = _exchange(self.path, self.target)  # where the old one is now
        else:
            os.rename(self.path, self.target)
        _sync_folder(self.target.parent)

    def _take_along(self) -> None:
        for item in os.scandir(self.target):
            new = self.path / item.name
            if self._ours(item.name) or new.exists():
                continue
            if item.is_dir(follow_symlinks=False):
                shutil.copytree(item.path, new, symlinks=True, copy_function=_link_or_copy)
            else:
                _link_or_copy(item.path, new)

    def _give_up(self) -> None:
        """Removes what is at the hidden place: the new folder, or the old one it replaced."""
        for file in self._files:
            file.abandon()
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _beside(target: Path, word: str) -> str:
    return f".{target.name}.qkern-{word}-"


def set_aside(target: Path) -> list[Path]:
    """Old folders that an interrupted exchange in two steps left under another name."""
    return sorted(target.parent.glob(f"{_glob_escape(_beside(target, 'old'))}*"))


def clean_up(target: Path) -> None:
    """What interrupted writers of this target left goes; a folder that a live one holds stays."""
    for path in set_aside(target):
        if not target.exists():
            os.rename(path, target)
    left = target.parent.glob(f"{_glob_escape(_beside(target, 'new'))}*")
    for path in [*left, *set_aside(target)]:
        fd = _lock(path)
        if fd is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(fd)


def _new_locked(target: Path) -> tuple[Path, int | None]:
    """A new folder that this process holds, so that no other takes it for a left-over."""
    while True:
        path = target.parent / f"{_beside(target, 'new')}{secrets.token_hex(6)}"
        os.mkdir(path)
        try:
            fd = _lock(path)
        except BaseException:
            os.rmdir(path)
            raise
        if path.is_dir():
            return path, fd
        if fd is not None:  # another writer was between the two lines and removed it
            os.close(fd)


def _lock(path: Path) -> int | None:
    """Holds the folder until the descriptor is closed or the process ends, however it ends. None
    where it is gone or held already, or where the file system has no locks."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return None
    return fd


def _glob_escape(text: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in text)


def _link_or_copy(old: Any, new: Any) -> None:
    try:
        os.link(old, new, follow_symlinks=False)
    except OSError:
        shutil.copy2(old, new, follow_symlinks=False)


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _exchange(new: Path, old: Path) -> Path:
    """Puts the new folder in the place of the old one, in one step, or in two where the file
    system cannot; where the old one is now."""
    if _renameat2(new, old):
        return new
    aside = new.with_name(_beside(old, "old") + secrets.token_hex(6))
    os.rename(old, aside)
    try:
        os.rename(new, old)
    except BaseException:
        os.rename(aside, old)
        raise
    return aside


def _renameat2(new: Path, old: Path) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    function = getattr(libc, "renameat2", None)
    if function is None:
        return False
    names = (os.fsencode(new), os.fsencode(old))
    if function(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(old))
