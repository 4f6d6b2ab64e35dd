"""The command line: what an operator sees and what it leaves in the store."""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from serve.__main__ import main
from serve.policy.quota import Quota
from serve.store.artifacts import ArtifactStore, StorageError
from serve.store.jobs import JobStore
from tests.serve.store_support import claimed, created, new_job

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    """What a service that runs meanwhile holds open."""
    opened = JobStore(f"sqlite:///{tmp_path}/state/jobs.sqlite")
    opened.create_tables()
    yield opened
    opened.close()


@pytest.fixture
def artifacts(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(str(tmp_path / "state/artifacts"))


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command on the store; returns its exit code and output."""

    def run(*arguments: str, state: str = "state") -> tuple[int, str, str]:
        code = main([*arguments, "--state", str(tmp_path / state)])
        return code, *capsys.readouterr()

    return run


def test_a_key_is_made_shown_once_listed_and_revoked(store: JobStore, command: Command) -> None:
    code, out, err = command("keys", "create", "red", "--label", "laptop")
    secret, (key,) = out.strip(), store.keys()
    assert code == 0
    assert store.tenant_of_key(secret) == "red"
    assert key.id in err
    code, out, _ = command("keys", "list")
    assert out.splitlines()[1].split()[:3] == [key.id, "red", "laptop"]
    assert secret not in out
    assert command("keys", "list", "blue")[1].count("\n") == 1
    assert command("keys", "revoke", key.id)[0] == 0
    assert store.tenant_of_key(secret) is None
    code, _, err = command("keys", "revoke", key.id)
    assert (code, "no valid key" in err) == (1, True)


def test_weights_and_limits_are_set_one_by_one_and_taken_off(store: JobStore, command: Command) -> None:
    assert command("tenants", "set", "red", "--weight", "2", "--max-queued", "5", "--cost-per-day", "0.5")[0] == 0
    assert command("tenants", "set", "red", "--max-queued", "none", "--max-running", "1")[0] == 0
    tenant = store.tenant("red")
    assert tenant is not None
    assert (tenant.weight, tenant.quota) == (2.0, Quota(cost_per_day=0.5, max_running=1))
    _, out, _ = command("tenants", "list")
    assert out.splitlines()[1].split() == ["red", "2", "-", "-", "1", "0.5", "-", "0.0"]
    secret = command("tenants", "webhook-secret", "red")[1].strip()
    assert secret == tenant.webhook_secret
    command("tenants", "set", "red", "--new-webhook-secret")
    assert command("tenants", "webhook-secret", "red")[1].strip() not in (secret, "")
    assert command("tenants", "webhook-secret", "blue")[0] == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["tenants", "set", "red", "--max-queued", "-1"],
        ["tenants", "set", "red", "--max-queued", "1.5"],
        ["tenants", "set", "red", "--cost-per-day", "nan"],
        ["tenants", "set", "red", "--weight", "many"],
        ["tenants"],
        ["keys", "make"],
        ["tenants", "erase"],
        ["nonsense"],
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_touched(
    store: JobStore, command: Command, arguments: list[str]
) -> None:
    with pytest.raises(SystemExit) as refusal:
        command(*arguments)
    assert refusal.value.code == 2
    assert store.audit() == []


def test_impossible_names_and_weights_are_said_in_a_line(store: JobStore, command: Command) -> None:
    for arguments in (
        ["tenants", "set", "red", "--weight", "0"],
        ["tenants", "set", "red", "--max-queued", str(2**31)],
        ["keys", "create", "a b"],
        ["keys", "create", "red", "--label", "x" * 256],
    ):
        code, _, err = command(*arguments)
        assert code == 2
        assert err.startswith("serve: ")
        assert err.count("\n") == 1
    assert store.tenants() == []


def test_the_audit_log_names_the_account_that_asked(store: JobStore, command: Command) -> None:
    command("keys", "create", "red")
    command("tenants", "set", "blue", "--weight", "3")
    _, out, _ = command("audit")
    first, second = out.splitlines()[1:]
    assert "key.create" in first
    assert "@" + socket.gethostname() in first
    assert '"weight": 3.0' in second
    assert len(command("audit", "blue")[1].splitlines()) == 2


def test_erasing_a_tenant_leaves_nothing_of_it_while_the_service_runs(
    store: JobStore, artifacts: ArtifactStore, command: Command, tmp_path: Path
) -> None:
    store.create_key("red")
    mine = [created(store, "red"), claimed(store, "red"), claimed(store, "red", webhook_url="https://example.com")]
    store.complete(mine[2].id, 1, {}, {})
    other = created(store, "blue")
    for job in (*mine, other):
        artifacts.put(job.inputs[0].key, b"private")
    code, _, err = command("tenants", "erase", "red")
    assert (code, "3 jobs" in err) == (0, True)
    assert store.page("red", None, 10, "asc") == ([], False)
    assert store.cancel_requests([mine[1].id]) == {mine[1].id}, "its dispatcher stops it"
    assert artifacts.jobs() == [other.id]
    assert (store.keys("red"), store.usage("red", "1970-01-01"), store.due_deliveries(1e12, 10)) == ([], [], [])
    # Nor does the file of the database still spell what was asked.
    store.close()
    text = b"a cat"
    assert text not in (tmp_path / "state/jobs.sqlite").read_bytes().replace(_spelt(other.id, tmp_path), b"")


def test_erasing_a_tenant_leaves_nothing_in_the_log_of_the_database_either(
    store: JobStore, command: Command, tmp_path: Path
) -> None:
    created(store, "red")
    spelt = [path for path in (tmp_path / "state").glob("jobs.sqlite*") if b"a cat" in path.read_bytes()]
    assert spelt
    assert command("tenants", "erase", "red")[0] == 0
    assert not [path for path in (tmp_path / "state").glob("jobs.sqlite*") if b"a cat" in path.read_bytes()]


def test_a_log_that_somebody_reads_all_the_while_is_said_to_be_as_it_was(
    store: JobStore, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    created(store, "red")
    monkeypatch.setattr("serve.store.database.BUSY_TIMEOUT_S", 0.1)
    with store.snapshot() as reading:
        reading.exec_driver_sql("SELECT * FROM jobs").all()
        code, _, err = command("tenants", "erase", "red")
    assert (code, "call this command again" in err) == (1, True)
    assert command("tenants", "erase", "red")[0] == 0


def _spelt(job_id: str, folder: Path) -> bytes:
    """The request of a job, as the file has it."""
    import sqlite3

    connection = sqlite3.connect(folder / "state/jobs.sqlite")
    (request,) = connection.execute("SELECT request FROM jobs WHERE id = ?", (job_id,)).fetchone()
    connection.close()
    return str(request).encode()


def test_an_erasure_that_a_bucket_interrupts_is_ended_by_calling_it_again(
    store: JobStore, artifacts: ArtifactStore, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        artifacts.put(created(store, "red").inputs[0].key, b"private")
    delete, calls = ArtifactStore.delete, []

    def failing(self: ArtifactStore, prefix: str) -> None:
        calls.append(prefix)
        if len(calls) == 2:
            raise StorageError(5, "no answer")
        delete(self, prefix)

    monkeypatch.setattr(ArtifactStore, "delete", failing)
    code, _, err = command("tenants", "erase", "red")
    assert (code, "called again" in err) == (1, True)
    assert len(artifacts.jobs()) == 2
    # Whoever is given the name meanwhile does not see what is left.
    assert store.page("red", None, 10, "asc") == ([], False)
    assert command("tenants", "erase", "red")[0] == 0
    assert artifacts.jobs() == []
    assert store.counts() == {}


def test_a_backup_is_made_while_the_service_runs_and_restored_elsewhere(
    store: JobStore, artifacts: ArtifactStore, command: Command, tmp_path: Path
) -> None:
    job = created(store)
    artifacts.put(job.inputs[0].key, b"private")
    backup = str(tmp_path / "backup")
    assert command("backup", backup)[0] == 0
    assert (tmp_path / "backup").stat().st_mode & 0o077 == 0
    assert command("restore", backup, state="new")[0] == 0
    restored = JobStore(f"sqlite:///{tmp_path}/new/jobs.sqlite")
    assert restored.get("a", job.id) == job
    assert [entry.action for entry in restored.audit()] == ["restore"]
    restored.close()
    assert (tmp_path / "new/artifacts" / job.inputs[0].key).read_bytes() == b"private"
    for arguments, state in ((("backup", backup), "state"), (("restore", backup), "new")):
        code, _, err = command(*arguments, state=state)
        assert (code, "is not empty" in err) == (2, True)
    assert [entry.action for entry in store.audit()] == ["backup"]


def test_a_job_with_lost_files_is_named_and_left_out(
    store: JobStore, artifacts: ArtifactStore, command: Command, tmp_path: Path
) -> None:
    job = new_job()
    store.create(job)
    code, _, err = command("backup", str(tmp_path / "backup"))
    assert (code, f"job {job.id} is left out" in err) == (0, True)


def test_a_database_that_cannot_be_used_is_said_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "jobs.sqlite").write_bytes(b"not a database" * 100)
    assert main(["keys", "list", "--state", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert err.startswith("serve: the database cannot be used")
    assert err.count("\n") == 1


def test_a_mistyped_folder_is_not_taken_for_an_empty_service(command: Command, tmp_path: Path) -> None:
    for arguments in (
        ["keys", "list"], ["keys", "revoke", "k"], ["tenants", "list"], ["tenants", "erase", "red"], ["audit"],
        ["backup", str(tmp_path / "backup")],
    ):  # fmt: skip
        code, _, err = command(*arguments, state="stat")
        assert code == 2
        assert "there is no database" in err
        assert "--state" in err
    assert list(tmp_path.iterdir()) == []
    code, _, err = command("keys", "create", "red", state="first")
    assert code == 0
    assert "is a new database" in err
    assert "is a new database" not in command("keys", "create", "red", state="first")[2]


def test_the_service_does_not_start_on_a_database_it_cannot_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = JobStore(f"sqlite:///{tmp_path}/jobs.sqlite")
    store.create_tables()
    with store._engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    store.close()
    assert main(["--state", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "has schema 9999, which is newer" in err
    assert err.count("\n") == 1
    config = tmp_path / "config.yaml"
    config.write_text("database_url: postgresql+psycopg://me:secret@127.0.0.1:1/none\n")
    assert main(["--config", str(config), "--state", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert err.startswith("serve: the database cannot be used")
    assert "secret" not in err


def test_the_service_is_what_runs_without_a_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    served: list[tuple[str, str, str, int]] = []

    def serve(config: object, host: str, port: int) -> int:
        served.append((config.model, config.state_dir, host, port))  # type: ignore[attr-defined]
        return 0

    monkeypatch.setattr("serve.commands.run._serve", serve)
    assert main([]) == 0
    assert main(["--model", "debug-two-expert", "--port", "9000", "--state", str(tmp_path)]) == 0
    assert main(["run", "--host", "::1"]) == 0
    assert served == [
        ("debug", "state", "127.0.0.1", 8000),
        ("debug-two-expert", str(tmp_path), "127.0.0.1", 9000),
        ("debug", "state", "::1", 8000),
    ]
    assert main(["--model", "nonsense"]) == 2
    assert "nonsense" in capsys.readouterr().err
    with pytest.raises(SystemExit) as asked:
        main(["--help"])
    assert asked.value.code == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("keys", "tenants", "audit", "backup", "restore"))
