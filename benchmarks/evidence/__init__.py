"""The papers' comparisons, repeated at a small size and reported in docs/evidence.md."""
