"""The page on a run: what was learned, why rows were dropped, and every row to look at."""
