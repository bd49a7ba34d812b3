"""Throughput of extraction: share of the matrix-product rate, against ASTRA's way, over workers.

The model has a real shape and random weights, written once; pictures are random JPEG files. The
matrix-product rate is measured in the same run, on the same card and type. Floating-point
operations are counted on the modules that really ran, vision tower included. Every figure is
written as soon as it is known.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from spo.bench.shapes import write_shape
from spo.config import ExtractConfig
from spo.engines.base import CaptureRequest
from spo.errors import SpoError
from spo.records import Positions, Prompt, PromptKind, Side
from spo.stage1.activations import ContrastRow

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "shape": "llava-tiny",
        "dtype": "float32",
        "device": "cpu",
        "matrix": 512,
        "batches": [4, 8],
        "rows": 32,
        "single": 8,
        "ray_rows": 96,
        "block": 8,
        "picture": (48, 40),
    },
    "h200": {
        "shape": "llava-1.5-7b",
        "dtype": "bfloat16",
        "device": "cuda",
        "matrix": 8192,
        "batches": [32, 64],
        "rows": 384,
        "single": 40,
        "ray_rows": 5120,
        "block": 128,
        "picture": (500, 375),
    },
}


@dataclass(slots=True, kw_only=True)
class ExtractBench:
    """What was measured."""

    preset: str
    facts: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Results so far."""
        content = {
            "preset": self.preset,
            "facts": self.facts,
            "rows": self.rows,
            "skipped": self.skipped,
        }
        (folder / "results.json").write_text(json.dumps(content, indent=1))
        (folder / "table.md").write_text(self.table() + "\n")

    def table(self) -> str:
        """Markdown table."""
        lines = ["| what | prompts/s | TFLOP/s | of the matrix-product rate |", "|---|---|---|---|"]
        for row in self.rows:
            flops = f"{row['tflops']:.1f}" if "tflops" in row else ""
            share = f"{row['share']:.1%}" if "share" in row else ""
            lines.append(f"| {row['what']} | {row['rate']:.2f} | {flops} | {share} |")
        lines += ["", f"facts: {json.dumps(self.facts)}"]
        lines += [f"skipped: {text}" for text in self.skipped]
        return "\n".join(lines)


def run(
    preset: str,
    output: Path,
    *,
    time_limit: float,
    gpus: int = 1,
    say: Callable[[str], None] = print,
) -> ExtractBench:
    """Measure one preset.

    Args:
        preset: key of `PRESETS`.
        output: folder for results.json, table.md, the model and the pictures.
        time_limit: seconds after which nothing new is started.
        gpus: cards for the comparison over workers (with "tiny": CPU workers).
        say: receives progress lines.
    """
    deadline = time.monotonic() + time_limit
    sizes = PRESETS[preset]
    output.mkdir(parents=True, exist_ok=True)
    result = ExtractBench(preset=preset)
    model = _write_model(sizes, output / "model")
    result.facts["model_s"] = round(time_limit - (deadline - time.monotonic()), 1)
    prompts = _prompts(sizes, output / "pictures", max(sizes["rows"], 64))
    steps: list[tuple[str, Callable[[], None]]] = [
        ("engine", lambda: _measure_engine(sizes, model, prompts, result, output, deadline, say)),
        *(
            (f"{n} worker(s)", lambda n=n: _measure_ray(sizes, model, prompts, result, output, n))
            for n in (1, 2, 4, 8)
            if n <= max(gpus, 1)
        ),
    ]
    for name, step in steps:
        if time.monotonic() > deadline:
            result.skipped.append(f"{name}: time limit")
            continue
        try:
            step()
        except (SpoError, RuntimeError, OSError) as error:
            result.skipped.append(f"{name}: {type(error).__name__}: {error}")
        say(f"{time_limit - (deadline - time.monotonic()):6.1f} s  {name} done")
        result.write(output)
    shutil.rmtree(output / "model", ignore_errors=True)
    result.write(output)
    return result


def _write_model(sizes: dict[str, Any], folder: Path) -> str:
    """Shape, processor and random weights in hub layout."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    write_shape(sizes["shape"], folder)
    config = AutoConfig.from_pretrained(folder)
    dtype = getattr(torch, sizes["dtype"])
    with torch.device(sizes["device"]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    del model
    if sizes["device"] == "cuda":
        torch.cuda.empty_cache()
    return str(folder)


def _prompts(sizes: dict[str, Any], folder: Path, count: int) -> list[Prompt]:
    folder.mkdir(parents=True, exist_ok=True)
    width, height = sizes["picture"]
    rng = np.random.default_rng(0)
    made = []
    for i in range(count):
        path = folder / f"{i:05d}.jpg"
        if not path.is_file():
            # Smooth noise: a JPEG of a natural size in bytes, not the worst case for the decoder.
            small = rng.integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
            Image.fromarray(small).resize((width, height)).save(path, quality=90)
        words = "Describe what happens here in detail, please. " * int(rng.integers(1, 4))
        made.append(
            Prompt(prompt_id=f"bench-{i}", text=words, kind=PromptKind.BENIGN, image=str(path))
        )
    return made


def _matrix_rate(sizes: dict[str, Any]) -> float:
    """FLOP/s of one large square matrix product, the best of several."""
    size, device = sizes["matrix"], sizes["device"]
    dtype = getattr(torch, sizes["dtype"])
    a = torch.randn(size, size, dtype=dtype, device=device)
    b = torch.randn(size, size, dtype=dtype, device=device)
    best = 0.0
    for _ in range(6):
        _wait(device)
        begin = time.perf_counter()
        for _ in range(20):
            torch.matmul(a, b)
        _wait(device)
        best = max(best, 20 * 2 * size**3 / (time.perf_counter() - begin))
    return best


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _measure_engine(
    sizes: dict[str, Any],
    model: str,
    prompts: Sequence[Prompt],
    result: ExtractBench,
    output: Path,
    deadline: float,
    say: Callable[[str], None],
) -> None:
    from spo.engines.hf.engine import HfEngine

    device = sizes["device"]
    if device == "cuda":
        result.facts["device"] = torch.cuda.get_device_name()
    result.facts["torch"] = torch.__version__
    rate = _matrix_rate(sizes)
    result.facts["matrix_tflops"] = round(rate / 1e12, 2)
    engine = HfEngine(model, dtype=sizes["dtype"], device=device, compiled_capture=True)
    blocks = engine.info.num_layers
    _measure_parts(engine, prompts[: max(sizes["batches"])], result)
    for layers in (tuple(range(blocks)), tuple(range(blocks * 7 // 16 + 1))):
        for batch in sizes["batches"]:
            if time.monotonic() > deadline:
                result.skipped.append(f"batch {batch}: time limit")
                continue
            engine.batch_size = batch
            requests = [_request(p, layers) for p in prompts[: sizes["rows"]]]
            engine.capture(requests)  # compiles for every length that is timed
            flops = _flops(engine, requests[:batch]) / batch
            begin = time.perf_counter()
            engine.capture(requests)
            seconds = time.perf_counter() - begin
            speed = len(requests) / seconds
            result.rows.append(
                {
                    "what": f"extraction, blocks 0-{layers[-1]} of {blocks}, batch {batch}",
                    "rate": speed,
                    "tflops": speed * flops / 1e12,
                    "share": speed * flops / rate,
                }
            )
            say(json.dumps(result.rows[-1]))
            result.write(output)
    _measure_single(engine, prompts[: sizes["single"]], result)
    engine.close()
    del engine
    if device == "cuda":
        torch.cuda.empty_cache()


def _measure_parts(engine: Any, prompts: Sequence[Prompt], result: ExtractBench) -> None:
    """Milliseconds a prompt: one preparing thread, and the model alone, not compiled."""
    from spo.engines.hf.capture import preparers, read_pooled

    layers = tuple(range(engine.info.num_layers))
    requests = [_request(prompt, layers) for prompt in prompts]
    batch = engine.prepare(prompts)
    read_pooled(engine, batch, requests, layers)
    for name, part in (
        ("prepare_ms", lambda: engine.prepare(prompts)),
        ("model_ms", lambda: read_pooled(engine, batch, requests, layers)),
    ):
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            part()
            times.append(time.perf_counter() - begin)
        result.facts[name] = round(1000 * min(times) / len(prompts), 2)
    result.facts["preparers"] = preparers(engine.device)


def _request(prompt: Prompt, layers: tuple[int, ...]) -> CaptureRequest:
    return CaptureRequest(
        request_id=prompt.prompt_id, prompt=prompt, layers=layers, positions=Positions.LAST_PROMPT
    )


def _flops(engine: Any, requests: Sequence[CaptureRequest]) -> float:
    """Floating-point operations of one batch: matrix products and attention that really ran."""
    from torch.utils.flop_counter import FlopCounterMode

    # Counted without compilation: a block first seen under the counter would stay uncompiled.
    compiled, engine.compiled_capture = engine.compiled_capture, False
    with FlopCounterMode(display=False) as counter:
        engine.capture(requests)
    engine.compiled_capture = compiled
    return float(counter.get_total_flops())


def _measure_single(engine: Any, prompts: Sequence[Prompt], result: ExtractBench) -> None:
    """ASTRA's way: one image at a time, every hidden state returned, the whole model run."""
    times = []
    for prompt in prompts:
        begin = time.perf_counter()
        batch = engine.prepare([prompt])
        extras = dict(batch.extras)
        extras["pixel_values"] = extras["pixel_values"].to(engine.model.dtype)
        with torch.no_grad():
            output = engine.model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                output_hidden_states=True,
                use_cache=True,
                return_dict=True,
                **extras,
            )
        states = [state[:, -1].float().cpu() for state in output.hidden_states]
        assert len(states) > 1
        times.append(time.perf_counter() - begin)
    speed = 1.0 / float(np.median(times))
    result.rows.append(
        {"what": "ASTRA's way: one image at a time, all hidden states", "rate": speed}
    )
    fastest = max(r["rate"] for r in result.rows if r["what"].startswith("extraction"))
    result.facts["times_astra"] = round(fastest / speed, 2)


def _measure_ray(
    sizes: dict[str, Any],
    model: str,
    prompts: Sequence[Prompt],
    result: ExtractBench,
    output: Path,
    workers: int,
) -> None:
    """The whole job under Ray Data; the rate counts from the first written file to the last."""
    import ray

    from spo.stage1.extract import extract

    on_gpu = sizes["device"] == "cuda"
    if not ray.is_initialized():
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # a cluster of this process alone
        ray.init(address="local", num_cpus=max(4, 2 * workers), log_to_driver=False)
    rows = [
        ContrastRow(
            source="bench",
            side=Side.HARM if i % 2 else Side.SAFE,
            prompt=replace(prompts[i % len(prompts)], prompt_id=f"row-{i:06d}"),
            positions=Positions.LAST_PROMPT,
        )
        for i in range(sizes["ray_rows"])
    ]
    config = ExtractConfig(
        workers=workers,
        num_gpus=1.0 if on_gpu else 0.0,
        dtype=sizes["dtype"],
        batch_size=_best_batch(result, sizes),
        rows_per_block=sizes["block"],
        storage="bfloat16",
    )
    folder = output / f"ray-{workers}"
    shutil.rmtree(folder, ignore_errors=True)
    begin = time.perf_counter()
    extract(rows, folder, model=model, revision=None, config=config, digest="bench")
    seconds = time.perf_counter() - begin
    written = sorted(p.stat().st_mtime for p in (folder / "activations").glob("*.parquet"))
    # The first file of each worker stands for its start-up.
    steady = (len(written) - workers) * sizes["block"] / max(written[-1] - written[0], 1e-6)
    name = f"Ray Data, {workers} {'GPU' if on_gpu else 'CPU'} worker(s)"
    result.rows.append({"what": f"{name}, after start-up", "rate": steady})
    result.facts[f"ray_{workers}_whole_job_s"] = round(seconds, 1)
    one = next(r["rate"] for r in result.rows if "1 GPU w" in r["what"] or "1 CPU w" in r["what"])
    result.facts[f"ray_{workers}_times_one"] = round(steady / one, 2)
    shutil.rmtree(folder, ignore_errors=True)


def _best_batch(result: ExtractBench, sizes: dict[str, Any]) -> int:
    """The batch size that measured best."""
    found = [r for r in result.rows if r["what"].startswith("extraction")]
    if not found:
        return int(sizes["batches"][0])
    return int(max(found, key=lambda r: r.get("share", 0.0))["what"].rsplit(" ", 1)[1])
