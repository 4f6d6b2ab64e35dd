"""Training: the autoencoder, a text-to-video base, and its adaptation to a timestep per latent frame."""
