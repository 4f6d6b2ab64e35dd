"""Single-device mathematics: the transformer, the VAE and the text encoder. Nothing here is distributed."""
