"""Inference with a finished run on images and videos."""
