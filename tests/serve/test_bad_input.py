"""Everything a user can get wrong in a body: status, code, param, a remedy, and nothing stored."""

import base64
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pusa_dist.errors import RequestError
from serve.http.schemas import PusaBody, VideoBody
from tests.serve.api_support import Service, animated_gif, blank_png, mp4, open_service, png, pusa


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with open_service(tmp_path_factory.mktemp("state")) as opened:
        yield opened


def form(files: list[tuple[str, tuple[str | None, str | bytes]]] | None = None, /, **fields: Any) -> dict[str, Any]:
    return {"data": {"prompt": "a cat", **fields}, "files": files}


def body(**fields: Any) -> dict[str, Any]:
    return {"json": {"prompt": "a cat", **fields}}


def image(data: bytes, name: str = "a.png") -> list[tuple[str, tuple[str | None, str | bytes]]]:
    return [("input_reference", (name, data))]


def raw(text: str) -> dict[str, Any]:
    return {"content": text, "headers": {"content-type": "application/json"}}


def placed(*positions: Any, **entry: Any) -> str:
    return pusa(conditioning=[{"position": position, **entry} for position in positions])


TRUNCATED = mp4()[:-400]
TWO = [*image(png()), *image(png())]

# what is wrong: (request, code, param, a word of the remedy)
BAD: dict[str, tuple[dict[str, Any], str, str | None, str]] = {
    # fields
    "unknown field": (body(colour="red"), "unknown_field", "colour", "use prompt"),
    "field name of 100 kB": (body(**{"x" * 100_000: 1}), "unknown_field", "x" * 80, "use prompt"),
    "unknown field that is no word": (form(**{"guidance-scale": "1"}), "unknown_field", "guidance-scale", "use prompt"),
    "half a surrogate pair in a reference": (
        raw(r'{"prompt": "x", "input_reference": {"\ud800": "x"}}'),
        "unknown_field",
        r"input_reference.\ud800",
        "use image_url",
    ),
    "half a surrogate pair in an expert": (
        raw(r'{"prompt": "x", "pusa": {"lora_alpha": {"\ud800": 1}}}'),
        "unknown_expert",
        "pusa.lora_alpha",
        "main",
    ),
    "misspelt prompt": (raw('{"promt": "x"}'), "unknown_field", "promt", "'prompt'"),
    "misspelt pusa field": (body(pusa={"num_inference_step": 4}), "unknown_field", "pusa.num_inference_step", "steps'"),
    "misspelt plain field": (body(guidance_scal=4), "unknown_field", "guidance_scal", "use prompt"),
    "misspelt conditioning field": (
        body(conditioning=[{"positon": 0}]),
        "unknown_field",
        "pusa.conditioning[0].positon",
        "'position'",
    ),
    "our field beside pusa in a form": (form(seed="1"), "unknown_field", "seed", "inside the JSON part 'pusa'"),
    "a field of the body inside pusa": (body(pusa={"size": "64x64"}), "unknown_field", "pusa.size", "beside 'pusa'"),
    "a field twice": (body(seed=1, pusa={"seed": 1}), "duplicate_field", "seed", "give it once"),
    "number in quotes": (body(seed="7"), "invalid_type", "pusa.seed", "valid integer"),
    "bool for a number": (body(shift=True), "invalid_type", "pusa.shift", "valid number"),
    "integer that a float cannot hold": (body(seed=2.0**60), "invalid_type", "pusa.seed", "valid integer"),
    "fraction for a count": (body(num_frames=5.5), "invalid_type", "pusa.num_frames", "valid integer"),
    "unknown priority": (body(priority="urgent"), "invalid_value", "pusa.priority", "'batch'"),
    "model that is not served": (body(model="sora-2"), "model_not_found", "model", "use 'debug'"),
    "frames with fewer tokens than ranks": (body(size="16x16"), "size_too_small", "size", "use a size of at least 2"),
    # prompt
    "no prompt": (raw("{}"), "missing_field", "prompt", "required"),
    "empty prompt": (body(prompt=""), "empty_prompt", "prompt", "describe the video"),
    "blank prompt": (body(prompt=" \n"), "empty_prompt", "prompt", "describe the video"),
    "prompt of 100 kB": (body(prompt="x" * 100_000), "prompt_too_long", "prompt", "shorten it"),
    "prompt of 300 kB": (body(prompt="x" * 300_000), "fields_too_large", None, "shorten them"),
    "prompt of 300 kB in a form": (form(prompt="x" * 300_000), "fields_too_large", None, "shorten them"),
    "prompt of 300 kB beside a file": (form(image(png()), prompt="x" * 300_000), "fields_too_large", None, "shorten"),
    "prompt of 300 kB, percent-encoded": (
        {
            "content": b"prompt=" + b"%41" * 100_000,
            "headers": {"content-type": "application/x-www-form-urlencoded"},
        },
        "fields_too_large",
        None,
        "multipart/form-data",
    ),
    "prompt of 100 kB in a form": (form(prompt="x" * 100_000), "prompt_too_long", "prompt", "shorten it"),
    "prompt of 600 tokens": (body(prompt="x" * 600), "prompt_too_long", "prompt", "512"),
    "negative prompt of 600 tokens": (
        body(negative_prompt="x" * 600),
        "prompt_too_long",
        "pusa.negative_prompt",
        "shorten it",
    ),
    "prompt with half a character": (raw('{"prompt": "\\ud800"}'), "invalid_text", "prompt", "valid Unicode"),
    # size and length
    "odd size": (body(size="100x96"), "invalid_size", "size", "multiples of 16"),
    "size of no form": (body(size="wide"), "invalid_size", "size", "WIDTHxHEIGHT"),
    "size of nothing": (body(size="0x0"), "invalid_size", "size", "WIDTHxHEIGHT"),
    "size that is too large": (body(size="1280x720"), "size_too_large", "size", "at most 640"),
    "num_frames not 4k+1": (body(num_frames=16), "invalid_num_frames", "pusa.num_frames", "use 13 or 17"),
    "too many frames": (body(num_frames=165), "out_of_range", "pusa.num_frames", "161"),
    "seconds and num_frames": (body(seconds="1", num_frames=5), "conflict", "seconds", "give one"),
    "seconds that are no number": (body(seconds="soon"), "invalid_seconds", "seconds", "use a number"),
    "seconds that are infinite": (body(seconds="inf"), "invalid_seconds", "seconds", "use a number"),
    "seconds of a day": (body(seconds=86400), "out_of_range", "seconds", "use "),
    # numbers
    "0 steps": (body(num_inference_steps=0), "out_of_range", "pusa.num_inference_steps", "use 1 to 50"),
    "51 steps": (form(pusa=pusa(num_inference_steps=51)), "out_of_range", "pusa.num_inference_steps", "use 1 to 50"),
    "guidance of NaN": (raw('{"prompt": "a", "guidance_scale": NaN}'), "invalid_json", None, "NaN"),
    "shift of infinity": (raw('{"prompt": "a", "shift": 1e999}'), "invalid_value", "pusa.shift", "finite"),
    "shift of 1000 digits": (raw(f'{{"prompt": "a", "shift": 1.{"1" * 1000}}}'), "invalid_json", None, "use at most"),
    "negative seed": (body(seed=-1), "out_of_range", "pusa.seed", "use 0"),
    "seed of 70 bits": (body(seed=2**70), "out_of_range", "pusa.seed", "use 0"),
    "lora_alpha of 9": (body(lora_alpha=9), "out_of_range", "pusa.lora_alpha", "use 0.1"),
    "lora_alpha of an unknown expert": (body(lora_alpha={"high": 1}), "unknown_expert", "pusa.lora_alpha", "main"),
    "lora_alpha of text": (body(lora_alpha="strong"), "invalid_lora_alpha", "pusa.lora_alpha", "use a number"),
    # previews and webhooks
    "previews less than none": (body(preview_every=-1), "out_of_range", "pusa.preview_every", "or equal to 0"),
    "previews beyond the steps": (
        body(preview_every=6, num_inference_steps=5),
        "out_of_range",
        "pusa.preview_every",
        "smaller number",
    ),
    "webhook without TLS": (body(webhook="http://a.example.com/"), "invalid_webhook", "pusa.webhook", "use a public"),
    "webhook to ourselves": (body(webhook="https://127.0.0.1/x"), "invalid_webhook", "pusa.webhook", "use a public"),
    "webhook to the cloud": (body(webhook="https://[::ffff:a9fe:a9fe]/"), "invalid_webhook", "pusa.webhook", "public"),
    "webhook with a password": (body(webhook="https://u:p@a.example/"), "invalid_webhook", "pusa.webhook", "use a"),
    "webhook that is no URL": (body(webhook="tell me"), "invalid_webhook", "pusa.webhook", "use a public https URL"),
    "webhook of 3 kB": (body(webhook="https://a.b/" + "x" * 3000), "invalid_value", "pusa.webhook", "at most 2048"),
    # conditioning
    "position out of range": (
        form(image(png()), pusa=placed(99)),
        "position_out_of_range",
        "pusa.conditioning[0].position",
        "use 0 to 4",
    ),
    "frame out of range": (
        form(image(png()), pusa=placed({"frame": 17})),
        "position_out_of_range",
        "pusa.conditioning[0].position",
        "use 0 to 16",
    ),
    "position of no kind": (
        form(image(png()), pusa=placed("middle")),
        "invalid_position",
        "pusa.conditioning[0].position",
        '"start"',
    ),
    "position twice": (
        form(TWO, pusa=placed("start", 0)),
        "duplicate_position",
        "pusa.conditioning[1].position",
        "once",
    ),
    "multiplier above 1": (
        form(image(png()), pusa=placed(0, noise_multiplier=1.5)),
        "out_of_range",
        "pusa.conditioning[0].noise_multiplier",
        "use 0 to 1",
    ),
    "multiplier below 0": (
        form(image(png()), pusa=placed(0, noise_multiplier=-0.1)),
        "out_of_range",
        "pusa.conditioning[0].noise_multiplier",
        "use 0 to 1",
    ),
    "more positions than inputs": (
        form(image(png()), pusa=placed(0, 1)),
        "input_out_of_range",
        "pusa.conditioning[1].input",
        "upload one more",
    ),
    "fewer positions than inputs": (form(TWO, pusa=placed(0)), "unused_input", "pusa.conditioning", "use it"),
    "several inputs without positions": (form(TWO), "missing_conditioning", "pusa.conditioning", "add one entry"),
    "clip too short for its positions": (
        form(image(mp4(5)), pusa=placed(0, 1, 2)),
        "clip_too_short",
        "pusa.conditioning[2].source",
        "longer clip",
    ),
    "source of an image": (
        form(image(png()), pusa=placed(0, source=1)),
        "not_supported",
        "pusa.conditioning[0].source",
        "leave source out",
    ),
    "unknown fit": (
        form(image(png()), pusa=placed(0, fit="zoom")),
        "invalid_value",
        "pusa.conditioning[0].fit",
        "letterbox",
    ),
    # media
    "text called .png": (form(image(b"hello, I am text")), "unsupported_media", "input_reference", "send an image"),
    "empty file": (form(image(b"")), "unsupported_media", "input_reference", "send an image"),
    "truncated MP4": (form(image(TRUNCATED, "a.mp4")), "invalid_clip", "input_reference", "whole file"),
    "truncated PNG": (form(image(png()[:-2000])), "invalid_image", "input_reference", "whole file"),
    "animated GIF": (form(image(animated_gif())), "animated_image", "input_reference", "still image"),
    "1x1 image": (form(image(png(1, 1))), "image_too_small", "input_reference", "at least 16"),
    "20000x20000 image": (form(image(blank_png(20_000, 20_000))), "image_too_large", "input_reference", "at most"),
    "second of two files broken": (
        form([("input_reference[]", ("a", png())), ("input_reference[]", ("b", b"x"))]),
        "unsupported_media",
        "input_reference[1]",
        "send an image",
    ),
    "too many inputs": (form(image(png(16, 16)) * 5), "too_many_inputs", "input_reference", "at most 4"),
    "file under another name": (
        form([("image", ("a.png", png()))]),
        "unexpected_file",
        "image",
        "'input_reference'",
    ),
    "media by http URL": (
        body(input_reference={"image_url": "http://169.254.169.254/"}),
        "media_by_url_disabled",
        "input_reference.image_url",
        "upload",
    ),
    "media by https URL in a list": (
        body(input_reference=[{"image_url": "HTTPS://example.com/a.png"}]),
        "media_by_url_disabled",
        "input_reference[0].image_url",
        "upload",
    ),
    "media by file URL": (
        body(input_reference={"image_url": "file:///etc/passwd"}),
        "invalid_data_url",
        "input_reference.image_url",
        "upload",
    ),
    "data URL with broken base64": (
        body(input_reference={"image_url": "data:image/png;base64,@@@"}),
        "invalid_data_url",
        "input_reference.image_url",
        "base64",
    ),
    "data URL that is not ASCII": (
        body(input_reference={"image_url": "data:image/png;base64,\u732b"}),
        "invalid_data_url",
        "input_reference.image_url",
        "base64",
    ),
    "data URL without base64": (
        body(input_reference=["data:image/svg+xml,<svg/>"]),
        "invalid_data_url",
        "input_reference[0]",
        "write a data URL",
    ),
    "media by file id": (
        form(**{"input_reference[file_id]": "file-1"}),
        "not_supported",
        "input_reference.file_id",
        "upload",
    ),
    "media by video id": (
        body(input_reference={"id": "video_0"}),
        "not_supported",
        "input_reference.id",
        "/v1/videos/extensions",
    ),
    "reference of no kind": (body(input_reference=3), "invalid_reference", "input_reference", "image_url"),
    "reference with an unknown key": (
        body(input_reference={"imge_url": "x"}),
        "unknown_field",
        "input_reference.imge_url",
        "'image_url'",
    ),
    # JSON
    "invalid JSON in pusa": (form(pusa="{seed: 1}"), "invalid_json", "pusa", "not valid JSON"),
    "invalid JSON text in pusa of a JSON body": (body(pusa="{"), "invalid_json", "pusa", "not valid JSON"),
    "list in pusa": (form(pusa="[1]"), "invalid_type", "pusa", "JSON object"),
    "pusa as form fields": (form(**{"pusa[seed]": "1"}), "invalid_json", "pusa", "json.dumps"),
    "key twice in pusa": (form(pusa='{"seed": 1, "seed": 2}'), "invalid_json", "pusa", "'seed' is given twice"),
    "very deep pusa": (form(pusa="[" * 3_000), "invalid_json", "pusa", "not valid JSON"),
    "pusa of very many lists": (form(pusa="[" * 50_000), "too_many_values", "pusa", "at most 4000"),
    "body of very many values": (
        raw('{"prompt": "a", "pusa": {"conditioning": [' + "1," * 500_000 + "1]}}"),
        "too_many_values",
        None,
        "at most 4000",
    ),
    "text in pusa of very many values": (body(pusa="[" + "{}," * 2_000), "too_many_values", None, "at most 4000"),
    "more conditioning than any video has frames": (
        body(conditioning=[{"position": n} for n in range(300)]),
        "invalid_value",
        "pusa.conditioning",
        "at most 256",
    ),
    "broken body": (raw("{"), "invalid_json", None, "not valid JSON"),
    "body that is no object": (raw("[]"), "invalid_json", None, "send {...}"),
    "body that is no UTF-8": (
        {"content": b"\xff\xfe{", "headers": {"content-type": "application/json"}},
        "invalid_json",
        None,
        "not valid JSON",
    ),
    "multipart without a boundary": (
        {"content": b"x", "headers": {"content-type": "multipart/form-data"}},
        "invalid_multipart",
        None,
        "boundary",
    ),
    "body of an unknown type": (
        {"content": b"x", "headers": {"content-type": "text/plain"}},
        "unsupported_content_type",
        None,
        "application/json",
    ),
}
OTHER_STATUS = {"fields_too_large": 413, "model_not_found": 404, "unsupported_content_type": 415}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused_with_its_field_and_a_remedy_and_nothing_is_stored(service: Service, what: str) -> None:
    request, code, param, remedy = BAD[what]
    answer = service.client.post("/v1/videos", **request)
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == (code, param), error
    assert answer.status_code == OTHER_STATUS.get(code, 400)
    assert error["type"] == "invalid_request_error"
    assert remedy in error["message"]
    assert answer.headers["x-should-retry"] == "false"
    assert service.store.counts() == {}
    assert service.stored_files() == []


def test_every_parameter_of_ours_is_accepted_where_its_value_is_good(service: Service) -> None:
    good = {
        "conditioning": [{"input": 0, "position": 0, "noise_multiplier": 0.5, "fit": "crop"}],
        "num_inference_steps": 50,
        "guidance_scale": 1,
        "shift": 3.0,
        "seed": 2**63 - 1,
        "negative_prompt": "",
        "fps": 12,
        "num_frames": 5,
        "lora_alpha": {"main": 0.1},
        "priority": "batch",
        "preview_every": 10,
        "webhook": "https://hooks.example.com/done?token=t",
    }
    assert set(good) == set(PusaBody.model_fields)
    answer = service.client.post("/v1/videos", **form(image(png()), pusa=json.dumps(good)))
    assert answer.status_code == 200, answer.text
    resolved = answer.json()["pusa"]["request"]
    for name in set(good) - {"conditioning", "priority", "preview_every", "webhook"}:
        assert resolved[name] == good[name]
    job = service.job(answer.json()["id"])
    assert (job.preview_every, job.webhook_url) == (10, good["webhook"])
    assert answer.json()["pusa"]["preview_every"] == 10
    service.client.delete(f"/v1/videos/{answer.json()['id']}")


def test_an_object_of_many_keys_and_one_twice_is_refused_quickly(service: Service) -> None:
    keys = [f'"{index}": 0' for index in range(3_000)]
    started = time.monotonic()
    answer = service.client.post("/v1/videos", **raw("{" + ", ".join([*keys, keys[-1]]) + "}"))
    assert answer.json()["error"]["code"] == "invalid_json"
    assert time.monotonic() - started < 10


def test_a_body_of_very_many_values_is_not_even_parsed(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr("serve.http.uploads.json.loads", lambda *args, **_: parsed.append(args))
        answer = service.client.post("/v1/videos", **raw('{"prompt": "a", "x": [' + "{}," * 300_000 + "{}]}"))
    assert (answer.json()["error"]["code"], parsed) == ("too_many_values", [])


def test_a_list_that_is_too_long_is_one_error_and_not_one_for_every_entry() -> None:
    with pytest.raises(RequestError) as caught:
        VideoBody.parse({"prompt": "a", "pusa": {"conditioning": [1] * 100_000}})
    assert caught.value.param == "pusa.conditioning"
    assert isinstance(caught.value.__cause__, ValidationError)
    assert caught.value.__cause__.error_count() == 1


def test_a_prompt_may_have_many_commas_and_media_many_bytes(service: Service) -> None:
    url = f"data:image/png;base64,{base64.b64encode(png(640, 600)).decode()}"
    answer = service.client.post("/v1/videos", **body(prompt="a, b, " * 60, input_reference={"image_url": url}))
    assert answer.status_code == 200, answer.text
    service.client.delete(f"/v1/videos/{answer.json()['id']}")


def test_the_service_goes_on_after_all_of_it(service: Service) -> None:
    for request, *_ in list(BAD.values())[::7]:
        service.client.post("/v1/videos", **request)
    video_id = service.create()["id"]
    assert service.client.delete(f"/v1/videos/{video_id}").status_code == 200


# Size of the body.


def test_a_body_that_declares_too_much_is_refused_unread(service: Service) -> None:
    answer = service.client.post("/v1/videos", **form(image(b"x" * 2_000_001)))
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    assert service.store.counts() == {}


@pytest.mark.parametrize("content_type", ["multipart/form-data; boundary=b", "application/json"])
def test_a_body_that_streams_too_much_is_refused_on_the_way(service: Service, content_type: str) -> None:
    num_sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal num_sent
        yield b'--b\r\nContent-Disposition: form-data; name="input_reference"; filename="a"\r\n\r\n'
        while num_sent < 50_000_000:
            num_sent += 100_000
            yield b"x" * 100_000

    answer = service.client.post("/v1/videos", content=endless(), headers={"content-type": content_type})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    assert service.store.counts() == {}


def test_inputs_that_nearly_fill_the_limit_are_accepted(service: Service) -> None:
    data = png(640, 640)
    assert 1_000_000 < len(data) < 2_000_000
    answer = service.client.post("/v1/videos", **form(image(data)))
    assert answer.status_code == 200, answer.text
    service.client.delete(f"/v1/videos/{answer.json()['id']}")


def test_a_data_url_may_be_as_large_as_the_body(tmp_path: Path) -> None:
    with open_service(tmp_path) as service:
        url = f"data:image/png;base64,{base64.b64encode(png(640, 600)).decode()}"
        for answer in (
            service.client.post("/v1/videos", **form([("input_reference[image_url]", (None, url))])),
            service.client.post("/v1/videos", **body(input_reference={"image_url": url})),
        ):
            assert answer.status_code == 200, answer.text
