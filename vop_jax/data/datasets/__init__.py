"""Annotation files become clips: a parser for each kind."""
