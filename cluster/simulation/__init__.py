"""Capacity: how many GPUs of which pool a workload needs, and what they cost. Everything it says is simulated."""
