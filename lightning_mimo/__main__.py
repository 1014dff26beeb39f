"""``python -m lightning_mimo`` is the same as ``lightning-mimo``."""

from lightning_mimo.commands.cli import main

if __name__ == "__main__":
    main()
