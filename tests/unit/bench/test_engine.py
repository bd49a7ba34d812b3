"""The benchmark's parent: turns, shares, failures, the clock. Its engines are small scripts here;
`python -m jobs.bench engine --preset tiny` runs the same with real ones."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import psutil
import pytest

from spo.bench import engine as bench
from spo.bench import engine_process as bench_process
from spo.bench.engine_table import BenchResult, Measure, Workload
from spo.errors import EngineError

CHILD = """
import json, os, sys
for line in sys.stdin:
    message = json.loads(line)
    if "start" in message:
        settings = message["start"]
        if settings["engine"] == FAILS:
            sys.exit("no room on the card")
        answer = {"start_seconds": 1.0}
    elif "facts" in message:
        answer = {"cache": os.environ["VLLM_CACHE_ROOT"]}
        if settings.get("weights"):
            answer["mixed_batch"] = {"largest gap": GAP, "least effect of steering": 1.0}
            answer["parity"] = {"none": {"mean gap": 9, "mean effect": 0},
                                "add": {"mean gap": GAP, "mean effect": 1.0}}
    elif "measure" in message:
        asked = message["measure"]
        speed = {"none": 100, "idle": 100}.get(asked["steering"], 98)
        answer = {"seconds": 1.0, "tokens": speed * asked["batch"]}
    elif "logprobs" in message:
        shift = 0.0 if settings["tensor_parallel"] == 1 else 1e-3
        answer = {"none": [shift - 1.0], "add": [shift - 2.0]}
    else:
        answer = {"graphs": {"FULL": 1}}
    print("vLLM says something")
    print("@" + json.dumps(answer), flush=True)
"""


@pytest.fixture
def run(monkeypatch, tmp_path):
    def run(preset="tiny", *, fails="nobody", gap=0.01, **options):
        script = CHILD.replace("FAILS", repr(fails)).replace("GAP", str(gap))
        monkeypatch.setattr(bench_process, "COMMAND", (sys.executable, "-c", script))
        monkeypatch.setattr(bench, "visible_cards", lambda: ["0", "1"])
        lines = []
        options = {"time_limit": 60.0, "repeats": 2, **options}
        return bench.run(preset, tmp_path, say=lines.append, **options), lines

    return run


def test_every_workload_is_measured_beside_plain_vllm(run, tmp_path):
    result, lines = run()
    assert not result.failures
    shares = result.shares()
    names = [f"kernel: {name}" for name in ("idle", *bench.STEERINGS)]
    assert {key[2] for key in shares} == set(names)
    assert shares["qwen2.5-vl-tiny", 8, "kernel: add"] == [0.98] * 2
    assert shares["qwen2.5-vl-tiny", 1, "kernel: idle"] == [1.0] * 4
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["facts"]["qwen2.5-vl-tiny kernel"]["after"] == {"graphs": {"FULL": 1}}
    caches = {facts["cache"] for facts in written["facts"].values()}
    assert len(caches) == len(written["facts"]) == 3
    table = (tmp_path / "table.md").read_text()
    assert "| qwen2.5-vl-tiny | 8 | 800 |" in table
    assert "98.0% [98.0%, 98.0%] n=2" in table
    assert any("turn 1.0" in line for line in lines)


def test_a_lost_engine_is_named_and_the_others_are_measured(run, tmp_path):
    result, _ = run(fails="kernel", engines=["plain", "kernel", "traced"])
    assert [failure for failure in result.failures if "kernel" in failure and "died" in failure]
    assert {key[2] for key in result.shares()} == {
        f"traced: {name}" for name in ("idle", *bench.STEERINGS)
    }
    assert "FAILED" in (tmp_path / "table.md").read_text()


def test_an_engine_that_steers_wrongly_is_not_passed_over(run):
    result, _ = run(gap=0.6)
    assert [f for f in result.failures if "mixed batch unlike solo runs" in f]
    assert [f for f in result.failures if "add unlike Transformers" in f]


def test_tensor_parallel_ranks_are_compared(run):
    result, _ = run("tiny-tp2")
    (row,) = result.ranks.values()
    assert row["add"]["largest gap"] == pytest.approx(1e-3)
    assert row["add"]["mean effect of steering"] == pytest.approx(1.0)


def test_the_time_limit_ends_measuring_and_keeps_what_there_is(run):
    begin = time.monotonic()
    result, _ = run(time_limit=21.5, repeats=10_000)
    assert time.monotonic() - begin < 20
    assert result.measures


def test_nothing_starts_where_the_plugin_is_not_installed(run, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    with pytest.raises(EngineError, match="VLLM_PLUGINS"):
        run()


def test_shares_pair_runs_of_one_turn():
    def measure(engine, turn, tokens):
        workload = Workload(engine=engine, batch=1, steering="none" if engine == "plain" else "add")
        return Measure(model="m", workload=workload, turn=turn, seconds=1.0, tokens=tokens)

    result = BenchResult(preset="tiny")
    result.measures = [
        measure("plain", "0", 100),
        measure("kernel", "0", 90),
        measure("plain", "1", 200),
        measure("kernel", "1", 198),
        measure("kernel", "2", 7),
    ]
    assert result.shares() == {("m", 1, "kernel: add"): [0.9, 0.99]}
    assert "94.5% [90.0%, 99.0%] n=2" in result.table()


def test_a_stopped_engine_leaves_no_process_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's workers are children of the engine's process, and a killed one does not end them."""
    program = (
        "import json, signal, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'])\n"
        "print('@' + json.dumps({'pid': child.pid}), flush=True)\n"
        "time.sleep(300)\n"
    )
    monkeypatch.setattr(bench_process, "COMMAND", (sys.executable, "-c", program))
    engine = bench_process.EngineProcess({"shape": "s", "engine": "e"}, tmp_path / "log", {})
    child = psutil.Process(engine.receive(60)["pid"])
    assert child.is_running()
    engine.stop()
    psutil.wait_procs([child], timeout=20)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
