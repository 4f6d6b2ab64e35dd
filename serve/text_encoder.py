"""The text encoder's deployment: prompt in, reference to its embedding out."""

import asyncio

from pusa_dist.config import ModelConfig
from serve import heap
from serve.lending import Lent
from serve.stages import TensorRef
from serve.watched import STUCK_AFTER_S, WatchedThread


class TextEncoder:
    """Embeds prompts on a thread of its own, so that the replica always answers Serve."""

    def __init__(self, model: ModelConfig, device: str, stuck_after_s: float = STUCK_AFTER_S) -> None:
        with heap.importing():
            from pusa_dist.prompt_encoder import PromptEncoder  # torch stays out of the other roles

        self._encoder = PromptEncoder(model, device)
        self._thread = WatchedThread("text", stuck_after_s)
        self._lent = Lent()

    async def embed(self, prompt: str) -> TensorRef:
        """(L, E) embedding of a prompt, in the object store."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._embed, prompt)

    async def check_health(self) -> None:
        """Raise if a prompt hangs, so that Serve replaces the replica."""
        self._thread.check()

    def _embed(self, prompt: str) -> TensorRef:
        return self._lent.lend(self._encoder.encode(prompt))
