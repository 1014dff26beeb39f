"""The command line ``lightning-mimo``.

Imports everything; nothing imports it.
"""
