"""The command line: what an operator sees and what it leaves in the store."""

import argparse
import socket
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

import configs
from pusa_dist.errors import ConfigError
from pusa_dist.parallel.mesh import free_port
from serve.__main__ import COMMANDS, _parser, main
from serve.commands.options import read_file
from serve.commands.preflight import check_memory, check_resources
from serve.commands.run import Address
from serve.config import DenoiserConfig, ServeConfig
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
    assert (
        command("tenants", "set", "red", "--weight", "2", "--max-queued", "5", "--gang-seconds-per-day", "0.5")[0] == 0
    )
    assert command("tenants", "set", "red", "--max-queued", "none", "--max-running", "1")[0] == 0
    tenant = store.tenant("red")
    assert tenant is not None
    assert (tenant.weight, tenant.quota) == (2.0, Quota(cost_per_day=0.5, max_running=1))
    _, out, _ = command("tenants", "list")
    heads = ["requests_per_minute", "max_queued", "max_running", "gang_seconds_per_day", "max_video_tokens"]
    assert out.splitlines()[0].split() == ["tenant", "weight", *heads, "virtual_time"]
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
        ["tenants", "set", "red", "--gang-seconds-per-day", "nan"],
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
    code, _, err = command("keys", "create", "red", state="/proc")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("serve: state_dir=/proc cannot be written: ")


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
    served: list[tuple[ServeConfig, Address]] = []

    def serve(config: ServeConfig, address: Address) -> int:
        served.append((config, address))
        return 0

    monkeypatch.setattr("serve.commands.run._serve", serve)
    monkeypatch.setattr("serve.commands.run.check_before_ray", lambda *_: None)
    assert main([]) == 0
    assert main(["--model", "debug-two-expert", "--port", "9000", "--state", str(tmp_path), "--require-keys"]) == 0
    assert main(["run", "--host", "::1", "--metrics-port", "9100"]) == 0
    assert [(one.model, one.state_dir, one.require_keys, address) for one, address in served] == [
        ("tiny", "state", False, Address("127.0.0.1", 8000, None)),
        ("debug-two-expert", str(tmp_path), True, Address("127.0.0.1", 9000, None)),
        ("tiny", "state", False, Address("::1", 8000, 9100)),
    ]
    assert main(["--model", "nonsense"]) == 2
    assert "nonsense" in capsys.readouterr().err
    with pytest.raises(SystemExit) as asked:
        main(["--help"])
    assert asked.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: python -m serve ")
    for name, (_, meaning) in COMMANDS.items():
        assert f"\n  {name:9}{meaning}\n" in out


def test_a_command_that_is_not_one_is_named_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    for given, remedy in (("tenant", "did you mean 'tenants'?"), ("foo", f"use {', '.join(COMMANDS)}")):
        with pytest.raises(SystemExit):
            main([given, "list"])
        assert f"unknown command {given!r}; {remedy}" in capsys.readouterr().err


def test_every_command_and_argument_is_described() -> None:
    waiting = [_parser(["--help"]), _parser(["keys"])]
    while waiting:
        parser = waiting.pop()
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                assert len(action._choices_actions) == len(action.choices), parser.prog
                waiting += action.choices.values()
            else:
                assert action.help, (parser.prog, action.dest)


SERVE_FILE = """
http_options: {host: "::1", port: 9001}
applications:
  - import_path: serve.app:build_app
    autoscaling_policy: {policy_function: cluster.ray_scaling:Application}
    args: {model: debug}
"""


def test_where_to_listen_is_as_the_file_says_unless_the_command_line_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    addresses: list[Address] = []
    monkeypatch.setattr("serve.commands.run._serve", lambda _, address: addresses.append(address) or 0)
    monkeypatch.setattr("serve.commands.run.check_before_ray", lambda *_: None)
    path = tmp_path / "serve.yaml"
    path.write_text(SERVE_FILE)
    assert main(["--config", str(path)]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"serve: the autoscaling_policy of {path} is not used by 'python -m serve'")
    assert f"serve run {path}" in line
    assert main(["--config", str(path), "--host", "127.0.0.1", "--port", "9002"]) == 0
    assert addresses == [Address("::1", 9001, None), Address("127.0.0.1", 9002, None)]
    path.write_text(SERVE_FILE.replace("9001", "many"))
    assert main(["--config", str(path)]) == 2
    assert "http_options: give host as a text and port as a number" in capsys.readouterr().err


def test_all_faults_of_a_configuration_are_listed_without_their_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(
        "vae: {num_gpu: 1, num_replicas: 2, max_replicas: 1}\ntext_encoder: secret\ndatabase_urls: secret\n"
        "denoiser: {cfg_degree: 3}\njob_deadline_s: secret\n"
    )
    assert main(["--config", str(path)]) == 2
    first, *faults = capsys.readouterr().err.splitlines()
    assert first == "serve: 5 settings cannot work:"
    assert sorted(faults) == [
        "  database_urls is unknown; did you mean 'database_url'?",
        "  denoiser: cfg_degree=3: guidance has two branches; use 1 or 2",
        "  job_deadline_s: Input should be a valid number, unable to parse string as a number",
        "  text_encoder: expected a mapping of settings",
        "  vae.num_gpu is unknown; did you mean 'num_gpus'?",
    ]
    path.write_text("vae: {num_replicas: 2, max_replicas: 1}\n")
    assert main(["--config", str(path)]) == 2
    assert capsys.readouterr().err == "serve: vae: max_replicas=1 is below num_replicas=2\n"


def test_the_settings_that_are_printed_are_the_defaults_and_each_is_described(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["config"]) == 0
    out = capsys.readouterr().out
    assert ServeConfig.model_validate(yaml.safe_load(out)) == ServeConfig()
    assert "# Ranks that share the attention heads; it must divide their number. (int, at least 1)" in out
    for former, line in pairwise(out.splitlines()):
        assert line.lstrip().startswith("#") or former.lstrip().startswith("# "), line


def test_a_model_that_this_machine_cannot_hold_on_its_cpu_is_refused() -> None:
    config = ServeConfig(model="pusa-v1-14b")
    with pytest.raises(ConfigError, match=r"2 ranks take 211 GiB, and this machine has 64 GiB; .*single-node\.yaml"):
        check_memory(config, config.load_model(), 64 * 2**30)
    check_memory(config, config.load_model(), 1000 * 2**30)
    with_gpus = config.model_copy(update={"denoiser": DenoiserConfig(num_gpus=1)})
    check_memory(with_gpus, config.load_model(), 64 * 2**30)


def test_more_than_the_machine_has_is_refused_and_not_waited_for() -> None:
    check_resources(ServeConfig(), {"CPU": 2.0})
    path = Path(next(iter(configs.__path__))) / "serve" / "single-node.yaml"
    config = ServeConfig.model_validate(read_file(str(path)).settings)
    check_resources(config, {"CPU": 64.0, "GPU": 8.0})
    with pytest.raises(ConfigError, match=r"asks for 8 GPUs \(text_encoder 1, vae 2, denoiser 5\) and .* has 0;"):
        check_resources(config, {"CPU": 64.0})
    with pytest.raises(ConfigError, match=r"asks for 23 CPUs .* and this machine has 8;"):
        check_resources(config, {"CPU": 8.0, "GPU": 8.0})
    with pytest.raises(ConfigError, match=r"asks for 1 fast \(vae 1\) and this machine has 0;"):
        check_resources(ServeConfig.model_validate({"vae": {"resources": {"fast": 1}}}), {"CPU": 8.0})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--state", "/proc"], "state_dir=/proc cannot be written: "),
        (["--host", "0.0.0.0"], "set require_keys: true (--require-keys) and make keys with"),
        (
            ["--config", "small.yaml", "--weights", "nowhere"],
            "no file under nowhere matches weights.transformer.main: ",
        ),
        (["--port", "BUSY"], "choose another address with --host or --port"),
        (["--metrics-port", "BUSY"], "choose another address with --metrics-port"),
    ],
)
def test_what_cannot_work_is_said_before_ray_starts(
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("serve.commands.run._serve", lambda *_: pytest.fail("it started"))
    (tmp_path / "small.yaml").write_text("model: tiny\n")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        busy = str(listener.getsockname()[1])
        given = [busy if argument == "BUSY" else argument for argument in arguments]
        assert main([*given, *([] if "--port" in given else ["--port", str(free_port())])]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_service_file_that_is_not_found_is_said_with_what_names_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("PGSERVICEFILE", "PGSYSCONFDIR"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    config = tmp_path / "config.yaml"
    config.write_text("database_url: postgresql+psycopg:///?service=pusa\n")
    assert main(["keys", "list", "--config", str(config)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "PGSERVICEFILE must name a file with that section" in line
