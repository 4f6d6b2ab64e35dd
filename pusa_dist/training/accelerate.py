"""A faster forward and backward of the transformer on a CPU; the mathematics stay the product's.

Measured on two cores with AMX, 48 samples of 80 tokens: 1.1 s a step with bfloat16 as it comes, most of it in
the backward pass of the flash kernel; 0.7 s with attention as plain matrix products; 0.35 s with the blocks'
element-wise operations fused by the compiler.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from diffusers.models.attention_dispatch import attention_backend

from pusa_dist.model.transformer import VectorTimestepTransformer
from pusa_dist.training.loop import LoopOptions, autocast


def compile_blocks(transformer: VectorTimestepTransformer) -> None:
    """Compile every block, in place, for batches of one shape; needs a C++ compiler on a CPU."""
    for block in transformer.blocks:
        block.compile(dynamic=False)


@contextmanager
def as_written(transformer: VectorTimestepTransformer) -> Iterator[None]:
    """Blocks run uncompiled inside: for batches of other shapes, each of which would be compiled anew."""
    compiled = [block._compiled_call_impl for block in transformer.blocks]
    for block in transformer.blocks:
        block._compiled_call_impl = None
    try:
        yield
    finally:
        for block, call in zip(transformer.blocks, compiled, strict=True):
            block._compiled_call_impl = call


@contextmanager
def training_forward(loop: LoopOptions) -> Iterator[None]:
    """Precision and attention of a training step."""
    with ExitStack() as stack:
        stack.enter_context(autocast(loop))
        if loop.device == "cpu":
            stack.enter_context(attention_backend("_native_math"))
        yield
