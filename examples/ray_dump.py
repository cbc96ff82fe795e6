"""Dump a teacher's answers with Ray (pip install ray): a task for each part, on any number of machines that share a folder.

All of them need this package too; of several, give absolute paths.

    python examples/ray_dump.py configs/digits.yaml runs/digits/teacher-0 runs/digits/by-ray.zarr [KEY=VALUE …]

Where a worker dies, Ray gives its task to another, which writes what is missing. Given again, the command goes on.
"""

import sys

import ray

from offline_bkd import open_cache

PARTS = 64  # several times the number of workers, so that all of them are busy until the end


@ray.remote(max_retries=10)
def write(config: str, teacher: str, out: str, overrides: list[str], blocks: list[tuple[int, int]]) -> None:
    from offline_bkd.pipeline.config import load_config
    from offline_bkd.pipeline.device import choose_device
    from offline_bkd.pipeline.dump import dump_logits

    dump_logits(load_config(config, overrides), [teacher], out, choose_device("auto"), blocks=blocks)


def main(config: str, teacher: str, out: str, *overrides: str) -> None:
    ray.init()
    task = write.options(num_gpus=1 if ray.cluster_resources().get("GPU") else 0)
    ray.get(task.remote(config, teacher, out, overrides, []))  # creates the store
    left = [part for part in open_cache(out).parts(PARTS) if part]
    ray.get([task.remote(config, teacher, out, overrides, part) for part in left])
    print(f"{out}: complete" if open_cache(out).complete else f"{out}: not complete; give the command again")


if __name__ == "__main__":
    main(*sys.argv[1:])
