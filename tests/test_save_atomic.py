# SPDX-License-Identifier: Apache-2.0
"""A save that fails or is killed, at whatever step, leaves the old folder whole."""

from __future__ import annotations

import errno
import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="models are torch modules")

import qkern  # noqa: E402
from qkern.store import _folder  # noqa: E402

# Every call by which a save changes the disk. A step is one such call.
CALLS = ("mkdir", "open", "write", "fsync", "rename", "link")


SHARD = 200  # bytes: two files


@functools.cache
def model(value: float) -> torch.nn.Module:
    layer = torch.nn.Linear(16, 16)
    torch.nn.init.constant_(layer.weight, value)
    found = torch.nn.Sequential(layer, torch.nn.LayerNorm(16))
    qkern.quantize_(found, "int8", progress=False)
    return found


def value_in(folder: Path) -> float:
    loaded = qkern.load(
        lambda: torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.LayerNorm(16)), folder
    )
    values = loaded[0].weight.dequantize().unique()
    assert len(values) == 1
    return float(values)


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, where there is one: hundreds of saves wait for the disk otherwise."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Path(name)


class Steps:
    """Counts the steps and does something at one of them."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int, action: Callable[[], Any]) -> None:
        self.done, self.at, self.action = 0, at, action
        for name in CALLS:
            patch.setattr(os, name, self.counted(getattr(os, name)))
        patch.setattr(_folder, "_renameat2", self.counted(_folder._renameat2))

    def counted(self, call: Callable) -> Callable:
        def counted(*args: Any, **options: Any) -> Any:
            self.done += 1
            if self.done == self.at:
                self.action()
            return call(*args, **options)

        return counted


def full_disk() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("action", "old", "exchange"),
    [
        (full_disk, True, True),
        (full_disk, True, False),
        (full_disk, False, True),
        (interrupt, True, True),
    ],
)
def test_a_failure_at_any_step(
    parent: Path, action: Callable[[], Any], old: bool, exchange: bool
) -> None:
    folder = parent / "m"
    failed = 0
    for at in range(1, 200):
        if old:
            qkern.save(model(1), folder, max_shard_bytes=SHARD)
            (folder / "tokenizer.json").write_text("kept")
        with pytest.MonkeyPatch.context() as patch:
            if not exchange:
                patch.setattr(_folder, "_renameat2", lambda *_: False)
            steps = Steps(patch, at, action)
            try:
                qkern.save(model(2), folder, max_shard_bytes=SHARD)
            except (OSError, KeyboardInterrupt):
                failed += 1
        # The last step may fail after the exchange: then the new folder is there, and whole.
        if folder.exists():
            assert value_in(folder) in ((1, 2) if old else (2,))
            assert not old or (folder / "tokenizer.json").read_text() == "kept"
        else:
            assert not old
        # Nothing is left beside it, unless it was the cleaning that failed; the next save cleans.
        left = [p.name for p in parent.iterdir() if p != folder]
        assert not left or (value_in(folder) == 2 and left[0].startswith(".m.qkern-"))
        if steps.done < at:
            break
        if not old and folder.exists():
            _folder.shutil.rmtree(folder)
    assert value_in(folder) == 2 and os.listdir(parent) == ["m"]
    assert failed > 12


KILLED = """
import os, signal, sys
from pathlib import Path
import pytest, torch, qkern
from test_save_atomic import SHARD, Steps, model, value_in
torch.set_num_threads(1)
parent = Path(sys.argv[1])
folder = parent / "m"
old, new = model(1), model(2)
qkern.save(old, folder, max_shard_bytes=SHARD)
at, killed, kept = 0, 0, 0
while True:
    at += 1
    child = os.fork()
    if child == 0:
        with pytest.MonkeyPatch.context() as patch:
            Steps(patch, at, lambda: os.kill(os.getpid(), signal.SIGKILL))
            qkern.save(new, folder, max_shard_bytes=SHARD)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    value = value_in(folder)
    debris = [p for p in parent.iterdir() if p != folder]
    assert all(p.name.startswith(".m.qkern-new-") for p in debris), debris
    assert len(debris) <= 1, debris  # the next save removes what the last one left
    if not os.WIFSIGNALED(status):
        break
    killed += 1
    kept += value == 1
    if value == 2:
        qkern.save(old, folder, max_shard_bytes=SHARD)
assert value_in(folder) == 2 and [p.name for p in parent.iterdir()] == ["m"]
print(killed, kept)
"""


def test_kill_9_at_any_step(parent: Path) -> None:
    """A real SIGKILL in a forked process before each step that changes the disk."""
    code = [sys.executable, "-c", KILLED, str(parent)]
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        code, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    killed, kept = map(int, done.stdout.split())
    assert killed > 12 and killed - kept <= 3  # the new one stays only after the exchange


def test_an_interrupted_exchange_in_two_steps_is_named_and_mended(tmp_path: Path) -> None:
    """Where the file system cannot swap folders, a kill between its two renames leaves the old
    folder under another name."""
    folder = tmp_path / "m"
    qkern.save(model(1), folder)
    folder.rename(tmp_path / ".m.qkern-old-abc")
    with pytest.raises(FileNotFoundError, match=r"left the old one as .*qkern-old-abc"):
        value_in(folder)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="No space"):
        Steps(patch, 5, full_disk)
        qkern.save(model(2), folder)
    assert value_in(folder) == 1


def test_a_folder_that_another_process_writes_is_left_alone(tmp_path: Path) -> None:
    with _folder.NewFolder(tmp_path / "m", lambda name: True) as first:
        first.write("a", b"1")
        qkern.save(model(2), tmp_path / "m")
        assert (first.path / "a").read_bytes() == b"1"
    assert os.listdir(tmp_path / "m") == ["a"]  # the last one to finish


def test_what_else_a_folder_holds(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    qkern.save(model(1), folder, max_shard_bytes=SHARD)
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").write_text("b")
    link = tmp_path / "link"
    link.symlink_to(folder)
    qkern.save(model(2), link)
    assert link.is_symlink() and value_in(folder) == 2
    assert (folder / "notes" / "a.txt").read_text() == "b"
    assert sorted(os.listdir(folder)) == ["model.safetensors", "notes", "qkern.json"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="is a file; name a folder"):
        qkern.save(model(1), tmp_path / "file")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "pytorch_model.bin").write_text("x")
    with pytest.raises(FileExistsError, match=r"did not write \(pytorch_model\.bin\)"):
        qkern.save(model(1), tmp_path / "theirs")
