"""Stands in for `experiments.train`: writes made-up metrics, resumes, saves on SIGINT.

  python fake_train.py CONFIG_JSON WORKDIR MODE

MODE says how it behaves: "" trains to the end; "fail" stops with an error after step 3,
the first time; "die" is killed there; "slow" takes a second a step; "short" ends well
but without its last evaluation.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from deepseek_jax.config import Config, from_dict
from tests.analysis import synthetic


def main(config_json: str, folder: str, mode: str) -> None:
    config, workdir = from_dict(Config, json.loads(config_json)), Path(folder)
    stopped = []
    signal.signal(signal.SIGINT, lambda *_: stopped.append(True))
    metrics = workdir / "metrics.jsonl"
    done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    with (workdir / "starts").open("a") as file:
        file.write(f"{done} cores={len(os.sched_getaffinity(0))}\n")
    saved = {"config": json.loads(config_json), "corpus": {"domains": []}}
    (workdir / "config.json").write_text(json.dumps(saved))
    records = synthetic.records(config)
    if mode == "short":
        records.pop()
    for record in records[done:]:
        if mode == "slow":
            time.sleep(1)
        with metrics.open("a") as file:
            file.write(json.dumps(record) + "\n")
        if record["step"] == 3 and done == 0 and mode == "fail":
            sys.exit("error: the disk is full")
        if record["step"] == 3 and done == 0 and mode == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if stopped:
            sys.exit(130)


if __name__ == "__main__":
    main(*sys.argv[1:])
