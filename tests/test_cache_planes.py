"""Planes are read while others are used, and held where no step touches the store."""

import threading

import numpy as np
import pytest
from cache_store import answers, arguments, dump, fill, identity

from cache import CacheError, CropFlip, create_cache, open_cache
from cache.planes import Planes, read_ahead


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return dump(tmp_path_factory.mktemp("planes") / "s")


@pytest.mark.parametrize("ahead", [0, 1, 3, 50])
def test_planes_come_in_the_order_asked(cache, ahead):
    views = [3, 0, 17, 3, 5]
    found = [(view, plane.copy()) for view, plane in read_ahead(cache, views, ahead=ahead)]
    assert [view for view, _ in found] == views and all((plane == answers(view)).all() for view, plane in found)
    assert list(read_ahead(cache, [])) == []


def test_the_next_plane_is_read_while_one_is_used_and_no_more_than_that(cache, monkeypatch):
    started, events = [], [threading.Event() for _ in range(18)]
    real = cache.stored_plane

    def stored_plane(view, out):
        started.append(view)
        events[view].set()
        return real(view, out)

    monkeypatch.setattr(cache, "stored_plane", stored_plane)
    planes, rooms = read_ahead(cache, range(6), ahead=1), set()
    for place, (view, plane) in enumerate(planes):
        rooms.add(plane.ctypes.data)
        assert place == 5 or events[place + 1].wait(10)
        assert len(started) <= place + 2 and (plane == answers(view)).all()
    assert len(rooms) == 2


def test_a_plane_that_is_not_there_is_reported_in_its_turn(tmp_path):
    with create_cache(tmp_path / "s", **arguments()) as writer:
        fill(writer, [(0, 0), (1, 0)])
    planes = read_ahead(open_cache(tmp_path / "s"), [0, 1, 2, 3], ahead=2)
    assert next(planes)[0] == 0 and next(planes)[0] == 1
    with pytest.raises(CacheError, match="view 2, rows 0 to 359 is not dumped yet"):
        next(planes)


@pytest.mark.parametrize("scratch", [False, True])
def test_held_planes_give_rows_without_the_store(tmp_path, scratch):
    cache = dump(tmp_path / "s", identity=identity(views=CropFlip(pad=0)))
    planes = Planes(cache, scratch=tmp_path if scratch else None)
    for path in sorted((tmp_path / "s").rglob("c.*")):
        path.unlink()
    samples, views = np.array([7, 0, 359, 7]), np.array([1, 0, 1, 0])
    expected = np.stack([answers(view)[sample] for sample, view in zip(samples, views, strict=False)])
    assert (planes.rows(samples, views) == expected).all()
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_some_views_can_be_held(cache):
    planes = Planes(cache, views=[5, 2])
    assert (planes.rows([1, 2], [2, 5]) == np.stack([answers(2)[1], answers(5)[2]])).all()
    with pytest.raises(KeyError, match="view 3 is not held"):
        planes.rows([0, 0], [2, 3])
