"""Stops the search for garbage in a process that imports this module: before imports that leave none.

It takes a tenth of their time. Forked processes turn it on again.
"""

import gc

gc.disable()
