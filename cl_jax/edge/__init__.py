"""Learners compiled ahead of time for small devices; see `c99`."""
