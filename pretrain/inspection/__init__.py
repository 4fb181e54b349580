"""Inspection of a pre-training run: curves, filters, neighbours, views, geometry of the keys."""
