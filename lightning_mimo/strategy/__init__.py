"""The classes that users subclass and the Trainer calls: MimoStrategy, MimoModule, MimoPrecision.

Imports everything except ``commands``.
"""
