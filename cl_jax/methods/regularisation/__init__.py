"""Penalties on parameters and on outputs: what mattered before may not change much."""
