"""Clean datasets: which rows to keep by the weights of a run, and the user's own files without the others."""
