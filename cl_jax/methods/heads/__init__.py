"""Which outputs compete: those of the task, those seen so far, or all (the default)."""
