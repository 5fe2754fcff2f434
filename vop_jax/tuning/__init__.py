"""What is added to CLIP, and what of the whole is trained."""
