"""Images, clips and videos as bytes and as arrays of pixels (no torch)."""
