"""torch only: the pattern, validation, the dense reference, the portable backend, merging."""
