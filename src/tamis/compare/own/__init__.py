"""`tamis compare`: does selection pay on the user's own data."""
