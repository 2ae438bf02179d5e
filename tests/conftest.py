"""Every test runs in its own empty folder, offline, and away from the user's caches."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from gmem_bank import factors, segments
from gmem_bank import keys as key_tables
from gmem_bank.bank import MemoryBank
from gmem_bank.kinds import open as open_bank
from gmem_bank.provenance import EncoderSpec, Source
from gmem_bank.space import to_space
from gmem_bank.storage import Payload, write
from gmem_bank.storage.schema import Header, Segment
from gmem_bank.vectors import coefficient_payloads

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # as for a background job; programs that tests start would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

if "PYTEST_XDIST_WORKER" in os.environ:
    # the processes share the cores: two that take them all slow one another; set before torch and FAISS are imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

DATA = Path(__file__).parent / "data"
SHARED = Path(__file__).parents[2] / "shared"
"""Reference vectors and images beside the checkout, where there are any; fixtures in DATA stand in for them."""

settings.register_profile(
    "default", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("default")


@pytest.fixture(scope="session", autouse=True)
def hub_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep the hub client, which reads its environment once, offline and away from the user's cache."""
    home = tmp_path_factory.mktemp("hf-home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(home))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield home


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with three class folders of eight real photos each."""
    return Path(shutil.copytree(DATA / "photos", tmp_path / "photos"))


@pytest.fixture
def new_photos(tmp_path: Path) -> Path:
    """A folder `images` with eight real photos of a fourth class."""
    return Path(shutil.copytree(DATA / "new_photos" / "images", tmp_path / "images"))


BankMaker = Callable[..., MemoryBank]


@pytest.fixture
def make_bank(tmp_path: Path) -> BankMaker:
    """Return a function that writes a synthetic bank of any kind, in any form, and opens it."""

    def make(name: str = "bank.safetensors", **options: object) -> MemoryBank:
        return synthetic_bank(tmp_path / name, **options)

    return make


def synthetic_bank(
    path: Path,
    *,
    rows: int = 20,
    dim: int = 8,
    kind: str = "dense",
    dtype: str = "f32",
    rank: int = 4,
    space: str = "unit",
    seed: int = 0,
    parts: tuple[int, ...] | None = None,
    active: np.ndarray | None = None,
    snippets: np.ndarray | None = None,
    keys: list[str] | None = None,
    prefix: str = "",
    encoder: str = "made-up",
) -> MemoryBank:
    """Write a bank: kind "dense", "factored" or "sparse" (factored, half of the coefficients kept)."""
    rng = np.random.default_rng(seed)
    values = snippets if snippets is not None else rng.standard_normal((rows, dim)).astype(np.float32)
    values = to_space(values, space)
    keys = keys or [f"{prefix}class{row % 3}/{row:03d}.png" for row in range(len(values))]
    counts = parts or (len(values),)
    payloads: dict[str, Payload] = {}
    mean = values.mean(axis=0)
    basis = np.linalg.svd(values - mean, full_matrices=False)[2][:rank].astype(np.float32)
    if kind != "dense":
        payloads |= {"basis": Payload.of(basis), "mean": Payload.of(mean)}
    start = 0
    for index, count in enumerate(counts):
        block = values[start : start + count]
        own = keys[start : start + count]
        vectors = vectors_of(block, kind, dtype, basis, mean)
        payloads |= {f"{index}/{what}": payload for what, payload in vectors.items()}
        text, offsets = key_tables.encode(own)
        payloads |= {f"{index}/keys.bytes": Payload.of(text), f"{index}/keys.offsets": Payload.of(offsets)}
        payloads[f"{index}/source"] = Payload.of(np.zeros(count, np.uint32))
        start += count
    concepts = segments.concepts_of_folders(keys)
    payloads |= segments.key_table_payloads(*key_tables.sorted_table(key_tables.hashes_of(keys)))
    payloads |= segments.concept_payloads(concepts)
    if active is not None:
        payloads["active"] = Payload.of(np.asarray(active, np.bool_))
    header = Header(
        kind="dense" if kind == "dense" else "factored",
        space=space,
        dim=values.shape[1],
        segments=tuple(Segment(name=str(i), num_rows=c) for i, c in enumerate(counts)),
        encoder=EncoderSpec(name=encoder, family=encoder, dim=values.shape[1], space=space),
        sources=(Source(kind="folder", path="."),),
        concepts=tuple(concepts),
        history=({"operation": "build", "arguments": {}, "num_rows": len(values)},),
    )
    write(path, header, payloads)
    return open_bank(path)


def vectors_of(block: np.ndarray, kind: str, dtype: str, basis: np.ndarray, mean: np.ndarray) -> dict[str, Payload]:
    """The vector entries of one segment."""
    if kind == "dense":
        return {"snippets": segments.snippet_payload(lambda: [block], len(block), block.shape[1], dtype)}
    coefficients = factors.project(block, basis, mean)
    if kind == "factored":
        return coefficient_payloads(coefficients, dtype)
    order = np.argsort(-np.abs(coefficients), axis=1)[:, : max(1, len(basis) // 2)]
    kept = np.take_along_axis(coefficients, order, axis=1)
    index = {"index": Payload.of(order.astype(np.uint16))}
    if dtype == "i8":
        whole, scale = factors.quantise(coefficients)
        values = Payload.of(np.take_along_axis(whole, order, axis=1))
        return {"values": values, "scale": Payload.of(scale), **index}
    stored = {"f32": "F32", "f16": "F16"}[dtype]
    return {"values": Payload.of(segments.narrow(kept, stored), stored), **index}


def stored_oracle(bank: MemoryBank) -> np.ndarray:
    """All (N, D) snippets of a bank in float64, from its entries by the words of docs/FORMAT.md, sharing no code with it."""
    stored, blocks = bank.stored, []
    for segment in bank.header.segments:
        get = lambda what, s=segment: np.array(stored.array(f"{s.name}/{what}"))  # noqa: E731
        has = lambda what, s=segment: f"{s.name}/{what}" in stored  # noqa: E731
        if has("snippets"):
            raw = get("snippets")
            if raw.dtype == np.uint16:
                raw = (raw.astype(np.uint32) << 16).view(np.float32)
            rows = raw.astype(np.float64)
            blocks.append(rows if stored.dtype(f"{segment.name}/snippets") == "F32" else normalised(rows, bank.space))
            continue
        basis, mean = np.array(stored.array("basis"), np.float64), np.array(stored.array("mean"), np.float64)
        coefficients = np.zeros((segment.num_rows, len(basis)))
        if has("values"):
            values, index = get("values").astype(np.float64), get("index")
            for row in range(segment.num_rows):
                for value, column in zip(values[row], index[row], strict=True):
                    coefficients[row, column] += value * (get("scale")[column] if has("scale") else 1.0)
        else:
            values = get("coefficients").astype(np.float64) * (get("scale") if has("scale") else 1.0)
            coefficients[:, : values.shape[1]] = values
        blocks.append(normalised(coefficients @ basis + mean, bank.space))
    return np.concatenate(blocks)


def normalised(rows: np.ndarray, space: str) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True) if space == "unit" else rows


@pytest.fixture
def hf_cache(hub_home: Path) -> Iterator[Path]:
    """A hub cache that holds a small random DINOv2 as facebook/dinov2-base; gives the snapshot's folder."""
    yield make_hub_cache(hub_home)
    shutil.rmtree(hub_home / "hub")


def make_hub_cache(home: Path, repository: str = "facebook/dinov2-base") -> Path:
    """Write a tiny random DINOv2 into a hub cache as if it had been downloaded."""
    import torch
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    root = home / "hub" / ("models--" + repository.replace("/", "--"))
    snapshot = root / "snapshots" / ("0" * 40)
    Dinov2Model(config).save_pretrained(snapshot)
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("0" * 40)
    return snapshot
