"""A working moderation hook, to be copied: ``moderation: serve.moderation_example:refuse_listed``.

A real one would ask a classifier; the shape stays the same.
"""

import hashlib
import re

from serve.moderation import Finished, Submission

WORDS = frozenset({"deepfake", "nonconsensual"})
FILES: frozenset[str] = frozenset()
"""SHA-256 of videos that must not be published."""


def refuse_listed(subject: Submission | Finished) -> str | None:
    """Refuse prompts with a listed word, and results that are a listed file."""
    if isinstance(subject, Submission):
        words = set(re.findall(r"\w+", subject.request.prompt.lower()))
        return "its prompt asks for what is not made here" if words & WORDS else None
    if "video" not in subject.variants:  # a preview
        return None
    digest = hashlib.sha256(subject.read("video")).hexdigest()
    return "it is on the operator's list" if digest in FILES else None
