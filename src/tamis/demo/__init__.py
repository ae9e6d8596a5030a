"""`tamis demo`: a small world, made on the spot, and a comparison on it."""
