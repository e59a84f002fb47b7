"""A report of runs, made from the lines of results.jsonl and nothing else.

`write(workdir)` makes report.html, one file that needs no other, and PNG figures in figures/.
"""

from __future__ import annotations

from cl_jax.report.page import save, write

__all__ = ['save', 'write']
