"""Videos that go on from an uploaded clip or a finished video."""

from typing import Any

import pytest

from tests.serve.api_support import ABSENT, Service, error_of, mp4, png, pusa

JSON = {"content-type": "application/json"}


def given_frames(service: Service, video: dict[str, Any]) -> list[tuple[int, int | None, float]]:
    request = service.job(video["id"]).request
    return [(one.position, one.source, one.noise_multiplier) for one in request.conditioning]


@pytest.mark.parametrize(
    ("clip_frames", "seconds", "expected"),
    [
        (33, "2.125", [(0, -4, 0.0), (1, -3, 0.3), (2, -2, 0.4), (3, -1, 0.5)]),
        (9, "2.125", [(0, -3, 0.0), (1, -2, 0.3), (2, -1, 0.4)]),
        (33, "1.125", [(0, -2, 0.0), (1, -1, 0.3)]),
    ],
)
def test_an_extension_continues_from_the_last_frames_of_an_uploaded_clip(
    service: Service, clip_frames: int, seconds: str, expected: list[tuple[int, int, float]]
) -> None:
    answer = service.client.post(
        "/v1/videos/extensions",
        data={"prompt": "on", "seconds": seconds, "pusa": pusa(num_inference_steps=3)},
        files={"video": ("clip.mp4", mp4(clip_frames))},
    )
    assert answer.status_code == 200, answer.text
    assert given_frames(service, answer.json()) == expected
    assert answer.json()["pusa"]["num_steps"] == 3


@pytest.mark.parametrize("body", ["form", "json"])
def test_an_extension_of_a_finished_video_copies_it_and_keeps_its_format(service: Service, body: str) -> None:
    source = service.create(size="64x80", fps=4)["id"]
    clip = mp4(17)
    service.finish(source, video=clip)
    url = "/v1/videos/extensions"
    extended = (
        service.client.post(url, data={"prompt": "on", "video[id]": source, "seconds": "3"})
        if body == "form"
        else service.client.post(url, json={"prompt": "on", "video": {"id": source}, "seconds": "3"})
    )
    assert extended.status_code == 200, extended.text
    job = service.job(extended.json()["id"])
    assert extended.json()["size"] == "64x80"
    assert (job.request.fps, job.request.num_frames) == (4, 9)
    assert service.artifacts.read(job.inputs[0].key) == clip
    assert [one.source for one in job.request.conditioning] == [-2, -1]


def test_what_cannot_be_extended_is_refused(service: Service) -> None:
    unfinished = service.create()["id"]

    def refusal(**request: Any) -> tuple[int, str]:
        answer = service.client.post("/v1/videos/extensions", **request)
        return answer.status_code, error_of(answer)["code"]

    image, clip = {"video": ("a", png())}, {"video": ("a", mp4())}
    assert refusal(json={"prompt": "on", "video": {"id": unfinished}}) == (409, "video_not_ready")
    assert refusal(json={"prompt": "on", "video": {"id": ABSENT}}) == (404, "video_not_found")
    half_a_pair = {"content": r'{"prompt": "on", "video": {"id": "\ud800"}}', "headers": JSON}
    assert refusal(**half_a_pair) == (404, "video_not_found")
    assert refusal(json={"prompt": "on"}) == (400, "one_video")
    assert refusal(data={"prompt": "on"}, files=image) == (400, "not_a_clip")
    assert refusal(data={"prompt": "on", "pusa": pusa(num_frames=1)}, files=clip) == (400, "too_short")
    given = pusa(conditioning=[{"position": 0}])
    assert refusal(data={"prompt": "on", "pusa": given}, files=clip) == (400, "conflict")
    assert len(service.client.get("/v1/videos").json()["data"]) == 1
