"""Experiments, one short file each; `common` documents every field.

A configuration is executed Python: run only files that you trust. What a run really used is kept as
plain JSON in its working directory, and that file can be given as --config too.
"""
