"""The whole road on generated images."""
