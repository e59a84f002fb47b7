"""Classifiers from statistics of frozen features: no backward pass, no forgetting by construction."""
