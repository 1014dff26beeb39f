"""How ranks come to be and how they end: cluster environments, the fork launcher, preemption.

Imports ``layout`` and Lightning's launchers and cluster environments.
"""
