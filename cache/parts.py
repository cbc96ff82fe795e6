"""Sharing out a dump: which (view, block) are written together, and what each of so many parts still has to write."""

VIEWS_TOGETHER = 8  # of a block: one decode of its images serves them


def units(layout) -> list[list[tuple[int, int]]]:
    """Every (view, block) of a store, as the lists that stay with one process, by block.

    Where views are stored as differences from another, all views of a block are such a list.
    """
    together = VIEWS_TOGETHER if layout.encoding.reference is None else layout.views
    starts = range(0, layout.views, together)
    return [
        [(view, block) for view in range(start, min(start + together, layout.views))]
        for block in range(layout.blocks)
        for start in starts
    ]


def share(layout, missing: set[tuple[int, int]], count: int) -> list[list[tuple[int, int]]]:
    """What is `missing` of each of `count` parts, which depend on the layout alone. Some are empty if units are fewer."""
    everything, reference = units(layout), layout.encoding.reference
    found = []
    for part in range(count):
        mine = everything[part * len(everything) // count : (part + 1) * len(everything) // count]
        # differences from a reference that is lost are lost with it
        found.append([pair for unit in mine for pair in unit if pair in missing or (reference, pair[1]) in missing])
    return found
