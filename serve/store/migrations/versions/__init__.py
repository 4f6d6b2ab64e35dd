"""Every change, in the order of its number."""
