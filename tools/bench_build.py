"""How fast a bank is built, beside a plain loop over the same steps in the same run, as JSON.

python -m tools.bench_build [--images 3000] [--encoder-images 1024] [--memory-images 2000 20000] [--runs 3] [--encoder-runs 1]
    [--photos DIR]

decode: no encoder, JPEG to crop, the workers' start included; the peer decodes one image after the other in this process. What
    two such loops at once reach in two processes is the most that two cores can; CPU time says the same where others take turns.
encode: a ViT-S/14 with random weights; the peers are its bare forward, and a plain fp32 loop of decoding and forward.
memory: the peak of whole builds of two sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import gmem_bank
from gmem_bank.decode_pool import DecodePool, default_workers
from gmem_bank.decode_worker import decode_one
from gmem_bank.encoders.preprocess import gmem_preprocessing
from gmem_bank.listing import Item
from gmem_bank.sources import list_folder

BATCH = 32
SIZE = (500, 375)
PHOTOS = Path(__file__).parents[1] / "tests" / "data" / "photos"
LOOP = """
import sys
from pathlib import Path
from gmem_bank.decode_worker import decode_one
from gmem_bank.encoders.preprocess import gmem_preprocessing
from gmem_bank.sources import list_folder
items, record = list_folder(sys.argv[1]).items[int(sys.argv[2])::2], gmem_preprocessing()
decode_one(items[0], record)
print("ready", flush=True)
sys.stdin.readline()
for item in items:
    decode_one(item, record)
print("done", flush=True)
"""
"""Every second image, after a line on stdin."""
PROGRAM = """
import pathlib, re, resource, sys
import gmem_bank
gmem_bank.build(sys.argv[1], gmem_bank.load_encoder("pixels"), sys.argv[2])
print(re.search(r"VmHWM:\\s*(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def make_images(folder: Path, count: int, photos: Path, distinct: int = 1000) -> list[Item]:
    """Write JPEGs of 500×375 pixels, cuts of real photos, and list them; the first ones come again under other names."""
    pictures = [Image.open(path).convert("RGB").resize((640, 480)) for path in sorted(photos.rglob("*.jpg"))[:24]]
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for number in range(min(count, distinct)):
        left, top = rng.integers(0, 640 - SIZE[0]), rng.integers(0, 480 - SIZE[1])
        cut = pictures[number % len(pictures)].crop((left, top, left + SIZE[0], top + SIZE[1]))
        cut.save(folder / f"{number:06d}.jpg", quality=90)
    for number in range(distinct, count):
        (folder / f"{number:06d}.jpg").hardlink_to(folder / f"{number % distinct:06d}.jpg")
    return list(list_folder(folder).items)


def two_loops(folder: Path) -> float:
    """Return the seconds that two processes at once take for half of the images each, their start not counted."""
    command = [sys.executable, "-c", LOOP, str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    loops = [subprocess.Popen([*command, str(part)], **pipes) for part in range(2)]  # type: ignore[call-overload]
    for loop in loops:
        loop.stdout.readline()
    started = time.perf_counter()
    for loop in loops:
        loop.stdin.write("go\n")
        loop.stdin.flush()
    for loop in loops:
        loop.stdout.readline()
    taken = time.perf_counter() - started
    for loop in loops:
        loop.communicate()
    return taken


def cpu_seconds() -> float:
    """Return the CPU time of this process and of those that it has seen the end of."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def seconds(work: Callable[..., Any], *arguments: Any) -> float:
    """Return the wall time of a call."""
    started = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - started


def cut(items: Sequence[Item]) -> list[Sequence[Item]]:
    """Return batches."""
    return [items[start : start + BATCH] for start in range(0, len(items), BATCH)]


def decode(items: list[Item], runs: int) -> dict[str, Any]:
    """Decode and crop, nothing else."""
    record = gmem_preprocessing()

    def pooled() -> None:
        with DecodePool(record, default_workers()) as pool:
            for _ in pool.batches(cut(items)):
                pass

    def plain() -> None:
        for item in items:
            decode_one(item, record)

    times: dict[str, list[float]] = {"plain loop": [], "pool": [], "two loops at once": []}
    cpu: dict[str, list[float]] = {"plain loop": [], "pool": []}
    for _ in range(runs):
        for name, work in (("plain loop", plain), ("pool", pooled)):
            before = cpu_seconds()
            times[name].append(seconds(work))
            cpu[name].append(cpu_seconds() - before)
        times["two loops at once"].append(two_loops(items[0].path.parent))
    against = lambda name, others: round(  # noqa: E731
        statistics.median(p / o for o, p in zip(others[name], others["plain loop"], strict=True)), 3
    )
    return {
        "images": len(items),
        "workers": default_workers(),
        "images_per_second": {name: round(len(items) / statistics.median(t), 1) for name, t in times.items()},
        "times_plain_loop": against("pool", times),
        "two_loops_times_plain_loop": against("two loops at once", times),
        "cpu_milliseconds_an_image": {
            name: round(1000 * statistics.median(t) / len(items), 3) for name, t in cpu.items()
        },
        "times_plain_loop_by_cpu_time": round(default_workers() * against("pool", cpu), 3),
    }


def encode(folder: Path, items: list[Item], runs: int) -> dict[str, Any]:
    """Build with a ViT-S/14: of all images in what `auto` takes, of half of them in fp32; the peers do a quarter."""
    import torch
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14)
    Dinov2Model(config).save_pretrained(folder / "vits")
    load = lambda dtype: gmem_bank.load_encoder("dinov2-small", weights=folder / "vits", parameters={"dtype": dtype})  # noqa: E731
    encoders = {"fp32": load("fp32"), "auto": load("auto")}
    counts = {"auto": len(items), "fp32": len(items) // 2, "peers": max(BATCH, len(items) // 4 // BATCH * BATCH)}
    record = gmem_preprocessing()
    crops = np.stack([decode_one(item, record)[1] for item in items[:BATCH]])
    cosine = encoders["auto"].cosine_to_fp32(crops)
    rates: dict[str, list[float]] = {}

    def measure(name: str, count: int, work: Callable[..., Any], *arguments: Any) -> None:
        rates.setdefault(name, []).append(count / seconds(work, *arguments))

    def forwards(encoder: Any) -> None:
        for _ in range(counts["peers"] // BATCH):
            encoder.encode(crops)

    def build(name: str, run: int) -> None:
        only = gmem_bank.Narrowing(limit=counts[name])
        target = folder / f"{name}-{run}.safetensors"
        gmem_bank.build(items[0].path.parent, encoders[name], target, batch_size=BATCH, narrowing=only)

    def loop() -> None:
        for own in cut(items[: counts["peers"]]):
            encoders["fp32"].encode(np.stack([decode_one(item, record)[1] for item in own]))

    for run in range(runs):
        for name in ("fp32", "auto"):
            measure(f"bare forward {name}", counts["peers"], forwards, encoders[name])
            measure(f"build {name}", counts[name], build, name, run)
        measure("plain fp32 loop", counts["peers"], loop)
    over = lambda a, b: round(statistics.median(x / y for x, y in zip(rates[a], rates[b], strict=True)), 3)  # noqa: E731
    return {
        "images": counts,
        "auto_is": encoders["auto"].spec.parameters["dtype"],
        "mean_cosine_to_fp32": round(cosine, 6),
        "images_per_second": {name: round(statistics.median(found), 2) for name, found in rates.items()},
        "build_over_bare_forward": {name: over(f"build {name}", f"bare forward {name}") for name in encoders},
        "build_auto_times_plain_fp32_loop": over("build auto", "plain fp32 loop"),
    }


def memory(folder: Path, counts: Sequence[int], photos: Path) -> dict[str, dict[str, float]]:
    """Return the peak memory in MB of builds of these sizes: of the program that builds, and of its largest worker."""
    peaks = {}
    for count in counts:
        make_images(folder / str(count), count, photos)
        command = [sys.executable, "-c", PROGRAM, str(folder / str(count)), str(folder / f"{count}.safetensors")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        own, worker = (round(int(line) / 1024, 1) for line in done.stdout.split())
        peaks[str(count)] = {"program": own, "worker": worker}
        shutil.rmtree(folder / str(count))
    return peaks


def main() -> int:
    """Measure all, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--encoder-images", type=int, default=1024)
    parser.add_argument("--memory-images", type=int, nargs="*", default=[2000, 20000])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--encoder-runs", type=int, default=1)
    parser.add_argument("--photos", type=Path, default=PHOTOS)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        result: dict[str, Any] = {}
        if given.images:
            result["decode"] = decode(make_images(folder / "decode", given.images, given.photos), given.runs)
        if given.encoder_images:
            result["encode"] = encode(
                folder, make_images(folder / "encode", given.encoder_images, given.photos), given.encoder_runs
            )
        if given.memory_images:
            result["peak_megabytes"] = memory(folder, given.memory_images, given.photos)
    finally:
        shutil.rmtree(folder)
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
