"""Methods beside each other on one task."""
