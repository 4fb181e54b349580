"""The ResNet in any project's checkpoint: where it is, which it is, what its tensors are called.

The steps, in order: layouts.py (tables of the projects' layouts), find_encoder.py (where the
encoder is), architecture.py (which ResNet it is), pixel_settings.py and statements.py (what the
shapes do not show), accounting.py (what becomes of each tensor); read_encoder.py runs them.
"""
