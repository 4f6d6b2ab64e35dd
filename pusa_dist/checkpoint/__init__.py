"""Weights from files or from a seed into modules, exactly or not at all; LoRA on top of them."""
