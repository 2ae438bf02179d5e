"""Damaged and hostile bank files: a clear error or the same bank; never a crash, a hang, another exception or wrong data.

Cases run in a process of their own, a chunk at a time, so that a crash of the HDF5 library is a failure that names its case.
Every case follows from its form and number alone: `python -m tests.test_corruption FOLDER FORM NUMBER` runs one again.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import gmem_bank
from gmem_bank.bank import MemoryBank
from gmem_bank.errors import FormatError, GMemError
from gmem_bank.storage import open_stored
from gmem_bank.verifier import verify
from tests.conftest import BankMaker, stored_oracle, synthetic_bank

ROOT = Path(__file__).parents[1]
KINDS = (
    ("dense", "f32", "unit"), ("dense", "f16", "unit"), ("dense", "bf16", "raw"),
    ("factored", "f32", "unit"), ("factored", "f16", "raw"), ("factored", "i8", "unit"),
    ("sparse", "f32", "raw"), ("sparse", "f16", "unit"), ("sparse", "i8", "unit"),
)  # fmt: skip
FORMS = ("safetensors", "h5", "gmem")
CHUNK = 1000
CHUNK_SECONDS = 100
MEMORY = 3 << 30
"""Address space of a worker: a size read from a damaged file must not become an allocation."""
KEYS = [f"class{row % 3}/{'🐟' * (row % 2)}{row:03d}.png" for row in range(20)]
ACTIVE = np.array([row not in (3, 14) for row in range(20)])


def make_banks(folder: Path, form: str) -> list[Path]:
    """Write one intact bank of each kind."""
    return [
        synthetic_bank(
            folder / f"{kind}-{dtype}.{form}", kind=kind, dtype=dtype, space=space, parts=(12, 8), active=ACTIVE,
            keys=KEYS, seed=number,
        ).path
        for number, (kind, dtype, space) in enumerate(KINDS)
    ]  # fmt: skip


# -- what a bank holds

READS: dict[str, Callable[[MemoryBank], Any]] = {
    "keys": lambda bank: bank.keys(np.arange(len(bank))),
    "rows": lambda bank: bank.rows().tolist(),
    "concepts": lambda bank: {name: bank.all_rows_of(name).tolist() for name in bank.names},
    "active concepts": lambda bank: {name: bank.rows_of(name).tolist() for name in bank.names},
    "sizes": lambda bank: bank.concept_sizes(),
    "found": lambda bank: bank.find_rows([*KEYS, "unknown"]).tolist(),
    "sources": lambda bank: bank.source_ids(np.arange(len(bank))).tolist(),
    "image rows": lambda bank: bank.image_rows().tolist(),
    "snippets": lambda bank: bank.snippets(bank.rows()).tobytes(),
    "coefficients": lambda bank: bank.coefficients(bank.rows()).tobytes() if hasattr(bank, "basis") else None,
    "inv_norms": lambda bank: bank.inv_norms(bank.rows()).tobytes() if hasattr(bank, "basis") else None,
    "header": lambda bank: (bank.header.to_json(), bank.dim, len(bank), bank.space, bank.fingerprint),
}


def truth_of(path: Path) -> dict[str, Any]:
    """What the intact bank holds, held against what it was made of and against its entries read another way."""
    bank = gmem_bank.open(path)
    truth = {name: read(bank) for name, read in READS.items()}
    assert truth["keys"] == KEYS
    assert truth["rows"] == np.flatnonzero(ACTIVE).tolist()
    assert truth["concepts"] == {f"class{c}": list(range(c, 20, 3)) for c in range(3)}
    assert truth["found"] == [*range(20), -1]
    snippets = np.frombuffer(truth["snippets"], np.float32).reshape(-1, bank.dim)
    np.testing.assert_allclose(snippets, stored_oracle(bank)[ACTIVE], atol=1e-6)
    assert verify(path).ok
    return truth


def judge(path: Path, truth: dict[str, Any], signed: bool) -> str:
    """Open, verify and read a file; return "refused", "found" or "same", or raise AssertionError or what came through.

    Args:
        path: the file.
        truth: what the intact bank holds.
        signed: the hashes were made to fit, so that another content would be no damage.
    """
    try:
        bank = gmem_bank.open(path)
    except GMemError as error:
        assert str(path) in str(error), f"the message does not name the file: {error}"
        return "refused"
    try:
        sound = verify(path).ok
    except GMemError:
        sound = False
    for name, read in READS.items():
        try:
            got = read(bank)
        except GMemError as error:
            forged = signed and "not finite" in str(error)  # finite coefficients whose products f32 does not hold
            assert not sound or forged, f"verify says ok, and {name} raises {error}"
            continue
        assert not sound or signed or got == truth[name], f"verify says ok, and {name} differ"
    return "same" if sound else "found"


# -- damage that knows nothing of the form


def span(rng: random.Random, size: int, longest: int = 200) -> tuple[int, int]:
    begin = rng.randrange(size)
    return begin, min(size, begin + rng.randint(1, longest))


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def grow(data: bytes, rng: random.Random) -> bytes:
    place = rng.choice([0, len(data), len(data), rng.randrange(len(data))])
    return data[:place] + rng.randbytes(rng.choice([1, 8, 64, 1000])) + data[place:]


def swap(data: bytes, rng: random.Random) -> bytes:
    size = rng.choice([1, 2, 4, 8, 16, 64, 256])
    first, second = sorted(rng.randrange(len(data) - size) // size * size for _ in range(2))
    if second < first + size:
        return data
    return b"".join(
        [
            data[:first],
            data[second : second + size],
            data[first + size : second],
            data[first : first + size],
            data[second + size :],
        ]
    )


def zero(data: bytes, rng: random.Random) -> bytes:
    begin, end = span(rng, len(data), 1000)
    return data[:begin] + bytes([rng.choice([0, 0, 255])]) * (end - begin) + data[end:]


def duplicate(data: bytes, rng: random.Random) -> bytes:
    begin, end = span(rng, len(data))
    place = rng.randrange(len(data))
    keep = place if rng.random() < 0.5 else min(len(data), place + end - begin)  # pushed in, or over what was there
    return data[:place] + data[begin:end] + data[keep:]


def drop(data: bytes, rng: random.Random) -> bytes:
    begin, end = span(rng, len(data))
    return data[:begin] + data[end:]


def overwrite(data: bytes, rng: random.Random) -> bytes:
    begin, end = span(rng, len(data), 64)
    return data[:begin] + rng.randbytes(end - begin) + data[end:]


BLIND = (cut, flip, flip, grow, swap, zero, duplicate, drop, overwrite)


# -- damage to JSON

ODD: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 7, 19, 21, 2**31, 2**32, 2**48, 2**63 - 1, 2**63, 2**64, 10**30, 0.5, 1e300, float("nan"),
    float("inf"), "", "x", "F32", "I8", "raw", "unit", "dense", "factored", "a/b", "..", "\ud800", "\0", "y" * 70_000, [], {},
    [[]], [1, 2], [0, 2**62], {"a": 1}, {"extras": 1}, [[[[[[[[]]]]]]]],
)  # fmt: skip


def other_json(value: Any, rng: random.Random) -> Any:
    """Return a copy of a JSON value with one node somewhere in it changed."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        name = rng.choice(sorted(value))
        rest = {n: v for n, v in value.items() if n != name}
        what = rng.random()
        if what < 0.05:
            return rest
        if what < 0.1:
            return {**value, rng.choice(["x", "0/snippets", "extras", "name", ""]): rng.choice(ODD)}
        if what < 0.15:
            return {**rest, rng.choice([*value, "renamed"]): value[name]}
        return {**value, name: other_json(value[name], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = rng.randrange(len(value))
        what = rng.random()
        if what < 0.1:
            return value[:place] + value[place + 1 :]
        if what < 0.2:
            return [*value[:place], rng.choice(value), *value[place:]]
        if what < 0.3:
            other = rng.randrange(len(value))
            swapped = list(value)
            swapped[place], swapped[other] = swapped[other], swapped[place]
            return swapped
        return [*value[:place], other_json(value[place], rng), *value[place + 1 :]]
    if type(value) is int and rng.random() < 0.5:
        return value + rng.choice([-8, -1, 1, 2, 8, 64])
    return rng.choice(ODD)


def text_of(value: Any) -> bytes:
    """JSON as the format wants it, and of what JSON does not have, as Python's writer has it."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode(errors="surrogatepass")


def in_file(value: Any) -> str:
    """The same as text that can be put into another JSON text: half characters only as escapes."""
    try:
        return text_of(value).decode()
    except UnicodeDecodeError:
        return json.dumps(value, sort_keys=True, separators=(",", ":"))


def signed_header(record: Any) -> Any:
    """Make fingerprint and checksum of a header fit, by the words of docs/FORMAT.md."""
    if not isinstance(record, dict):
        return record
    rest = {name: value for name, value in record.items() if name not in ("fingerprint", "checksum")}
    plain = {name: value for name, value in rest.items() if name != "history"}
    rest["fingerprint"] = hashlib.sha256(text_of(plain)).hexdigest()
    return {**rest, "checksum": hashlib.sha256(text_of(rest)).hexdigest()}


def other_header(text: str, rng: random.Random) -> tuple[str, bool]:
    """Change the bank's header; return its text, and whether its hashes were made to fit."""
    changed, sign = other_json(json.loads(text), rng), rng.random() < 0.7
    return in_file(signed_header(changed) if sign else changed), sign


def other_number(text: bytes, rng: random.Random) -> bytes:
    """Change one number of a text, often keeping its length."""
    numbers = list(re.finditer(rb"\d+", text))
    if not numbers:
        return text
    found = rng.choice(numbers)
    size = len(found[0])
    number = rng.choice(
        [
            str(rng.randrange(10**size)).zfill(size),
            str(int(found[0]) + 1),
            "9" * size,
            "1" + "0" * rng.randrange(25),
            "1e999",
            "-1",
        ]
    )
    return text[: found.start()] + number.encode() + text[found.end() :]


def deep(rng: random.Random) -> bytes:
    return rng.choice([b"[", b'{"a":']) * rng.choice([500, 900, 990, 5000, 100_000])


# -- safetensors

Damaged = tuple[bytes, bool]
"""A file's bytes, and whether its header was made to fit its hashes."""


def parts_of(data: bytes) -> tuple[bytes, bytes]:
    end = 8 + int.from_bytes(data[:8], "little")
    return data[8:end], data[end:]


def container(header: bytes, body: bytes) -> bytes:
    header += b" " * (-(8 + len(header)) % 64)
    return len(header).to_bytes(8, "little") + header + body


def other_length(data: bytes, rng: random.Random) -> Damaged:
    own = int.from_bytes(data[:8], "little")
    number = rng.choice(
        [rng.randrange(2**64), rng.randrange(len(data) + 10), own + rng.choice([-64, -8, -1, 1, 8, 64]), 0, 1, 2, 2**63, 2**64 - 1,
         10**8, 10**8 + 1, len(data) - 8, len(data), own << 8, own >> 8]
    )  # fmt: skip
    return max(0, number % 2**64).to_bytes(8, "little") + data[8:], False


def other_container_number(data: bytes, rng: random.Random) -> Damaged:
    header, body = parts_of(data)
    changed = other_number(header.rstrip(), rng)
    return (
        container(changed, body) if rng.random() < 0.7 else data[:8] + changed + data[8 + len(header.rstrip()) :]
    ), False


def other_entry(data: bytes, rng: random.Random) -> Damaged:
    header, body = parts_of(data)
    record = json.loads(header)
    names = [name for name in record if name != "__metadata__"]
    first, second = rng.sample(names, 2)
    field = rng.choice(["dtype", "shape", "data_offsets", "data_offsets"])
    what = rng.randrange(6)
    if what == 0:
        record[first], record[second] = record[second], record[first]
    elif what == 1:
        record[first][field], record[second][field] = record[second][field], record[first][field]
    elif what == 2:
        text = (
            text_of(record)[:-1]
            + b","
            + text_of(rng.choice([first, "__metadata__"]))
            + b":"
            + text_of(record[second])
            + b"}"
        )
        return container(text, body), False
    elif what == 3:
        record[first] = other_json(record[first], rng)
    else:
        record[first][field] = other_json(record[first][field], rng)
    return container(in_file(record).encode(errors="surrogatepass"), body), False


def other_metadata(data: bytes, rng: random.Random) -> Damaged:
    header, body = parts_of(data)
    record = json.loads(header)
    sign = False
    if "gmem" in record.get("__metadata__", {}) and rng.random() < 0.9:
        record["__metadata__"]["gmem"], sign = other_header(record["__metadata__"]["gmem"], rng)
    else:
        record["__metadata__"] = other_json(record["__metadata__"], rng)
    return container(text_of(record), body), sign


def other_signed_data(data: bytes, rng: random.Random) -> Damaged:
    """Other bytes in one entry, and all hashes made to fit: offsets that lead nowhere, rows and columns that are not there."""
    header, body = parts_of(data)
    record = json.loads(header)
    if "gmem" not in record.get("__metadata__", {}):
        return other_entry(data, rng)
    name = rng.choice([name for name in record if name != "__metadata__" and record[name]["data_offsets"][1]])
    begin, end = record[name]["data_offsets"]
    size = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U64": 8, "U32": 4, "U16": 2}.get(record[name]["dtype"], 1)
    entry = body[begin:end]
    for _ in range(rng.choice([1, 1, 2, 5])):
        place = rng.randrange(len(entry) // size) * size
        number = rng.choice(
            [0, 1, 2, 7, 20, 2**15, 2**31, 2**62, 2**63, 2**64 - 1, rng.randrange(2**64), 0x7C00, 0x7F80, 0x7F800000]
        )
        value = rng.choice(
            [(number % 2 ** (8 * size)).to_bytes(size, "little"), entry[:size], entry[-size:], rng.randbytes(size)]
        )
        entry = entry[:place] + value + entry[place + size :]
    head = json.loads(record["__metadata__"]["gmem"])
    head["hashes"][name] = hashlib.sha256(entry).hexdigest()
    record["__metadata__"]["gmem"] = in_file(signed_header(head))
    return container(text_of(record), body[:begin] + entry + body[end:]), True


def deep_header(data: bytes, rng: random.Random) -> Damaged:
    header, body = parts_of(data)
    if rng.random() < 0.5:
        return container(deep(rng), body), False
    record = json.loads(header)
    record["__metadata__"] = {"gmem": deep(rng).decode()}
    return container(text_of(record), body), False


SAFETENSORS = (
    other_length, other_container_number, other_entry, other_entry, other_metadata, other_metadata, other_signed_data,
    other_signed_data, deep_header,
)  # fmt: skip


# -- HDF5

MAGIC = b"GMEM-H5\n"


def record_of(data: bytes) -> tuple[int, Any]:
    """The size of the user block, and the record in it."""
    block = int(data[8:16])
    return block, json.loads(data[16:block].rstrip(b"\0"))


def guarded(data: bytes, block: int, spans: list[list[int]]) -> bytes:
    """Put a guard into the user block of an HDF5 file that fits it, by the words of the store's docstring."""
    digest, position = hashlib.sha256(), block
    for begin, end in [*spans, [len(data), len(data)]]:
        digest.update(data[position:begin])
        position = end
    body = text_of({"data": spans, "sha256": digest.hexdigest(), "size": len(data)})
    return (MAGIC + b"%08d" % block + body).ljust(block, b"\0") + data[block:]


def other_user_block(data: bytes, rng: random.Random) -> Damaged:
    block = int(data[8:16])
    own = data[:block].rstrip(b"\0")
    if rng.random() < 0.2:
        return MAGIC + b"%08d" % rng.choice([0, 1, 511, 512, 513, 2 * block, 1 << 24, 99_999_999]) + data[16:], False
    return other_number(own, rng).ljust(block, b"\0")[:block] + data[block:], False


def other_record(data: bytes, rng: random.Random) -> Damaged:
    block, record = record_of(data)
    body = deep(rng) if rng.random() < 0.1 else in_file(other_json(record, rng)).encode(errors="surrogatepass")
    return (MAGIC + b"%08d" % block + body).ljust(block, b"\0")[:block] + data[block:], False


def other_data(data: bytes, rng: random.Random) -> Damaged:
    """Damage what the guard leaves out."""
    begin, end = rng.choice(record_of(data)[1]["data"])
    damaged = rng.choice([flip, zero, overwrite])(data[begin:end], rng)
    return data[:begin] + damaged + data[end:], False


def other_spans(data: bytes, rng: random.Random) -> Damaged:
    """A right guard over other spans: what they leave out is as it was."""
    block = int(data[8:16])
    bounds = sorted(rng.randrange(block, len(data)) for _ in range(2 * rng.randrange(4)))
    return guarded(data, block, [[begin, end] for begin, end in zip(bounds[::2], bounds[1::2], strict=True)]), False


def other_stored_header(data: bytes, rng: random.Random) -> Damaged:
    """Another header in the dataset that holds it, under a right guard; HDF5's own structure is as it was."""
    block, record = record_of(data)
    begin = data.index(b'{"checksum":')
    end = begin + len(raw_json(data[begin:]))
    text, sign = other_header(data[begin:end].decode(), rng)
    encoded = text.encode(errors="surrogatepass")
    if len(encoded) > end - begin:
        encoded = deep(rng)[: end - begin]
    return guarded(data[:begin] + encoded.ljust(end - begin) + data[end:], block, record["data"]), sign


def raw_json(data: bytes) -> bytes:
    """The JSON object that bytes begin with."""
    text = data.decode("latin-1")  # a character is a byte, so that places agree
    return data[: json.JSONDecoder().raw_decode(text)[1]]


HDF5 = (other_user_block, other_record, other_data, other_data, other_spans, other_stored_header, other_stored_header)


# -- the folder


def other_manifest(data: bytes, rng: random.Random) -> Damaged:
    record = json.loads(data)
    if rng.random() < 0.1:
        return deep(rng), False
    what, sign = rng.random(), rng.random() < 0.7
    if what < 0.4:
        header, _ = other_header(json.dumps(record["header"]), rng)
        record["header"] = json.loads(header)
    elif what < 0.7:
        record["files"] = other_json(record["files"], rng)
    else:
        record = other_json(record, rng)
    if sign and isinstance(record, dict):
        rest = {name: value for name, value in record.items() if name != "checksum"}
        record = {**rest, "checksum": hashlib.sha256(text_of(rest)).hexdigest()}
    return in_file(record).encode(errors="surrogatepass") + b"\n", sign


# -- running cases


def damaged_file(data: bytes, form: str, rng: random.Random) -> tuple[str, bytes, bool]:
    own = {"safetensors": SAFETENSORS, "h5": HDF5, "manifest": (other_manifest,)}[form]
    if rng.random() < 0.5:
        change = rng.choice(BLIND)
        return change.__name__, change(data, rng), False
    damage = rng.choice(own)
    return (damage.__name__, *damage(data, rng))


def damaged_copy(intact: Path, target: Path, form: str, rng: random.Random) -> tuple[str, bool]:
    """Write a damaged copy of a bank; return what was done to it, and whether its header was made to fit."""
    if form != "gmem":
        label, data, signed = damaged_file(intact.read_bytes(), form, rng)
        target.write_bytes(data)
        return label, signed
    shutil.copytree(intact, target)
    first, second = rng.sample(sorted(target.iterdir()), 2)
    what = rng.random()
    if what < 0.1:
        first.unlink()
        if rng.random() < 0.3:
            first.mkdir()
        return "lose a file", False
    if what < 0.2:
        data = first.read_bytes()
        first.write_bytes(second.read_bytes())
        if rng.random() < 0.5:
            second.write_bytes(data)
        return "swap files", False
    label, data, signed = damaged_file(
        first.read_bytes(), "manifest" if first.suffix == ".json" else "safetensors", rng
    )
    first.write_bytes(data)
    return label, signed


def run_case(
    folder: Path, form: str, number: int, truths: dict[Path, dict[str, Any]], bare: bool = False
) -> tuple[str, str]:
    """Run one case; return what was done and how it ended ("BROKEN: …" where the law was broken)."""
    rng = random.Random(f"{form}/{number}")
    kind, dtype, _ = KINDS[number % len(KINDS)]
    intact = folder / f"{kind}-{dtype}.{form}"
    if intact not in truths:
        truths[intact] = truth_of(intact)
    target = folder / f"damaged-{number}.{form}"  # a file that is mapped is never written again
    label, signed = damaged_copy(intact, target, form, rng)
    try:
        return label, judge(target, truths[intact], signed)
    except BaseException as error:
        if bare:
            raise
        where = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
        return label, f"BROKEN: {type(error).__name__}: {str(error)[:300]} ({' '.join(where[-4:])})"
    finally:
        if not bare:
            shutil.rmtree(target) if target.is_dir() else target.unlink()


def work(folder: Path, form: str, first: int, count: int) -> None:
    """Run a chunk of cases and print how they ended; the number of the case that runs is in a file."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    truths: dict[Path, dict[str, Any]] = {}
    ends: collections.Counter[str] = collections.Counter()
    broken: list[str] = []
    current = os.open(folder / f"current-{form}", os.O_WRONLY | os.O_CREAT)
    for number in range(first, first + count):
        os.pwrite(current, b"%10d" % number, 0)
        label, end = run_case(folder, form, number, truths)
        ends[end.partition(":")[0]] += 1
        ends[label] += 1
        if end.startswith("BROKEN"):
            broken.append(f"{form} case {number} ({'-'.join(KINDS[number % len(KINDS)])}, {label}): {end}")
    print(json.dumps({"ends": ends, "broken": broken}))


def run_cases(folder: Path, form: str, total: int) -> collections.Counter[str]:
    """Run cases 0 to `total` in processes of their own; raises AssertionError that names the broken ones."""
    ends: collections.Counter[str] = collections.Counter()
    broken: list[str] = []
    for first in range(0, total, CHUNK):
        count = min(CHUNK, total - first)
        code = f"from tests.test_corruption import work, Path; work(Path({str(folder)!r}), {form!r}, {first}, {count})"
        command = [sys.executable, "-W", "error", "-c", code]
        try:
            result = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, timeout=CHUNK_SECONDS, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"{form} case {(folder / f'current-{form}').read_text()} hangs") from error
        if result.returncode:
            at = (folder / f"current-{form}").read_text()
            raise AssertionError(f"{form} case {at} ended the process ({result.returncode}): {result.stderr[-2000:]}")
        report = json.loads(result.stdout)
        ends.update(report["ends"])
        broken += report["broken"]
    assert not broken, f"{len(broken)} of {total} cases broke the law:\n" + "\n".join(broken[:30])
    assert ends["refused"] + ends["found"] > 0.8 * total, f"most cases should be damaged: {ends}"
    return ends


@pytest.mark.parametrize("form", FORMS)
def test_damage_is_refused_found_or_harmless(tmp_path: Path, form: str) -> None:
    """A hundred damaged banks of each form give a clear error, a problem of verify, or the same bank."""
    make_banks(tmp_path, form)
    run_cases(tmp_path, form, 100)


@pytest.mark.slow
@pytest.mark.parametrize(("form", "total"), [("safetensors", 25_000), ("h5", 20_000), ("gmem", 8_000)])
def test_damage_is_refused_found_or_harmless_in_every_of_many_cases(tmp_path: Path, form: str, total: int) -> None:
    """The same law over many thousand cases, with every kind of damage among them."""
    make_banks(tmp_path, form)
    ends = run_cases(tmp_path, form, total)
    own = {"safetensors": SAFETENSORS, "h5": HDF5, "gmem": (*SAFETENSORS, other_manifest)}[form]
    for change in (*BLIND, *own):
        assert ends[change.__name__] > total / 500, f"{change.__name__} was hardly tried: {ends}"


@pytest.mark.parametrize("form", FORMS)
def test_a_sound_bank_saved_over_a_damaged_one_mends_it(make_bank: BankMaker, tmp_path: Path, form: str) -> None:
    """In a folder too, where a damaged file has the name and the size of the one that is to be written."""
    sound = make_bank("sound.safetensors", parts=(12, 8))
    target = tmp_path / f"damaged.{form}"
    gmem_bank.save(sound, target)
    intact = {path: path.read_bytes() for path in (target.iterdir() if target.is_dir() else [target])}
    for path, data in intact.items():
        path.unlink()
        path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:] if path.suffix != ".json" else data)
    with contextlib.suppress(GMemError):
        assert not verify(target).ok
    gmem_bank.save(sound, target)
    assert verify(target).ok
    assert {path: path.read_bytes() for path in intact} == intact


# -- HDF5 files made by hand, with a guard that fits

BLOCK = 4096


@pytest.fixture
def rebuilt(make_bank: BankMaker, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a bank's datasets anew through h5py, with something else done to them, and a right guard."""
    intact = make_bank("intact.h5", parts=(12, 8))

    def rebuild(change: Callable[[h5py.File], None] = lambda root: None) -> Path:
        path = tmp_path / "rebuilt.h5"
        with h5py.File(intact.path, "r") as old, h5py.File(path, "w", userblock_size=BLOCK) as new:
            names: list[str] = []
            old.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
            for name in names:
                new.create_dataset(name, data=old[name][()])
                new[name].attrs.update(old[name].attrs)
            change(new)
        path.write_bytes(guarded(path.read_bytes(), BLOCK, []))
        return path

    return rebuild


def test_an_hdf5_bank_that_another_program_wrote_opens_where_its_guard_fits(rebuilt: Callable[..., Path]) -> None:
    """The guard of these tests is the one that the store means: without anything else done the bank is sound."""
    path = rebuilt()
    assert verify(path).ok
    assert len(gmem_bank.open(path)) == 20


def replace_dataset(name: str, make: Callable[[h5py.File, np.ndarray], object]) -> Callable[[h5py.File], None]:
    def change(root: h5py.File) -> None:
        values = root[name][()]
        del root[name]
        made = make(root, values)
        if made is not None:
            root[name] = made

    return change


def chunked(root: h5py.File, values: np.ndarray) -> None:
    root.create_dataset("0/snippets", data=values, chunks=(4, 8), compression="gzip")


def checksummed(root: h5py.File, values: np.ndarray) -> None:
    root.create_dataset("0/snippets", data=values, chunks=(4, 8), fletcher32=True)


def compact_layout(root: h5py.File, values: np.ndarray) -> None:
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.COMPACT)
    space = h5py.h5s.create_simple(values.shape)
    h5py.h5d.create(root["0"].id, b"snippets", h5py.h5t.py_create(values.dtype), space, properties).write(
        h5py.h5s.ALL, h5py.h5s.ALL, values
    )


def external_storage(root: h5py.File, values: np.ndarray) -> None:
    Path("outside.bin").write_bytes(values.tobytes())
    root.create_dataset(
        "0/snippets", shape=values.shape, dtype=values.dtype, external=[("outside.bin", 0, values.nbytes)]
    )


def virtual(root: h5py.File, values: np.ndarray) -> None:
    root.create_dataset("1/other", data=values)
    layout = h5py.VirtualLayout(shape=values.shape, dtype=values.dtype)
    layout[:] = h5py.VirtualSource(".", "1/other", shape=values.shape)
    root.create_virtual_dataset("0/snippets", layout)


def unwritten(root: h5py.File, values: np.ndarray) -> None:
    root.create_dataset(
        "0/snippets", shape=values.shape, dtype=values.dtype
    )  # HDF5 gives it no place until it is written


def resized(root: h5py.File, values: np.ndarray) -> None:
    root.create_dataset("0/snippets", data=values[:-1])


def typed(dtype: object) -> Callable[[h5py.File, np.ndarray], None]:
    def make(root: h5py.File, values: np.ndarray) -> None:
        root.create_dataset("0/snippets", shape=values.shape, dtype=dtype, data=np.zeros(values.shape).astype(dtype))

    return make


def empty(root: h5py.File, values: np.ndarray) -> None:
    root["0/snippets"] = h5py.Empty("f4")


def texts(root: h5py.File, values: np.ndarray) -> None:
    root.create_dataset("0/snippets", data=["a"] * 12)


def labelled(label: object) -> Callable[[h5py.File], None]:
    def change(root: h5py.File) -> None:
        root["0/snippets"].attrs["gmem_dtype"] = label

    return change


def loop(root: h5py.File) -> None:
    root["0/self"] = root["0"]


def named_type(root: h5py.File) -> None:
    root["a type"] = np.dtype("f4")


def reference(root: h5py.File, values: np.ndarray) -> None:
    root.create_dataset("0/snippets", shape=(12,), dtype=h5py.ref_dtype)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (replace_dataset("0/snippets", lambda root, v: h5py.ExternalLink("intact.h5", "0/snippets")), "link to somewhere else"),
        (replace_dataset("0/snippets", lambda root, v: h5py.ExternalLink("/etc/passwd", "x")), "link to somewhere else"),
        (replace_dataset("0/snippets", lambda root, v: h5py.SoftLink("/1/snippets")), "link to somewhere else"),
        (replace_dataset("0/snippets", lambda root, v: h5py.SoftLink("/nowhere")), "link to somewhere else"),
        (replace_dataset("gmem", lambda root, v: h5py.SoftLink("/0/keys.bytes")), "link to somewhere else"),
        (replace_dataset("0/snippets", virtual), "virtual"),
        (replace_dataset("0/snippets", chunked), "chunked"),
        (replace_dataset("0/snippets", checksummed), "chunked"),
        (replace_dataset("0/snippets", compact_layout), "compact"),
        (replace_dataset("0/snippets", external_storage), "in another file"),
        (replace_dataset("0/snippets", lambda root, v: None), "'0/snippets' is missing"),
        (replace_dataset("keys.hash", lambda root, v: None), "'keys.hash' is missing"),
        (replace_dataset("gmem", lambda root, v: None), "no dataset 'gmem'"),
        (replace_dataset("0/snippets", unwritten), "no place in the file"),
        (replace_dataset("0/snippets", resized), r"shape \[11, 8\], expected"),
        (replace_dataset("0/snippets", typed("<f8")), "F64 of shape .* expected F32"),
        (replace_dataset("0/snippets", typed(">f4")), "type >f4"),
        (replace_dataset("0/snippets", typed("<c8")), "complex64"),
        (replace_dataset("0/snippets", typed("<i4")), "I32 of shape .* expected F32"),
        (replace_dataset("0/snippets", typed(np.dtype([("a", "<f4")]))), "which no bank has"),
        (replace_dataset("0/snippets", typed("S4")), "which no bank has"),
        (replace_dataset("0/snippets", texts), "which no bank has"),
        (replace_dataset("0/snippets", reference), "which no bank has"),
        (replace_dataset("0/snippets", empty), "0/snippets"),
        (labelled("BF16"), "which no bank has"),
        (labelled("nonsense"), "which no bank has"),
        (labelled(7), "which no bank has"),
        (labelled(np.zeros(5000)), "which no bank has"),
        (loop, "linked twice"),
        (named_type, "neither a group nor a dataset"),
        (lambda root: root.create_dataset("extra", data=np.zeros(3, np.float32)), "entries and hashes differ in"),
    ],
)  # fmt: skip
def test_an_hdf5_file_of_another_make_is_refused_with_the_reason(
    rebuilt: Callable[..., Path], change: Callable[[h5py.File], None], why: str
) -> None:
    """Though its guard fits: links, virtual, filtered, external, missing and mistyped datasets, each named."""
    path = rebuilt(change)
    with pytest.raises(FormatError, match=why) as caught:
        gmem_bank.open(path)
    assert str(path) in str(caught.value)
    assert "HDF5 cannot read it" not in str(caught.value)


@pytest.mark.parametrize(
    "body",
    [
        b'{"data":[],"sha256":"%s","size":NaN}' % (b"0" * 64),
        b'{"data":[],"sha256":"\\ud800","size":1}',
        b'{"data":[],"sha256":"x","size":%d}' % 10**400,
        b'{"data":[],"sha256":"x","size":' + b"9" * 3500 + b"}",
        b"[" * 4000,
        b'{"a":' * 800,
        b'{"a":' * 600 + b"1" + b"}" * 600,
        b"[]", b"", b"null", b"{}", b"\xff\xfe",
        b'{"data":{},"sha256":"x","size":1}',
        b'{"data":[[5,1]],"sha256":"x","size":9}',
        b'{"data":[[true,true]],"sha256":"x","size":9}',
    ],
)  # fmt: skip
def test_a_user_block_that_cannot_be_is_refused(make_bank: BankMaker, tmp_path: Path, body: bytes) -> None:
    """Whatever JSON stands there, NaN and half characters too."""
    data = make_bank("intact.h5").path.read_bytes()
    path = tmp_path / "made.h5"
    path.write_bytes((MAGIC + b"%08d" % BLOCK + body).ljust(BLOCK, b"\0") + data[int(data[8:16]) :])
    with pytest.raises(FormatError, match="user block"):
        gmem_bank.open(path)


# -- safetensors files made by hand


def entry_json(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4)) -> Any:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "entry",
    [
        entry_json(shape=[2**31, 8]),
        entry_json(shape=[2**31, 8], offsets=[0, 2**36]),
        entry_json(shape=[2**62, 4], offsets=[0, 2**66]),
        entry_json(shape=[2**62, 4], offsets=[0, 0]),
        entry_json(shape=[2**32, 2**32, 2**32]),
        entry_json(shape=[2**63 - 1] * 3),
        entry_json(shape=[1] * 65),
        entry_json(shape=[1] * 100_000),
        entry_json(shape=[2**62] * 300_000, offsets=[0, 4]),
        entry_json(shape=[0, 2**62], offsets=[4, 4]),
        entry_json(shape=[-1, -1]),
        entry_json(shape=[10**4000]),
        entry_json(shape=[1.0]),
        entry_json(shape=["1"]),
        entry_json(shape="1"),
        entry_json(shape=None),
        entry_json(offsets=[-4, 0]),
        entry_json(offsets=[4, 0]),
        entry_json(offsets=[0, 4, 8]),
        entry_json(offsets=[0.0, 4.0]),
        entry_json(offsets={"0": 4}),
        entry_json(dtype="F8"),
        entry_json(dtype=[]),
        entry_json(dtype={}),
        entry_json(dtype=None),
        entry_json(dtype=1),
        [],
        None,
        {},
    ],
)
def test_a_safetensors_entry_that_cannot_be_is_refused_at_once(
    make_bank: BankMaker, tmp_path: Path, entry: object
) -> None:
    """Beyond the file, overflowing, negative, of a wrong type: the entry is named, and nothing is allocated or waited for."""
    header, body = parts_of(make_bank().path.read_bytes())
    path = tmp_path / "made.safetensors"
    path.write_bytes(container(text_of({**json.loads(header), "0/snippets": entry}), body))
    with pytest.raises(FormatError) as caught:
        open_stored(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 10_000


@pytest.mark.parametrize("second", ["0/snippets", "__metadata__"])
def test_a_name_that_occurs_twice_is_refused(make_bank: BankMaker, tmp_path: Path, second: str) -> None:
    """Readers that take the first and readers that take the last would see two banks."""
    header, body = parts_of(make_bank().path.read_bytes())
    twice = header.rstrip()[:-1] + b"," + text_of(second) + b":" + text_of(json.loads(header)[second]) + b"}"
    path = tmp_path / "made.safetensors"
    path.write_bytes(container(twice, body))
    with pytest.raises(FormatError, match="twice"):
        open_stored(path)


def header_with(make_bank: BankMaker, path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Write a bank whose header was changed and made to fit its hashes again."""
    header, body = parts_of(make_bank().path.read_bytes())
    record = json.loads(header)
    changed = signed_header(change(json.loads(record["__metadata__"]["gmem"])))
    path.write_bytes(container(text_of({**record, "__metadata__": {"gmem": in_file(changed)}}), body))
    return path


@pytest.mark.parametrize("rows", [2**31, 2**47, 2**48, 2**63, 10**30])
def test_a_header_that_promises_rows_beyond_the_file_is_refused(
    make_bank: BankMaker, tmp_path: Path, rows: int
) -> None:
    """Two thousand million rows in a small file are not reserved, only refused."""
    path = header_with(
        make_bank, tmp_path / "made.safetensors",
        lambda record: {**record, "num_rows": rows, "segments": [{"name": "0", "num_rows": rows}]},
    )  # fmt: skip
    with pytest.raises(FormatError, match=r"0/snippets|integer"):
        gmem_bank.open(path)


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), "\ud800", json.loads("[" * 900 + "]" * 900), 10**30, -0.0], ids=repr
)
@pytest.mark.parametrize("field", ["extra", "history", "encoder", "dim", "space"])
def test_values_that_json_does_not_have_are_refused(
    make_bank: BankMaker, tmp_path: Path, field: str, value: object
) -> None:
    """NaN, infinity, half characters and bottomless lists in the header raise our error, whatever field they are in."""

    def change(record: dict[str, Any]) -> dict[str, Any]:
        if field == "history":
            return {**record, "history": [{"operation": "x", "arguments": value}]}
        if field == "encoder":
            return {**record, "encoder": {**record["encoder"], "labels": {"a": value}}}
        return {**record, field: value}

    try:
        path = header_with(make_bank, tmp_path / "made.safetensors", change)
    except RecursionError:
        return  # Python's own writer gives up before the reader is asked
    try:
        bank = gmem_bank.open(path)
    except FormatError as error:
        assert str(path) in str(error)
    else:
        assert field in ("extra", "history", "encoder")
        assert bank.header.to_json() == in_file(json.loads(bank.header.to_json()))


if __name__ == "__main__":
    warnings.simplefilter("error")
    print(run_case(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), {}, bare=True))
