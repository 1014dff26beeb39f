"""Runnable examples of lightning-mimo; each folder is one demo."""
