"""Photographs to batches of views."""
