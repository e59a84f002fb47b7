"""Rehearsal: some of what was seen is kept and seen again."""
