"""An encoder that another distribution registers: by the commands, with worker processes, and in a bank that is reopened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import gmem_bank
from gmem_bank.errors import EncoderError, EncoderMismatchError, GMemError, SourceError

PLUGIN = '''
import numpy as np
from gmem_bank import EncoderSpec
from gmem_bank.encoders import refuse_unknown


class Moments:
    """Mean and spread of each channel, raised to a power."""

    def __init__(self, name, options):
        self.parameters = refuse_unknown(name, options.parameters, {"power": 1})
        self.spec = EncoderSpec(
            name=name, family="moments/1", dim=6, space=options.space, parameters=self.parameters, software="fake 1.0",
            preprocessing={"crop": "adm", "crop_size": 24}, labels={"device": options.device},
        )

    def encode(self, images):
        values = images.astype(np.float32) / 255
        numbers = np.concatenate([values.mean(axis=(1, 2)), values.std(axis=(1, 2))], axis=1)
        return numbers ** np.float32(self.parameters["power"])


def returning(make):
    class Wrong(Moments):
        def encode(self, images):
            return make(super().encode(images))
    return Wrong


def some_not_finite(numbers):
    numbers[0, 0] = np.nan
    return numbers


WrongShape = returning(lambda numbers: numbers[:, :5])
WrongCount = returning(lambda numbers: numbers[1:])
WrongType = returning(lambda numbers: numbers.astype(np.float64))
WrongKind = returning(lambda numbers: numbers.tolist())
AllNaN = returning(lambda numbers: numbers * np.nan)
SomeNaN = returning(some_not_finite)


class NoSpec:
    def __init__(self, name, options):
        pass

    def encode(self, images):
        raise AssertionError


class NoCrop(Moments):
    def __init__(self, name, options):
        self.spec = EncoderSpec(name=name, family="x", dim=6, space=options.space)


class OddSpec(Moments):
    def __init__(self, name, options):
        self.spec = {"dim": 6, "preprocessing": {"crop_size": 24}}


class OtherName(Moments):
    def __init__(self, name, options):
        super().__init__("towers", options)


class Fails:
    def __init__(self, name, options):
        raise ValueError("no such calibration file")
'''
NAMES = {
    "moments": "Moments", "wrong-shape": "WrongShape", "wrong-count": "WrongCount", "wrong-type": "WrongType",
    "wrong-kind": "WrongKind", "all-nan": "AllNaN", "some-nan": "SomeNaN", "no-spec": "NoSpec", "no-crop": "NoCrop",
    "fails": "Fails", "odd-spec": "OddSpec", "other-name": "OtherName", "absent": "NoSuchThing", "pixels": "Moments", "hf:": "Moments",
}  # fmt: skip


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installed distribution "fake" of an encoder and its many broken brothers, for this process and those it starts."""
    folder = tmp_path / "site"
    facts = folder / "fake-1.0.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: fake\nVersion: 1.0\n")
    lines = [f"{name} = fake_plugin.towers:{target}" for name, target in NAMES.items() if ":" not in name]
    lines += ["unimportable = fake_plugin.broken:Anything", "needs-more = fake_plugin.needs:Anything"]
    (facts / "entry_points.txt").write_text("\n".join(["[gmem_bank.encoders]", *lines, "[console_scripts]", "x = y:z"]))
    package = folder / "fake_plugin"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "towers.py").write_text(PLUGIN)
    (package / "broken.py").write_text("raise RuntimeError('boom')\n")
    (package / "needs.py").write_text("import no_such_library\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")])))
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "fake_plugin"]:
        del sys.modules[name]


def command(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [sys.executable, "-m", "gmem_bank", *arguments], capture_output=True, text=True, check=False
    )
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    return result


def moments(path: Path, power: float) -> np.ndarray:
    """The plug-in's numbers of an image file, by Pillow and NumPy alone."""
    picture = Image.open(path).convert("RGB")
    while min(picture.size) >= 48:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = 24 / min(picture.size)
    width, height = max(24, round(picture.width * scale)), max(24, round(picture.height * scale))
    left, top = (width - 24) // 2, (height - 24) // 2
    resized = np.array(picture.resize((width, height), Image.Resampling.BICUBIC))
    values = resized[top : top + 24, left : left + 24].reshape(-1, 3) / 255
    return np.concatenate([values.mean(axis=0), values.std(axis=0)]) ** power


def test_the_commands_build_reopen_and_insert_with_it(site: Path, photos: Path, new_photos: Path) -> None:
    """Listed with its origin; built by workers with its parameters; the bank names it, and an insert finds it again."""
    listed = {entry["name"]: entry for entry in json.loads(command("encoders", "--json").stdout)}
    assert listed["moments"]["origin"] == listed["unimportable"]["origin"] == "fake"
    assert listed["pixels"]["origin"] == "built in"
    options = ["-e", "moments", "--set", "power=2", "--space", "raw", "--workers", "2", "--json"]
    report = json.loads(command("build", str(photos), *options).stdout)
    assert (report["encoder"], report["dim"], report["num_rows"]) == ("moments", 6, 24)
    added = json.loads(command("insert-concept", "images", "--json").stdout)
    assert added["num_rows"] == 32
    bank = gmem_bank.open("bank.safetensors")
    spec = bank.encoder
    assert (spec.name, spec.family, spec.parameters, spec.space) == ("moments", "moments/1", {"power": 2}, "raw")
    assert (spec.software, spec.labels) == ("fake 1.0", {"device": "auto"})
    keys = bank.keys(bank.rows())
    paths = [new_photos / Path(key).name if key.startswith("images/") else photos / key for key in keys]
    wanted = np.stack([moments(path, 2) for path in paths])
    np.testing.assert_allclose(bank.snippets(bank.rows()), wanted, atol=1e-5)
    hits = json.loads(command("search", "bank.safetensors", str(paths[7]), "-k", "1", "--json").stdout)
    assert hits[0]["hits"][0]["key"] == keys[7]


def test_in_this_process_nothing_is_imported_before_it_is_asked_for(site: Path) -> None:
    """Listing reads metadata; loading one plug-in leaves the other modules alone; a built-in name stays ours."""
    found = gmem_bank.available_encoders()
    assert found["moments"].origin == "fake"
    assert found["unimportable"].target == "fake_plugin.broken:Anything"
    assert not [name for name in sys.modules if name.startswith("fake_plugin")]
    encoder = gmem_bank.load_encoder("moments", parameters={"power": 3}, space="raw")
    assert encoder.spec.parameters == {"power": 3}
    assert "fake_plugin.broken" not in sys.modules
    assert gmem_bank.load_encoder("pixels").spec.family == "pixels/1"
    with pytest.raises(EncoderError, match="'power'"):
        gmem_bank.load_encoder("moments", parameters={"pover": 3})
    with pytest.raises(EncoderError, match="moments"):
        gmem_bank.load_encoder("moment")


def test_damaged_metadata_of_another_distribution_hide_no_encoder(site: Path) -> None:
    """Entry points that cannot be parsed lose that distribution's encoders and nobody else's."""
    (site / "bad-1.0.dist-info").mkdir()
    (site / "bad-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: bad\nVersion: 1.0\n")
    (site / "bad-1.0.dist-info" / "entry_points.txt").write_text("[gmem_bank.encoders]\nno target here\n")
    found = gmem_bank.available_encoders()
    assert (found["moments"].origin, found["hog"].origin) == ("fake", "built in")


def test_a_bank_outlives_the_plug_in_and_refuses_another_one(
    site: Path, photos: Path, new_photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the distribution the bank opens, and an insert says which encoder it lacks; changed code is told apart."""
    gmem_bank.build(photos, gmem_bank.load_encoder("moments"), "bank.safetensors")
    towers = site / "fake_plugin" / "towers.py"
    towers.write_text(
        PLUGIN.replace("moments/1", "moments/2") + "\n"
    )  # another size: Python's cache knows a file by that and its second
    assert "family" in command("insert-concept", "images", code=1).stderr
    monkeypatch.setenv("PYTHONPATH", os.environ["PYTHONPATH"].replace(str(site), ""))
    said = command("insert-concept", "images", code=1).stderr
    assert "unknown encoder 'moments'" in said
    assert json.loads(command("info", "--json").stdout)["encoder"]["name"] == "moments"
    assert len(gmem_bank.open("bank.safetensors")) == 24
    with pytest.raises(EncoderMismatchError):
        gmem_bank.insert_concept("bank.safetensors", [new_photos], gmem_bank.load_encoder("moments", space="raw"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("unimportable", "'unimportable' (fake_plugin.broken:Anything, from fake) cannot be imported: boom"),
        ("needs-more", "No module named 'no_such_library'"),
        ("absent", "no attribute 'NoSuchThing'"),
        ("no-spec", "'no-spec' of fake lacks 'spec' or 'encode'"),
        ("no-crop", "'no-crop' of fake: spec.preprocessing['crop_size'] must be a positive integer"),
    ],
)
def test_what_is_broken_at_loading_says_who_is_at_fault(site: Path, name: str, words: str) -> None:
    """Import, contents and specification: the encoder, its distribution and the reason are named."""
    with pytest.raises(EncoderError) as caught:
        gmem_bank.load_encoder(name)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"), [("fails", "no such calibration file"), ("odd-spec", "spec"), ("other-name", "'towers'")]
)
def test_what_fails_while_it_is_made_says_who_is_at_fault(site: Path, name: str, words: str) -> None:
    """A factory's own exception, a specification of another type, and a name under which no bank would find it again."""
    with pytest.raises(EncoderError) as caught:
        gmem_bank.load_encoder(name)
    assert f"'{name}' of fake" in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("wrong-shape", EncoderError, "'wrong-shape' returned float32 [24, 5], expected float32 [24, 6]"),
        ("wrong-count", EncoderError, "returned float32 [23, 6], expected"),
        ("wrong-type", EncoderError, "returned float64 [24, 6], expected"),
        ("wrong-kind", EncoderError, "returned list, expected"),
        ("all-nan", SourceError, "not finite"),
    ],
)
def test_what_returns_nonsense_makes_no_bank(
    site: Path, photos: Path, name: str, error: type[GMemError], words: str
) -> None:
    """Shape, count, type and value are checked before anything is written."""
    with pytest.raises(error) as caught:
        gmem_bank.build(photos, gmem_bank.load_encoder(name), "bank.safetensors")
    assert words in str(caught.value)
    assert not Path("bank.safetensors").exists()


def test_single_rows_that_are_not_finite_are_reported(site: Path, photos: Path) -> None:
    """One NaN loses its image and says so; the other rows are those of the sound encoder."""
    report = gmem_bank.build(photos, gmem_bank.load_encoder("some-nan"), "bank.safetensors", batch_size=8)
    assert [entry["reason"] for entry in report.skipped] == ["the image is sound, but its snippet is not finite"] * 3
    gmem_bank.build(photos, gmem_bank.load_encoder("moments"), "sound.safetensors", batch_size=8)
    some, sound = gmem_bank.open("bank.safetensors"), gmem_bank.open("sound.safetensors")
    keys = some.keys(some.rows())
    assert len(keys) == 21
    np.testing.assert_array_equal(some.snippets(some.rows()), sound.snippets(sound.rows_for(keys)))
