"""``make chaos``: every kind of process dies under a mixed load, and nothing is lost, repeated or left behind."""
