"""The encoder: ResNet, batch normalization, projection heads."""
