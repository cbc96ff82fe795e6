"""Planes are held where no step touches the store."""

import numpy as np
import pytest
from cache_store import answers, dump, identity

from cache import CropFlip
from cache.planes import Planes


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return dump(tmp_path_factory.mktemp("planes") / "s")


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
