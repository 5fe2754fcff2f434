"""Records: videos decoded once, in files that training reads."""
