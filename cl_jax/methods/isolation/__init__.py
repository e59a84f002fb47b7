"""Parameter isolation: every task has weights or units of its own."""
