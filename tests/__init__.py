"""Tests of dicomscp, what they share, and the benchmark; a package, lest an installed one be taken for it."""
