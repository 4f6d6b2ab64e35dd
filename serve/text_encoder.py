"""The text encoder's deployment: prompt in, reference to its embedding out."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

from pusa_dist.config import ModelConfig
from serve.lending import Lent
from serve.stages import TensorRef


class TextEncoder:
    """Embeds prompts on a thread of its own, so that the replica always answers Serve."""

    def __init__(self, model: ModelConfig, device: str) -> None:
        from pusa_dist.prompt_encoder import PromptEncoder  # torch stays out of the other roles

        self._encoder = PromptEncoder(model, device)
        self._thread = ThreadPoolExecutor(1, "text")
        self._lent = Lent()

    async def embed(self, prompt: str) -> TensorRef:
        """(L, E) embedding of a prompt, in the object store."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._embed, prompt)

    def _embed(self, prompt: str) -> TensorRef:
        return self._lent.lend(self._encoder.encode(prompt))
