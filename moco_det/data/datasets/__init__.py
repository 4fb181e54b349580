"""Readers of annotation layouts; each reports what it fixed or skipped."""
