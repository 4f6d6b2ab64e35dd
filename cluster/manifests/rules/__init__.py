"""Rules of our own, a file a subject; ``all_rules.RULES`` is all of them."""
