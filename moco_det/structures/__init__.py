"""What is passed between rooms."""
