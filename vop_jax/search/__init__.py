"""Finds videos, moments and captions by what they show."""
