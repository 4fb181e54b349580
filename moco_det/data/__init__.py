"""Data sets: readers, registration, sampling and mapping to training examples."""
