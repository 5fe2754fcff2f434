"""Serves indexes of videos: a page to search them and a JSON API."""
