"""Whether a set can be trusted: duplicates, splits, audit."""
