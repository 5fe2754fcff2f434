"""Bridges to other code bases; each imports their packages only when it is used."""
