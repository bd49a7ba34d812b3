"""Extraction on a real two-node cluster: kill driver, worker, node; every id is there once.

One cluster for all tests; the driver that dies is a process of its own on the same cluster.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from spo.config import ExtractConfig
from spo.records import Positions, Prompt, PromptFormat, PromptKind, Side
from spo.stage1.activations import (
    CALIBRATION,
    ContrastRow,
    load_activations,
    row_from_json,
    row_to_json,
)
from spo.stage1.extract import extract
from tests.waiting import wait_for

pytestmark = pytest.mark.ray
ROWS = 96
CONFIG = ExtractConfig(
    workers=2, rows_per_block=4, batch_size=4, dtype="float32", stall_timeout_s=240
)
DRIVER = """
import json, sys
from pathlib import Path
import ray
from tests.faults.test_extraction import CONFIG, rows
from spo.stage1.extract import extract
ray.init(address=sys.argv[1], log_to_driver=False)
extract(rows(), Path(sys.argv[2]), model=sys.argv[3], revision=None, config=CONFIG, digest="d")
"""


def rows() -> list[ContrastRow]:
    made = []
    for i in range(ROWS):
        calibration = i >= ROWS - 8
        prompt = Prompt(
            prompt_id=f"row-{i:03d}",
            text=f"some words of row {i} " * (1 + i % 5),
            kind=PromptKind.BENIGN,
            format=PromptFormat.PLAIN,
        )
        made.append(
            ContrastRow(
                source=CALIBRATION if calibration else "s",
                side=Side.HARM if i % 2 and not calibration else Side.SAFE,
                prompt=prompt,
                positions=Positions.GENERATED if calibration else Positions.TEXT,
            )
        )
    return made


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    import ray
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    spare = made.add_node(num_cpus=2)
    ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False
    made.spare = spare
    yield made
    ray.shutdown()
    made.shutdown()


def committed(folder: Path) -> int:
    marks = (folder / "checkpoint").glob("*.parquet")
    return sum(not p.name.endswith(".pending.parquet") for p in marks)


def check_complete(folder: Path) -> None:
    """Every id exactly once, nothing set aside, and the folder can be read."""
    ids = Counter()
    for path in (folder / "activations").glob("*.parquet"):
        ids.update(pq.read_table(path, columns=["row_id"])["row_id"].to_pylist())
    assert ids == Counter(row.prompt.prompt_id for row in rows())
    found = load_activations(folder, {})
    assert found.quarantined == ()
    assert sum(len(block.ids) for block in found.contrasts[0].blocks()) == ROWS - 8


def test_rows_travel() -> None:
    assert row_from_json(row_to_json(rows()[0])) == rows()[0]


def test_a_killed_driver_loses_only_the_blocks_in_work(
    cluster: Any, tiny_llava: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "activations"
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, cluster.address, str(folder), str(tiny_llava)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    try:
        wait_for(lambda: committed(folder) >= 4 or driver.poll() is not None, "four blocks")
        assert driver.poll() is None
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait(30)
    assert not (folder / "manifest.json").exists()
    assert json.loads((folder / "extraction.json").read_text())["digest"] == "d"
    files = sorted((folder / "activations").glob("*.parquet"), key=lambda p: p.stat().st_mtime)
    files[0].write_bytes(files[0].read_bytes()[:-30])  # and the disk lost the end of a file
    kept = {path: path.stat().st_mtime_ns for path in files[1:3]}
    extract(rows(), folder, model=str(tiny_llava), revision=None, config=CONFIG, digest="d")
    check_complete(folder)
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    # A finished folder that loses a file is mended by the same command, not served with a hole.
    files[1].unlink()
    extract(rows(), folder, model=str(tiny_llava), revision=None, config=CONFIG, digest="d")
    check_complete(folder)


def during_extraction(folder: Path, act: Callable[[], None], model: Path) -> None:
    """Run an extraction and `act` once two blocks are committed."""
    failures: list[BaseException] = []

    def wait_and_act() -> None:
        try:
            wait_for(lambda: committed(folder) >= 2, "two blocks")
            assert not (folder / "manifest.json").exists()
            act()
        except BaseException as error:  # noqa: BLE001 shown by the test itself
            failures.append(error)

    thread = threading.Thread(target=wait_and_act)
    thread.start()
    extract(rows(), folder, model=str(model), revision=None, config=CONFIG, digest="d")
    thread.join(60)
    assert failures == []


def test_a_killed_worker_is_replaced(cluster: Any, tiny_llava: Path, tmp_path: Path) -> None:
    killed = []

    def kill_worker() -> None:
        for node in cluster.list_all_nodes():
            for raylet in node.all_processes["raylet"]:
                for child in psutil.Process(raylet.process.pid).children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        if not killed and "ActivationExtractor" in " ".join(child.cmdline()):
                            child.kill()
                            killed.append(child.pid)
        assert killed

    during_extraction(tmp_path / "a", kill_worker, tiny_llava)
    check_complete(tmp_path / "a")


@pytest.mark.long
def test_a_lost_node_is_survived(cluster: Any, tiny_llava: Path, tmp_path: Path) -> None:
    during_extraction(
        tmp_path / "a", lambda: cluster.remove_node(cluster.spare, allow_graceful=False), tiny_llava
    )
    check_complete(tmp_path / "a")
