"""Writing files so that nothing half-written is ever seen: temporary name, sync, rename."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hartist.errors import UserError


def _sync_directory(path: Path) -> None:
    if os.name == "nt":
        return  # Windows can't open a directory for syncing; its rename is already durable enough
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`; on success sync it and rename it onto `target`.

    Raises UserError if the directory can't be created or written to.
    """
    target = Path(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}; choose a writable place") from error
    os.close(fd)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files private; results are meant to be shared
        os.replace(temporary, target)
        _sync_directory(target.parent)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(target: Path, data: bytes) -> None:
    """Write `data` to `target` atomically."""
    with atomic_path(target) as temporary:
        temporary.write_bytes(data)


def write_text(target: Path, text: str) -> None:
    """Write UTF-8 `text` to `target` atomically."""
    write_bytes(target, text.encode("utf-8"))


def write_json(target: Path, value: Any) -> None:
    """Write `value` as readable JSON to `target` atomically."""
    write_text(target, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yield a temporary directory; on success rename it onto `target`, replacing what was there.

    The old directory is moved aside first and removed last, so that at every moment one complete
    directory exists under `target` or, for the instant between two renames, under its backup name.
    """
    target = Path(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}; choose a writable place") from error
    backup = _backup(target)
    try:
        yield temporary
        temporary.chmod(0o755)
        for path in temporary.rglob("*"):
            if path.is_file():
                with open(path, "rb+") as file:
                    os.fsync(file.fileno())
        if target.exists():
            shutil.rmtree(backup, ignore_errors=True)
            os.replace(target, backup)
        os.replace(temporary, target)
        _sync_directory(target.parent)
        shutil.rmtree(backup, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        recover_directory(target)


def _backup(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def recover_directory(target: Path) -> None:
    """Undo what a crash in the middle of `atomic_directory` left behind.

    Between its two renames the old directory is only there under its backup name, and comes back from
    it; after them the backup is in the way.
    """
    backup = _backup(Path(target))
    if not backup.exists():
        return
    if Path(target).exists():
        shutil.rmtree(backup, ignore_errors=True)
    else:
        os.replace(backup, target)


def clear_temporaries(target: Path) -> None:
    """Remove the temporary directories that killed writers of `target` left beside it."""
    for path in Path(target).parent.glob(f".{Path(target).name}.*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def read_json(path: Path) -> Any:
    """Read a JSON file; raises UserError that names it if it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not readable JSON ({error}); download or write it again") from error
