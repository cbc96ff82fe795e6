"""What `inspect` and `verify` print first: a few lines for a person, the verdict last."""

from offline_bkd.cache.shots import SHOTS
from offline_bkd.pipeline.show import terminal

GROUPS = "all", *SHOTS
WORST = 5  # classes that are named


def print_store(summary: dict, store: str) -> None:
    """Whose answers to what, how large, how good the teacher is, and whether the store is whole. `summary`: of a cache."""
    identity, blocks, quality = summary["identity"], summary["blocks"], summary["teacher"]
    counts, size = [count for count in summary["class_counts"] if count], summary["bytes"]
    views = ", ".join(f"{key} {value}" for key, value in identity["views"].items() if key != "name")
    a_view = f", {size['a_view_of_a_sample']:,} bytes a view of a sample" if size["a_view_of_a_sample"] else ""
    served = summary["temperatures"]
    of_each = f"{max(counts):,} to {min(counts):,} of each"
    rows = [
        ["answers of", _teachers(identity["teacher"])],
        [
            "to",
            f"{summary['samples']:,} samples of {summary['classes']:,} classes, {of_each}",
        ],
        ["views", f"{summary['views']:,} of each sample: {identity['views']['name']} ({views})"],
        ["temperature", f"{identity['temperature']:g}" + (f"; serves {served[0]:g} to {served[1]:g}" if served else "")],
        ["stored as", f"{summary['encoding']['name']}, {_bytes(size['all'])}{a_view}"],
    ]
    terminal.table(rows, store, heading=False)
    if quality:
        shown = [group for group in GROUPS if group in quality]
        table = [["on its training views, %", *shown]]
        for name, key in ("accuracy", "accuracy"), ("confidence", "confidence"), ("calibration error", "calibration_error"):
            table.append([name, *(f"{100 * quality[group][key]:.1f}" for group in shown)])
        terminal.table(table, "how good the teacher is")
    missing = blocks["all"] - blocks["done"]
    lacks = [f"{missing:,} of {blocks['all']:,} blocks are missing"] if missing else []
    if lost := blocks.get("lost"):
        lacks.append(f"{terminal.counted(lost, 'block')} lost files, or parts of them")
    left = f"not whole: {' and '.join(lacks)}; finish it with dump-logits --resume"
    terminal.sentence(left if lacks else f"whole: all {blocks['all']:,} blocks are there")


def print_comparison(report: dict, store: str) -> None:
    """What verify found: how far the store is from answers that were computed again, the worst classes, and the verdict.

    `report`: of `verify_cache`.
    """
    views, missing = report["views"], report["missing_blocks"]
    named = ", ".join(map(str, views[:8])) + ", …" * (len(views) > 8)
    block = report["worst_block"]
    place = f"view {block['view']}, rows {block['rows'][0]:,} to {block['rows'][1] - 1:,}"
    rows = [
        ["computed again", f"{terminal.counted(len(views), 'view')}: {named}"],
        ["mean error", f"{report['mean']:.2g} (total variation of the BKD target)"],
        ["by shot group", ", ".join(f"{group} {error:.2g}" for group, error in report["shots"].items())],
        ["worst block", f"{block['mean']:.2g}, of {place}; {report['tolerance']:.2g} is accepted"],
        ["largest error", f"{report['worst']:.2g}, of a sample under one view"],
    ]
    if report["features"]:
        distances = ", ".join(f"{name} {distance:.2g}" for name, distance in report["features"].items())
        rows.append(["features", f"{distances} (cosine distance)"])
    if missing:
        rows.append(["not dumped", f"{terminal.counted(missing, 'block')}, which were not compared"])
    terminal.table(rows, store, heading=False)
    worst = sorted(report["classes"].items(), key=lambda item: -item[1])[:WORST]
    terminal.table([["class", "mean error"], *([name, f"{error:.2g}"] for name, error in worst)], "the worst classes")
    print_verdict(report)


def print_verdict(report: dict) -> None:
    terminal.line("PASSED" if report["passed"] else "FAILED")


def print_checksums(report: dict, store: str) -> None:
    """What is wrong with a store's bytes, a line each, and the verdict. `report`: passed, blocks, problems."""
    terminal.sentence(store)
    for problem in report["problems"]:
        terminal.sentence(problem)
    if report["passed"]:
        terminal.line(f"PASSED, {terminal.counted(report['blocks'], 'block')}: every stored byte is as it was written")
    else:
        terminal.line(f"FAILED, {terminal.counted(len(report['problems']), 'problem')}")


def _teachers(teacher: dict) -> str:
    members = teacher.get("experts") or teacher.get("average_of")
    if members:
        return f"{len(members)} {'experts' if 'experts' in teacher else 'teachers, their average'}, {_short(teacher)}"
    # what describes a teacher is free, but for those that are trained here
    model, test = (part if isinstance(part, dict) else {} for part in (teacher.get("model"), teacher.get("test")))
    said = [part for part in (teacher.get("method"), model.get("name")) if part]
    if isinstance(test.get("top1"), int | float):
        said.append(f"{test['top1']:.1f} % of test images right")
    return ", ".join([_short(teacher), *map(str, said)])


def _short(teacher: dict) -> str:
    return f"teacher {str(teacher.get('digest', ''))[:8]}"


def _bytes(count: int) -> str:
    """In the unit that leaves one to three digits before the point."""
    power = min((len(str(count)) - 1) // 3, 4)
    return f"{count / 1000**power:,.{1 if power else 0}f} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"
