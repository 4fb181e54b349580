"""Evaluators, one a file, and their results."""
