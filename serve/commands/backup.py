"""``python -m serve backup`` and ``restore``: the whole store, while the service runs, into a folder or bucket."""

import argparse
import os
import sys

from serve.commands.options import actor, add_store_arguments, open_artifacts, open_store, read_config
from serve.store.artifacts import ArtifactStore
from serve.store.backup import back_up, restore


def add_backup_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to."""
    parser.description = (
        "Copies jobs, files, tenants, keys (as digests) and all else that is kept, as it is at one moment, while the "
        "service runs. The copy fits every database and every artifact store."
    )
    parser.add_argument("destination", metavar="DEST", help="an empty folder, or a URL such as s3://bucket/backup")
    add_store_arguments(parser)
    parser.set_defaults(command=_back_up)


def add_restore_arguments(parser: argparse.ArgumentParser) -> None:
    """Where from."""
    parser.description = "Fills an empty store, of any kind, with a backup. No service may be running on that store."
    parser.add_argument("source", metavar="SRC", help="folder or URL that 'backup' wrote to")
    add_store_arguments(parser)
    parser.set_defaults(command=_restore)


def _back_up(options: argparse.Namespace) -> int:
    os.umask(0o077)  # prompts, and what signs webhooks
    store = open_store(options)
    done = back_up(store, open_artifacts(options), ArtifactStore(options.destination))
    store.record(actor(), "backup", None, {"jobs": done.num_jobs, "files": done.num_files})
    store.close()
    print(f"{done.num_jobs} jobs with {done.num_files} files are backed up", file=sys.stderr)
    for job_id in done.incomplete:
        print(f"serve: job {job_id} is left out: files of it are missing", file=sys.stderr)
    return 0


def _restore(options: argparse.Namespace) -> int:
    done = restore(ArtifactStore(options.source), read_config(options).resolved_database_url, open_artifacts(options))
    store = open_store(options)
    store.record(actor(), "restore", None, {"jobs": done.num_jobs, "files": done.num_files})
    store.close()
    print(f"{done.num_jobs} jobs with {done.num_files} files are restored", file=sys.stderr)
    return 0
