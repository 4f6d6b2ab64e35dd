"""The text encoder's deployment around a stand-in for the model."""

import asyncio
import threading

import pytest

from pusa_dist.config import load_model_config
from serve.text_encoder import TextEncoder
from serve.watched import StuckError


class FakeEncoder:
    go_on = threading.Event()

    def __init__(self, *_):
        pass

    def encode(self, prompt):
        self.go_on.wait(10)
        return prompt


def test_a_prompt_that_hangs_is_noticed(monkeypatch):
    monkeypatch.setattr("pusa_dist.prompt_encoder.PromptEncoder", FakeEncoder)
    encoder = TextEncoder(load_model_config("debug"), "cpu", stuck_after_s=0.02)
    encoder._lent.lend = lambda value: value

    async def scenario():
        await encoder.check_health()
        embedding = asyncio.create_task(encoder.embed("a"))
        await asyncio.sleep(0.5)
        with pytest.raises(StuckError, match="text"):
            await encoder.check_health()
        FakeEncoder.go_on.set()
        assert await embedding == "a"
        await encoder.check_health()

    asyncio.run(scenario())
