"""New responses for rows whose original ones have low weights."""
