"""Recipes: every key with its default, and the YAML files that set them."""
