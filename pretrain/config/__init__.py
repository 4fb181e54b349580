"""Configuration keys, their defaults, and the YAML files that set them."""
