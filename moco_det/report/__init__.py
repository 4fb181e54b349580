"""Runs to tables, curves and one page."""
