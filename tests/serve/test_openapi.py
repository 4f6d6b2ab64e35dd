"""The API keeps what /openapi.json says: Schemathesis sends what the document allows, and what it does not."""

import ast
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from serve.http.openapi import CODES
from tests.serve.api_support import Service, open_service

SETTINGS = settings(
    max_examples=20,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
NOT_OFFERED = {
    "/v1/videos/edits",
    "/v1/videos/characters",
    "/v1/videos/characters/{character_id}",
    "/v1/videos/{video_id}/remix",
}
# What no schema of a field can say: rules between fields, and what is in a file.
BETWEEN_FIELDS = {
    "conflict",
    "duplicate_field",
    "duplicate_position",
    "empty_prompt",
    "input_out_of_range",
    "invalid_image",
    "invalid_clip",
    "invalid_size",
    "missing_conditioning",
    "missing_position",
    "not_a_clip",
    "not_supported",
    "position_out_of_range",
    "prompt_too_long",
    "size_too_large",
    "size_too_small",
    "too_many_tokens",
    "too_short",
    "unsupported_media",
    "unused_input",
}
ALSO_OUT_OF_RANGE = {"seconds", "pusa.preview_every"}
"""Their range depends on other fields."""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with open_service(tmp_path_factory.mktemp("state"), require_keys=True) as opened:
        yield opened


@pytest.fixture(scope="module")
def key(service: Service) -> dict[str, str]:
    return service.key("red")


@pytest.fixture(scope="module")
def video_ids(service: Service, key: dict[str, str]) -> list[str]:
    """One video that is done, and one that is cancelled."""
    done, cancelled = (
        service.client.post("/v1/videos", json={"prompt": "a"}, headers=key).json()["id"] for _ in range(2)
    )
    service.finish(done)
    service.client.post(f"/v1/videos/{cancelled}/cancel", headers=key)
    return [done, cancelled]


@pytest.fixture(scope="module")
def document(service: Service, key: dict[str, str]) -> Any:
    config = schemathesis.Config.from_dict({"headers": key})
    return schemathesis.openapi.from_asgi("/openapi.json", service.client.app, config=config, headers=key)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["allowed", "forbidden"])
def test_every_answer_is_one_that_the_document_promises(
    document: Any, mode: GenerationMode, key: dict[str, str], video_ids: list[str]
) -> None:
    for found in document.get_all_operations():
        operation = found.ok()
        try:
            fuzz(operation, mode, key, video_ids)
        except Unsatisfiable:
            assert mode is GenerationMode.NEGATIVE  # an operation without parameters can be sent nothing wrong
        except BaseException as error:
            error.add_note(f"operation: {operation.label}")
            raise


def fuzz(operation: Any, mode: GenerationMode, key: dict[str, str], video_ids: list[str]) -> None:
    ids = itertools.cycle([None, *video_ids])  # what is drawn would be 404 all the time

    @SETTINGS
    @given(operation.as_strategy(generation_mode=mode))
    def send(case: schemathesis.Case) -> None:
        video_id = next(ids)
        if "video_id" in (case.path_parameters or {}) and video_id is not None and case.method != "DELETE":
            case.path_parameters["video_id"] = video_id
        check(case, case.call(headers=key), mode)

    send()


def check(case: schemathesis.Case, answer: Any, mode: GenerationMode) -> None:
    case.validate_response(answer, excluded_checks=[positive_data_acceptance])
    if answer.status_code >= 400:
        error = answer.json()["error"]
        assert error["code"] in CODES[answer.status_code], error
        if mode is GenerationMode.POSITIVE and answer.status_code == 400 and case.operation.path not in NOT_OFFERED:
            assert error["code"] in BETWEEN_FIELDS or error["param"] in ALSO_OUT_OF_RANGE, error


def test_the_document_says_how_to_authenticate_only_where_keys_are_asked_for(
    service: Service, key: dict[str, str], tmp_path: Path
) -> None:
    document = service.client.get("/openapi.json", headers=key).json()
    assert document["security"] == [{"key": []}]
    assert document["components"]["securitySchemes"]["key"] == {"type": "http", "scheme": "bearer"}
    assert all("401" in one["responses"] for path in document["paths"].values() for one in path.values())
    with open_service(tmp_path) as other:
        document = other.client.get("/openapi.json").json()
    assert "security" not in document
    assert not any("401" in one["responses"] for path in document["paths"].values() for one in path.values())


def test_every_operation_is_described_with_what_it_answers(service: Service) -> None:
    app: Any = service.client.app
    for path, methods in app.openapi()["paths"].items():
        for method, operation in methods.items():
            assert operation["description"], (method, path)
            for status, answer in operation["responses"].items():
                assert answer["description"], (method, path, status)
                if status not in ("204", "302"):
                    assert answer["content"], (method, path, status)


def test_the_examples_of_bodies_are_accepted(service: Service, key: dict[str, str], video_ids: list[str]) -> None:
    app: Any = service.client.app
    paths = app.openapi()["paths"]
    for path in ("/v1/videos", "/v1/videos/extensions"):
        example = paths[path]["post"]["requestBody"]["content"]["application/json"]["example"]
        answer = service.client.post(path, json=example, headers=key)
        # The example of an extension names a video that nobody has.
        expected = (200, None) if path == "/v1/videos" else (404, "video_not_found")
        assert (answer.status_code, answer.json()["error"] and answer.json()["error"]["code"]) == expected, answer.text


def test_every_field_and_parameter_is_described(service: Service) -> None:
    app: Any = service.client.app
    document = app.openapi()
    for name, schema in document["components"]["schemas"].items():
        for field, described in schema["properties"].items():
            assert described.get("description"), (name, field)
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            for parameter in operation.get("parameters", ()):
                assert parameter.get("description"), (method, path, parameter["name"])


def test_operations_are_tagged_by_what_they_are_about(service: Service) -> None:
    app: Any = service.client.app
    found = [operation["tags"] for one in app.openapi()["paths"].values() for operation in one.values()]
    assert {tag for tags in found for tag in tags} == {"videos", "usage", "models", "health"}


def test_every_code_in_the_source_is_in_the_document() -> None:
    documented = {code for codes in CODES.values() for code in codes}
    root = Path(__file__).parents[2]
    files = [*(root / "serve/http").glob("*.py"), root / "serve/policy/quota.py", *(root / "pusa_dist").rglob("*.py")]
    found = {code for file in files for code in codes_in(ast.parse(file.read_text()))}
    assert len(found) > 50
    assert found - documented == {"http_error"}  # of statuses that the framework never uses here


def test_every_code_in_the_document_is_in_the_source() -> None:
    root = Path(__file__).parents[2]
    files = [file for package in ("serve", "pusa_dist") for file in (root / package).rglob("*.py")]
    source = "".join(file.read_text() for file in files if file.name != "openapi.py")
    documented = {code for codes in CODES.values() for code in codes}
    unsaid = {code for code in documented if f'"{code.removeprefix("media_url_")}"' not in source}
    # One is made of the kind of medium, the other is a sentence.
    assert unsaid == {"image_too_small", "the code of the failure of a job that has failed"}


def codes_in(tree: ast.AST) -> Iterator[str]:
    """Literal codes of errors; the place of the code differs."""
    places = {"RequestError": 2, "ServeError": 1, "_never": 0}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in places:
            arguments = [*node.args[places[node.func.id] : places[node.func.id] + 1]]
            arguments += [keyword.value for keyword in node.keywords if keyword.arg == "code"]
            yield from (one.value for one in arguments if isinstance(one, ast.Constant))
