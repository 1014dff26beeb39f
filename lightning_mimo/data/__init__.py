"""A user's DataLoader, rebuilt for each rank: order, loading, collation, and the state for a resume.

Imports ``layout``, ``microbatch``, ``parallel`` and torch.
"""
