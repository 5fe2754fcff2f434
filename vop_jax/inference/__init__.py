"""Trained prompts in use: the retriever, and programs for other runtimes."""
