"""Protocols: every key with its default and description, and the YAML files that set them."""
