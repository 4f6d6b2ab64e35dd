"""Open-loop load on a service through its public API, and what it was seen to do."""
