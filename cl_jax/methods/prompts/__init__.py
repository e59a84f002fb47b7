"""Prompts and prefixes for a frozen transformer."""
