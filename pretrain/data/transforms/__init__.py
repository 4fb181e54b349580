"""Augmentation: random view parameters, and their rendering on the CPU or on the device."""
