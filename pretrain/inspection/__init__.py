"""Looking into a pre-training run: curves, filters, neighbours, views, the geometry of its keys."""
