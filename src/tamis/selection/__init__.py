"""From the losses of rows to their weights."""
