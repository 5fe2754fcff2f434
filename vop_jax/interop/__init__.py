"""Bridges to other code bases; each asks for its packages when it is used."""
