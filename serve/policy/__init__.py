"""What to do next, as pure functions over plain values: no Ray, torch, web framework or database."""
