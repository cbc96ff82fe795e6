"""A run's folder: what it holds, how it is made, read and resumed.

    config.yaml            the resolved experiment
    environment.json       versions, commit, device, threads, command
    log.txt                what was printed
    metrics.jsonl          one object an epoch
    summary.json           scores of the last and the best epoch; its presence says that the run is complete
    last.safetensors       weights after the last epoch that ended
    best.safetensors       weights of the best evaluated epoch: by the validation part, or where there is none the test part
    state.safetensors      what resuming needs beside: optimiser, epoch; removed when the run is complete
    *.png                  curves, accuracy by class

Every file is written under another name, synchronised and renamed, so it is whole or absent; what is read again carries a
checksum (checksums.py).
"""

from offline_bkd.pipeline.runs.files import make_folder, read, read_json, reason, write_json, write_whole
from offline_bkd.pipeline.runs.folder import Run, experiment_of, open_run
from offline_bkd.pipeline.runs.record import commit, difference, environment, settings
from offline_bkd.pipeline.runs.start import begun, refuse_taken, start_run
from offline_bkd.pipeline.runs.weights import digest

__all__ = [
    "Run",
    "begun",
    "commit",
    "difference",
    "digest",
    "environment",
    "experiment_of",
    "make_folder",
    "open_run",
    "read",
    "read_json",
    "reason",
    "refuse_taken",
    "settings",
    "start_run",
    "write_json",
    "write_whole",
]
