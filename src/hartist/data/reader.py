"""One reader over Hugging Face `datasets`: captioned folders, WebDataset tars, parquet files, datasets on the Hub

Rows come undecoded; `stream.py` decodes them, so that a broken image is skipped rather than fatal.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

from hartist.data.locate import LocalFiles, find_files, is_local
from hartist.data.records import Broken, Columns, Record, guess_columns
from hartist.errors import UserError

ENDS_EARLY = "it has no end mark, so it was cut off"
FIRST_MEMBERS = 16
"""How much of a tar has to be readable for its columns to be told from it."""


@dataclass(frozen=True)
class Source:
    """A dataset's split, ready to be read: either by row number (`rows`), or shard by shard (`stream`)."""

    name: str
    columns: Columns
    rows: Any
    """A list of rows or a `datasets.Dataset`; None where rows can't be had by their numbers."""
    stream: Any
    """A `datasets.IterableDataset`, where there are no `rows`."""
    shards: tuple[str, ...]
    """The names of the shards of `stream`."""
    stamps: tuple[str, ...]
    """What tells versions of the data files apart: times and sizes, or the Hub's revision."""
    root: Path | None = None
    """What names are relative to, for local files."""
    left_out: tuple[Broken, ...] = ()
    """Shards that could not be opened."""

    def record(self, row: int) -> Record | Broken:
        """One row by its number, for sources with `rows`."""
        assert self.rows is not None
        return self.columns.read(self.rows[row], f"row {row}", self.root)

    def shard(self, number: int) -> Iterator[Record | Broken]:
        """The rows of one shard, for sources without `rows`. Damage ends it early, with a Broken that names it.

        Raises UserError where the data can't be reached any more.
        """
        name = self.shards[number]
        # iter() rather than plain iteration, which would split the rows among PyTorch's workers itself
        batches = iter(self.stream.shard(num_shards=len(self.shards), index=number).iter(batch_size=1))
        for i in itertools.count():
            try:
                batch = next(batches, None)
            except Exception as error:  # tar, compression and parquet libraries each have their own
                if self.root is None and not isinstance(error, tarfile.TarError | EOFError | ValueError):
                    raise UserError(  # the network, rather than the file
                        f"{name} cannot be read on ({_reason(error)}); to resume, run the same command again"
                    ) from error
                yield Broken(name, f"{_reason(error)}; the rest of it is lost", "shard")
                return
            if batch is None:
                if self.root is not None and _ends_early(self.root / name):
                    yield Broken(name, f"{ENDS_EARLY}; the rest of it is lost", "shard")
                return
            row = {column: values[0] for column, values in batch.items()}
            yield self.columns.read(row, f"{name} row {i}", self.root)

    def records(self) -> Iterator[Record | Broken]:
        """Everything there is, in order."""
        yield from self.left_out
        if self.rows is not None:
            yield from map(self.record, range(len(self.rows)))
        else:
            yield from itertools.chain.from_iterable(map(self.shard, range(len(self.shards))))

    @cached_property
    def fingerprint(self) -> str:
        """Changes when a file changes its name, size or time, or the Hub its revision; and with the columns."""
        digest = hashlib.sha256(repr((self.columns, self.shards, self.stamps)).encode())
        if isinstance(self.rows, list):  # a local folder: its images are files of their own
            for i in range(len(self.rows)):
                record = self.record(i)
                if isinstance(record, Record) and isinstance(record.image, str):
                    digest.update(f"{record.name} {_stamp(Path(record.image))}".encode())
        return digest.hexdigest()[:16]


def open_dataset(
    source: str | Path,
    split: str = "train",
    *,
    image_column: str | None = None,
    caption_columns: Sequence[str] | None = None,
    label_column: str | None = None,
    streaming: bool = False,
) -> Source:
    """One split of a folder with metadata.jsonl, of .tar or .parquet files, or of a dataset on the Hub.

    Captioned folders are always read by row number. Of the others, `streaming` reads shard by shard what is
    there; without it, `datasets` first copies everything into its cache to give access by row number.
    With a `label_column`, of class numbers, captions may be missing.
    Raises UserError if there is nothing to read, or if columns can't be told or are not there.
    """
    name = str(source)
    wanted = (image_column, caption_columns, label_column)
    with _quiet():
        if not is_local(name):
            return _open_hub(name, split, wanted, streaming)
        files = find_files(name, split)
        if files.kind == "imagefolder":
            return _open_folder(name, files, wanted)
        return _open_shards(name, files, wanted, streaming)


Wanted = tuple[str | None, Sequence[str] | None, str | None]
"""The columns asked for: of images, captions and class numbers."""


def _open_folder(name: str, files: LocalFiles, wanted: Wanted) -> Source:
    rows: list[Mapping[str, Any]] = []
    features: dict[str, Any] = {}
    for path in files.files:
        with open(path, "rb") as file:
            if not any(line.strip() for line in file):
                raise UserError(f"{path} is empty; write one JSON line per image with file_name and text")
        # One at a time: the library keeps them in a set, that is, in another order every time.
        with _explained(str(path)):
            data = _builder("imagefolder", [path]).as_streaming_dataset("train")
            features |= data.features
            rows += list(_undecoded(data))
    columns = _columns(name, features, wanted)
    root = files.root
    return Source(name, columns, rows, None, (), tuple(_stamp(path) for path in files.files), root)


def _open_shards(name: str, files: LocalFiles, wanted: Wanted, streaming: bool) -> Source:
    paths, left_out = list(files.files), []
    while paths and (reason := _unreadable(paths[0])):  # the first one tells the columns of all
        left_out.append(Broken(_relative_to(paths.pop(0), files.root), reason, "shard"))
    if not paths:
        raise UserError(f"{name}: no shard can be read; {left_out[0].name}: {left_out[0].reason}")
    with _explained(name):
        builder = _builder(files.kind, paths)
        if streaming:
            data = builder.as_streaming_dataset("train")
        else:
            if cut := next(filter(_ends_early, paths), None):
                raise UserError(f"{cut} is damaged ({ENDS_EARLY}); replace or remove it, or stream it")
            try:
                builder.download_and_prepare()
            except Exception as error:
                damaged = next((path for path in paths if _unreadable(path, whole=True)), None)
                if damaged is None:
                    raise
                raise UserError(
                    f"{damaged} is damaged ({_unreadable(damaged, whole=True)}); replace or remove it, or stream it"
                ) from error
            data = builder.as_dataset("train")
    names = tuple(_relative_to(path, files.root) for path in paths)
    stamps = tuple(_stamp(path) for path in files.files)
    opened = _source(name, data, names, stamps, wanted)
    return replace(opened, root=files.root, left_out=tuple(left_out))


def _open_hub(name: str, split: str, wanted: Wanted, streaming: bool) -> Source:
    with _explained(f"{name} is no local path, and as a dataset on the Hugging Face Hub it"):
        builder = _datasets().load_dataset_builder(name)
        if streaming:
            data = builder.as_streaming_dataset(split)
        else:
            builder.download_and_prepare()
            data = builder.as_dataset(split)
    files = (getattr(builder.config, "data_files", None) or {}).get(split, [])
    stamps = (str(builder.hash), *map(str, getattr(files, "origin_metadata", [])))
    return _source(name, data, tuple(map(str, files)), stamps, wanted)


def _source(name: str, data: Any, shards: tuple[str, ...], stamps: tuple[str, ...], wanted: Wanted) -> Source:
    """A source over a `datasets.Dataset` or `IterableDataset`, with the columns that are needed alone."""
    features = data.features or next(iter(data), None)
    if features is None:
        raise UserError(f"{name} is empty")
    columns = _columns(name, features, wanted)
    kept = {column if column in features else column.partition(".")[0] for column in columns.needed}
    data = _undecoded(data).select_columns([column for column in features if column in kept])
    if not isinstance(data, _datasets().IterableDataset):
        return Source(name, columns, data, None, shards, stamps)
    if len(shards) != data.num_shards:
        shards = tuple(f"shard {i}" for i in range(data.num_shards))
    return Source(name, columns, None, data, shards, stamps)


def _columns(name: str, features: Mapping[str, Any], wanted: Wanted) -> Columns:
    library = _datasets()
    images = [column for column, kind in features.items() if isinstance(kind, library.Image)]
    columns = guess_columns(name, features, images, *wanted)
    plain = [
        column
        for column, kind in features.items()
        if isinstance(kind, library.Value) and column not in columns.needed and not column.startswith("__")
    ]
    return replace(columns, extra=tuple(plain))


def _undecoded(data: Any) -> Any:
    """`data` with its images as bytes or paths."""
    library = _datasets()
    for column, kind in (data.features or {}).items():
        if isinstance(kind, library.Image):
            data = data.cast_column(column, library.Image(decode=False))
    return data


def _builder(kind: str, files: Sequence[Path]) -> Any:
    return _datasets().load_dataset_builder(kind, data_files={"train": [str(path.resolve()) for path in files]})


def _unreadable(path: Path, whole: bool = False) -> str | None:
    """Why a shard's beginning, or the `whole` of it, can't be read; None if it can."""
    try:
        if path.suffix.lower() == ".parquet":
            parquet = import_module("pyarrow.parquet")
            if whole:
                parquet.read_table(path)
            return None if parquet.read_schema(path).names else "no columns in it"
        with tarfile.open(path, "r|*") as tar:
            count = 0
            for member in itertools.islice(tar, None if whole else FIRST_MEMBERS):
                content = tar.extractfile(member)
                count += content is not None and len(content.read()) >= 0
            return None if count else "no files in it"
    except Exception as error:  # tar, compression and parquet libraries each have exceptions of their own
        return _reason(error)


def _ends_early(path: Path) -> bool:
    """Whether a tar lacks its end mark, two blocks of zeros: cut off between its files, it reads as whole."""
    if path.suffix.lower() != ".tar":
        return False
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 2 * tarfile.BLOCKSIZE))
        return any(file.read())


def _stamp(path: Path) -> str:
    try:
        status = path.stat()
    except OSError:
        return "missing"
    return f"{path.name} {status.st_size} {status.st_mtime_ns}"


def _relative_to(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _reason(error: BaseException) -> str:
    """An exception in a few words."""
    return (str(error).strip().split("\n")[0] or type(error).__name__).rstrip(".")[:200]


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn whatever a library raises while opening `what` into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # What the library says when it copies into its cache is in the cause of its exception.
        cause = error.__cause__ if type(error).__name__ == "DatasetGenerationError" else None
        raise UserError(f"{what} cannot be read: {_reason(cause or error)}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's own progress bars."""
    library = _datasets()
    shown = not library.utils.are_progress_bars_disabled()
    library.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            library.enable_progress_bars()


def _datasets() -> Any:
    try:
        return import_module("datasets")
    except ImportError as error:
        raise UserError("reading datasets needs a further package; run: pip install datasets") from error
