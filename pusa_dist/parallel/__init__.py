"""Sequence and guidance parallelism over torch.distributed."""
