"""Whatever happens to a store in whatever order, it agrees with a dictionary of what was written."""

import shutil
import tempfile
from pathlib import Path

import hypothesis
import pytest
from cache_store import answers, arguments, fill, identity
from hypothesis import stateful, strategies

from offline_bkd.cache import CacheError, CropFlip, create_cache, format, open_cache

GIVEN = arguments(identity=identity(views=CropFlip(pad=0)))
BLOCKS = strategies.tuples(strategies.integers(0, 1), strategies.integers(0, 2))


class Store(stateful.RuleBasedStateMachine):
    """Two views of three blocks; the model is the set of blocks that are committed and the one that is damaged."""

    def __init__(self):
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(format, "_CHUNK_BYTES", 120 * 5 * 4)
        self.folder = Path(tempfile.mkdtemp())
        self.url, self.writer, self.done, self.damaged = self.folder / "s", None, set(), set()

    @stateful.initialize()
    def create(self):
        self.writer = create_cache(self.url, **GIVEN)

    @stateful.rule(pair=BLOCKS)
    def write(self, pair):
        fill(self.writer, [pair])
        self.done.add(pair)
        self.damaged.discard(pair)

    @stateful.rule()
    def resume(self):
        self.writer.close()
        self.writer = create_cache(self.url, resume=True, **GIVEN)
        lost = {(v, b) for v, b in self.done if not (self.url / f"probability/c.{v}.{b}.0").exists()}
        self.done -= lost  # which it takes for not written
        self.damaged -= lost

    @stateful.rule(pair=BLOCKS)
    def lose_the_marker(self, pair):
        (self.url / f"done/{pair[0]}.{pair[1]}").unlink(missing_ok=True)
        self.done.discard(pair)
        self.damaged.discard(pair)

    @stateful.rule(pair=BLOCKS, at=strategies.integers(0, 2403), bit=strategies.integers(0, 7))
    def flip_a_bit(self, pair, at, bit):
        path = self.url / f"probability/c.{pair[0]}.{pair[1]}.0"
        if pair in self.done - self.damaged:
            data = bytearray(path.read_bytes())
            data[at] ^= 1 << bit
            path.write_bytes(data)
            self.damaged.add(pair)

    @stateful.rule(pair=BLOCKS)
    def lose_the_chunk(self, pair):
        (self.url / f"probability/c.{pair[0]}.{pair[1]}.0").unlink(missing_ok=True)
        self.damaged |= {pair} & self.done

    @stateful.rule()
    def another_teacher_is_refused(self):
        other = GIVEN | {"identity": identity(views=CropFlip(pad=0), teacher={"digest": "another"})}
        with pytest.raises(CacheError, match="teacher.digest"):
            create_cache(self.url, resume=True, **other)

    @stateful.invariant()
    def it_agrees_with_the_model(self):
        if self.writer is None:
            return
        cache, every = open_cache(self.url), [(view, block) for view in range(2) for block in range(3)]
        assert cache.missing() == self.writer.pending() == [pair for pair in every if pair not in self.done]
        assert len(cache.verify_checksums()) == len(self.damaged)
        for view in range(2):
            mine = {pair for pair in every if pair[0] == view}
            if mine <= self.done - self.damaged:
                assert (cache.plane(view) == answers(view)).all()
            else:
                with pytest.raises(CacheError, match="not dumped yet|is damaged|is missing"):
                    cache.plane(view)

    def teardown(self):
        if self.writer is not None:
            self.writer.close()
        self.patch.undo()
        shutil.rmtree(self.folder)


TestStore = Store.TestCase
TestStore.settings = hypothesis.settings(max_examples=15, stateful_step_count=15, deadline=None, derandomize=True)
