"""A teacher's tempered probabilities for every view of every training sample, written into a cache.

recipe.py    the command: complete runs as teachers
network.py   `dump`, of any network, from a script
parts.py     which share of the blocks one of several processes writes
writing.py   asking the network block by block, and writing while it answers
"""

from offline_bkd.pipeline.dump.network import dump
from offline_bkd.pipeline.dump.recipe import dump_logits, prepare_dump

__all__ = ["dump", "dump_logits", "prepare_dump"]
