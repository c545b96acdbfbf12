"""Imported last by servers of forks: what they have imported is no garbage that forks look for.

Looking would also make each fork copy the pages that it shares with its server.
"""

import gc

gc.freeze()
