"""``python -m lightning_mimo`` is the same as ``lightning-mimo``."""

from lightning_mimo.commands.cli import command

if __name__ == "__main__":
    command()
