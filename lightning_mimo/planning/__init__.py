"""What a run would hold on each rank, found out in one process before anything starts.

Imports ``optim`` and below; runs on the meta device.
"""
