"""The web server of search: request -> middleware -> api -> executor -> searcher or decoder."""
