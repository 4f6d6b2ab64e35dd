"""How good a small model is: every measure of the synthetic world, through the served path, with its interval.

The model alone (``tiny-base``) and adapted to a timestep per latent frame (``tiny``) are given the same
held-out scenes and seeds. ``python -m cluster.quality`` runs it; ``tasks`` defines what is right, ``table``
what must be reached.
"""
