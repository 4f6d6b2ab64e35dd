"""The store as files that fit any database and any artifact store: a copy of one moment, made while others write.

The rows are read in one transaction, so they are of one moment. Files never change, but those of a job that
is deleted meanwhile disappear, and a checkpoint does as soon as a newer one is published: such a job is left
out, or begins again at its first step. What is restored is therefore whole: every job has its inputs, every
completed one its results. ``backup.json`` is written last; a copy without it is not one.
"""

import json
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, MetaData, delete, func, insert, inspect, select

from pusa_dist.errors import ConfigError
from serve.store.artifacts import ArtifactStore, job_prefix
from serve.store.database import LONG_ANSWER_S, open_database
from serve.store.expiry import FINAL
from serve.store.jobs import JobStore
from serve.store.migrate import known_revisions, migrate, newest_revision
from serve.store.tables import metadata

_MANIFEST = "backup.json"
_BATCH = 500
Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied:
    """What was backed up or restored."""

    num_jobs: int
    num_files: int
    incomplete: tuple[str, ...] = ()
    """Jobs that exist but are left out, because files of theirs are missing."""


def back_up(store: JobStore, artifacts: ArtifactStore, destination: ArtifactStore) -> Copied:
    """Copy everything, as it is now.

    Args:
        store: in use.
        artifacts: its files.
        destination: empty.

    Raises:
        ConfigError: the destination is not empty.
        StorageError: a file cannot be read or written; what was copied is no backup.
    """
    if not destination.is_empty():
        raise ConfigError("the destination of the backup is not empty; name another folder or prefix")
    with tempfile.TemporaryDirectory(prefix="backup-") as name:
        folder = Path(name)
        _dump(store, folder)
        done = _copy_jobs(store, artifacts, destination, folder / "jobs")
        num_rows = {}
        for table in metadata.sorted_tables:
            num_rows[table.name] = sum(1 for _ in _rows(folder / table.name))
            destination.put_file(_rows_key(table.name), folder / table.name)
    manifest = {"schema": newest_revision(), "rows": num_rows, "files": done.num_files}
    destination.put(_MANIFEST, json.dumps(manifest).encode())
    return done


def restore(source: ArtifactStore, database_url: str, artifacts: ArtifactStore) -> Copied:
    """Fill an empty store with a backup, of this version or an older one; nobody else may use it meanwhile.

    Args:
        source: what ``back_up`` wrote.
        database_url: of an empty database, of whatever kind.
        artifacts: empty.

    Raises:
        ConfigError: the source is no backup, a damaged one or a newer version's, or the target is not empty.
        StorageError: a file cannot be read or written.

    After an error no row is restored, but files may be: the artifact store is to be emptied before it is tried again.
    """
    manifest = _manifest(source)
    engine = open_database(database_url, synchronous="FULL", answer_s=LONG_ANSWER_S)
    try:
        _require_empty(engine, artifacts)
        migrate(engine, manifest["schema"])
        with tempfile.TemporaryDirectory(prefix="restore-") as name:
            folder = Path(name)
            for table in manifest["rows"]:
                (folder / table).write_bytes(source.read(_rows_key(table)))
            # Before any file, whose they are: no sweeper may take them for leftovers of another database.
            for row in _rows(folder / "identity") if "identity" in manifest["rows"] else ():
                artifacts.own(row["id"])
            num_files = sum(_restore_files(row, source, artifacts) for row in _rows(folder / "jobs"))
            # Files first, as everywhere: a job that can be seen has what it needs.
            with engine.begin() as connection:
                _load(connection, folder, manifest["rows"])
        migrate(engine)
    finally:
        engine.dispose()
    return Copied(num_jobs=manifest["rows"]["jobs"], num_files=num_files)


def _dump(store: JobStore, folder: Path) -> None:
    """All rows of one moment, a file a table, a line a row."""
    with store.snapshot() as connection:
        for table in metadata.sorted_tables:
            with (folder / table.name).open("w") as file:
                for row in connection.execute(select(table).order_by(*table.primary_key)).mappings():
                    file.write(json.dumps(dict(row)) + "\n")


def _copy_jobs(store: JobStore, artifacts: ArtifactStore, destination: ArtifactStore, path: Path) -> Copied:
    """Copy the files of the jobs in ``path``, which is left with those whose files are all there."""
    kept, incomplete, num_files = path.with_suffix(".kept"), [], 0
    num_jobs = 0
    with kept.open("w") as file:
        for row in _rows(path):
            whole = _without_what_is_gone(row, artifacts, destination)
            try:
                for key in _lasting_keys(row):
                    destination.put(key, artifacts.read(key))
            except FileNotFoundError:
                destination.delete(job_prefix(row["id"]))
                if store.known([row["id"]]):
                    incomplete.append(row["id"])
                continue
            num_jobs, num_files = num_jobs + 1, num_files + len(_lasting_keys(whole)) + len(_passing_keys(whole))
            file.write(json.dumps(whole) + "\n")
    kept.replace(path)
    return Copied(num_jobs=num_jobs, num_files=num_files, incomplete=tuple(incomplete))


def _without_what_is_gone(row: Row, artifacts: ArtifactStore, destination: ArtifactStore) -> Row:
    """Copy checkpoint and preview; the row without those that a newer one has replaced."""
    row = dict(row)
    if row["status"] in FINAL:
        row["checkpoint_key"] = None
    for name in ("checkpoint", "preview"):
        key = row[f"{name}_key"]
        if key is None:
            continue
        try:
            destination.put(key, artifacts.read(key))
        except FileNotFoundError:
            row |= {f"{name}_key": None, f"{name}_step": None}
            if name == "checkpoint":
                row["step"] = 0
    return row


def _lasting_keys(row: Mapping[str, Any]) -> list[str]:
    """Without these files a job is not whole."""
    return [one["key"] for one in (*row["inputs"], *row["results"].values())]


def _passing_keys(row: Mapping[str, Any]) -> list[str]:
    """These are replaced while it runs; an older version's rows have none."""
    return [key for key in (row.get("checkpoint_key"), row.get("preview_key")) if key is not None]


def _restore_files(row: Row, source: ArtifactStore, artifacts: ArtifactStore) -> int:
    keys = _lasting_keys(row) + _passing_keys(row)
    for key in keys:
        try:
            data = source.read(key)
        except FileNotFoundError as error:
            raise ConfigError(f"the backup is damaged: a file of job {row['id']} is missing; use another") from error
        artifacts.put(key, data)
    return len(keys)


def _load(connection: Connection, folder: Path, num_rows: Mapping[str, int]) -> None:
    """Insert the rows into tables of the schema that they were written from."""
    schema = MetaData()
    schema.reflect(connection, only=list(num_rows))
    for name, wanted in num_rows.items():
        table = schema.tables[name]
        connection.execute(delete(table))  # the new database's identity
        rows = _rows(folder / name)
        while batch := list(islice(rows, _BATCH)):
            if name == "audit":  # the database counts on from what it has numbered itself
                batch = [{column: value for column, value in row.items() if column != "id"} for row in batch]
            connection.execute(insert(table), batch)
        found = connection.execute(select(func.count()).select_from(table)).scalar_one()
        if found != wanted:
            raise ConfigError(f"the backup is damaged: {found} rows of {name}, and {wanted} were written; use another")


def _require_empty(engine: Engine, artifacts: ArtifactStore) -> None:
    remedy = "restore into an empty one, such as --state with a new folder"
    if not artifacts.is_empty():
        raise ConfigError(f"the artifact store to restore into is not empty; {remedy}")
    with engine.connect() as connection:
        existing: Collection[str] = inspect(connection).get_table_names()
        for table in metadata.sorted_tables:
            if table.name == "identity" or table.name not in existing:
                continue
            if connection.execute(select(func.count()).select_from(table)).scalar_one():
                raise ConfigError(f"the database to restore into is not empty, it has {table.name}; {remedy}")


def _manifest(source: ArtifactStore) -> Any:
    try:
        manifest = json.loads(source.read(_MANIFEST))
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError("there is no complete backup: name what 'backup' wrote, to its end") from error
    if manifest["schema"] not in known_revisions():
        raise ConfigError(
            f"the backup has schema {manifest['schema']}, which is newer than this version of the service knows "
            f"({newest_revision()}); restore it with the newer version"
        )
    return manifest


def _rows_key(table: str) -> str:
    return f"tables/{table}.jsonl"


def _rows(path: Path) -> Iterator[Row]:
    with path.open() as file:
        for line in file:
            yield json.loads(line)
