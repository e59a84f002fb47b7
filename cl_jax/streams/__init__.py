"""Sequences of tasks as index tables over data that stays on the device."""
