"""Every test runs in its own empty folder, offline, and away from the user's caches."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from gmem_bank import keys as key_tables
from gmem_bank import segments
from gmem_bank.bank import MemoryBank
from gmem_bank.bank import open as open_bank
from gmem_bank.provenance import EncoderSpec, Source
from gmem_bank.space import to_space
from gmem_bank.storage import Payload, write
from gmem_bank.storage.schema import Header, Segment

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
    """Return a function that writes a synthetic dense bank and opens it."""

    def make(
        name: str = "bank.safetensors",
        *,
        rows: int = 20,
        dim: int = 8,
        dtype: str = "f32",
        space: str = "unit",
        seed: int = 0,
        parts: tuple[int, ...] | None = None,
        active: np.ndarray | None = None,
        snippets: np.ndarray | None = None,
        keys: list[str] | None = None,
    ) -> MemoryBank:
        values = (
            snippets
            if snippets is not None
            else np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)
        )
        values = to_space(values, space)
        keys = keys or [f"class{row % 3}/{row:03d}.png" for row in range(len(values))]
        counts = parts or (len(values),)
        payloads: dict[str, Payload] = {}
        start = 0
        for index, count in enumerate(counts):
            block = values[start : start + count]
            stored = segments.snippet_payload(lambda block=block: [block], count, values.shape[1], dtype)
            payloads |= segments.segment_payloads(
                str(index), key_tables.encode(keys[start : start + count]), np.zeros(count, np.int64), stored
            )
            start += count
        concepts = segments.concepts_of_folders(keys)
        payloads |= segments.key_table_payloads(*key_tables.sorted_table(key_tables.hashes_of(keys)))
        payloads |= segments.concept_payloads(concepts)
        if active is not None:
            payloads["active"] = Payload.of(np.asarray(active, np.bool_))
        header = Header(
            kind="dense",
            space=space,
            dim=values.shape[1],
            segments=tuple(Segment(name=str(i), num_rows=c) for i, c in enumerate(counts)),
            encoder=EncoderSpec(name="made-up", family="made-up", dim=values.shape[1], space=space),
            sources=(Source(kind="folder", path="."),),
            concepts=tuple(concepts),
            history=({"operation": "build", "arguments": {}, "num_rows": len(values)},),
        )
        write(tmp_path / name, header, payloads)
        return open_bank(tmp_path / name)

    return make


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
