"""Configuration: keys with their defaults and descriptions, and the protocols that set them."""
