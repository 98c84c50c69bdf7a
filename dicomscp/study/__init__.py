"""What we make of a study, as pure functions: when it is due, what its documents are, where they stand."""
