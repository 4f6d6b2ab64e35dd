"""A synthetic world whose every frame is known: coloured shapes that move, captioned, drawn and measured (no torch)."""
