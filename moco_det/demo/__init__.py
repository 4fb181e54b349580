"""A demonstration of the whole pipeline on generated images."""
