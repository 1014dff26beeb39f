"""What users subclass and what the Trainer calls: MimoStrategy, MimoModule, MimoPrecision.

Imports everything but ``commands``.
"""
