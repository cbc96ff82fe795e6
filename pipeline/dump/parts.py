"""Which blocks of a store one of several processes writes."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from offline_bkd.cache import Cache
from offline_bkd.cache.storage import RemoteStorage, open_storage
from offline_bkd.pipeline import UserError, torchrun
from offline_bkd.pipeline.show.terminal import counted

Blocks = Sequence[tuple[int, int]]  # (view, block)


class Part(NamedTuple):
    """The (view, block) that one of several processes writes; `choose` picks them from the open cache."""

    choose: Callable[[Cache], Blocks]
    name: str
    number: int = 1
    rank: int = 0  # of the processes that torchrun started for the part

    def waits(self, path: str) -> bool:
        """Whether another process is to create the store at `path`. Where nothing is locked, part 1 is."""
        return self.rank > 0 or (self.number > 1 and isinstance(open_storage(path), RemoteStorage))


def own_part(part: tuple[int, int] | None, blocks: Blocks | None) -> Part | None:
    """This process's part of the work. None: everything.

    part: (number from 1, count), which torchrun's processes share, if there are several.  blocks: these instead.
    """
    rank, world = torchrun.rank(), torchrun.world()
    if blocks is not None:
        if part or world > 1:
            raise UserError("blocks are for this process alone; give no part, and start it without torchrun")
        return Part(lambda cache: blocks, counted(len(blocks), "block"))
    if part is None and world == 1:
        return None
    number, count = part or (1, 1)
    if not 1 <= number <= count:
        raise UserError(f"part {number}/{count}: parts are 1/{count} to {count}/{count}")
    place, places = (number - 1) * world + rank, count * world
    return Part(lambda cache: cache.parts(places)[place], f"part {place + 1}/{places}", number, rank)
