"""Objects and label maps drawn on images."""
