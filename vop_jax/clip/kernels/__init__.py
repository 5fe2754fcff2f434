"""Attention and layer norm, written for the accelerators."""
