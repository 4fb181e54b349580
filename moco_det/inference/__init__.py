"""A finished run used on images and videos."""
