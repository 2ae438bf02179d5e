"""Evaluation: what is compared with what, whom the judge may judge, and what a report says of it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import gmem_bank
import gmem_gen
from gmem_bank.errors import BankNotFoundError, ConfigError, SourceError
from gmem_gen import evaluator
from gmem_gen.array_store import mapped_samples
from gmem_gen.checkpoint_state import STATE, write_state
from gmem_gen.cli import main
from gmem_gen.evaluation_sources import circularity, same_weights
from gmem_gen.kernel_distance import kernel_distance
from gmem_gen.neighbours import neighbourhoods
from tests.gmem_gen.test_evaluate import bank, held_out, pixels, trained

__all__ = ["bank", "held_out"]  # fixtures

QUICK = {"num": 50, "num_resamples": 0}


def options(**changes: object) -> gmem_gen.EvaluationOptions:
    return gmem_gen.EvaluationOptions(**{**QUICK, **changes})


def embeddings(folder: str | Path, space: str = "raw") -> np.ndarray:
    """(n, 64) by the judge, without the evaluator."""
    source = gmem_bank.open_images(folder)
    found = gmem_bank.encode_images(pixels(), [source.read(place) for place in range(len(source))])
    return found if space == "raw" else found / np.linalg.norm(found, axis=1, keepdims=True)


# ---- Which real images


def test_copies_are_looked_for_among_all_training_images_whatever_the_reference(bank: Path, held_out: Path) -> None:
    """Fifty rows of reference, images of their own or training images: every copy is still found."""
    for reference in (held_out, None):
        report = gmem_gen.evaluate(bank, pixels(), samples="digits", reference=reference, options=options(num_real=50))
        assert report.reference["count"] == 50
        assert report.memorisation.near_copies.value == 1.0
        assert report.memorisation.neighbours.tolist() == list(range(120))
    none = gmem_gen.evaluate(bank, pixels(), samples="digits", reference=held_out, options=options(memorisation=False))
    assert none.memorisation is None
    assert "Memorisation was not judged: it was left out." in none.remarks
    assert none.concepts is not None  # by the reference


def test_a_bank_as_reference_is_drawn_from_by_the_seed(held_out: Path, bank: Path) -> None:
    """Fifty of eighty rows: the same for the same seed, and other figures than those of all."""
    gmem_bank.build(held_out, pixels(), "held.safetensors")
    found = [
        gmem_gen.evaluate(
            None, samples="digits", reference="held.safetensors", options=options(num_real=most, seed=seed)
        )
        for most, seed in ((50, 0), (50, 0), (50, 1), (None, 0))
    ]
    distances = [report.distribution.frechet.value for report in found]
    assert [report.reference["count"] for report in found] == [50, 50, 50, 80]
    assert distances[0] == distances[1]
    assert len(set(distances)) == 3
    assert found[0].reference["fingerprint"] == gmem_bank.open("held.safetensors").fingerprint


def test_what_the_training_held_out_is_no_training_image(bank: Path) -> None:
    """A class and a tenth of the rest: the search leaves them out, their distances stand beside, and they vote on concepts."""
    keys = gmem_bank.open(bank).keys(gmem_bank.open(bank).rows())
    out = np.array([key.startswith("d3/") or place % 10 == 0 for place, key in enumerate(keys)])
    Path("held.txt").write_text("\n".join(np.array(keys)[out]))
    settings = ["train.max_steps=2", "model.patch_size=2", "model.depth=1", "data.channels=1", "sample.num_steps=2",
                "data.validation_keys=held.txt", "train.validate_every=2"]  # fmt: skip
    gmem_gen.train(bank, gmem_gen.apply_settings(gmem_gen.preset("nano"), settings))
    report = gmem_gen.evaluate(bank, pixels(), checkpoint="runs/bank", options=options())
    record = report.to_json()
    assert record["memorisation"]["num_training_images"] == record["reference"]["count"] == (~out).sum()
    assert record["reference"]["what"] == "the training images"
    assert list(report.training.images.keys) == np.array(keys)[~out].tolist()
    rows = embeddings("digits", "unit")
    expected = 1 - (rows[out] @ rows[~out].T).max(axis=1)
    assert report.memorisation.held_out == pytest.approx(expected, abs=1e-6)
    assert set(record["memorisation"]["quantiles"]) == {"samples", "between_training_images", "held_out_images"}
    assert "near_copies_of_held_out" in record["memorisation"]
    assert report.concepts.of_real["d3"] > 0.9
    page = gmem_gen.write_report(report, "out")[1].read_text()
    assert "held-out images" in page
    assert "image of the bank" not in page
    gmem_gen.export_folder(gmem_gen.load_checkpoint("runs/bank"), "exported")
    exported = gmem_gen.evaluate(bank, pixels(), checkpoint="exported", options=options())
    assert exported.to_json()["memorisation"]["num_training_images"] == 120
    assert any("does not say which images" in remark for remark in exported.remarks)


def test_what_is_wrong_with_the_reference_is_said_before_anything_is_drawn(
    bank: Path, held_out: Path, monkeypatch
) -> None:
    """A path that is not there, a bank that is not there, too few images."""

    def draw(*_: object, **__: object) -> None:
        raise AssertionError("samples were drawn")

    monkeypatch.setattr(evaluator, "draw_samples", draw)
    run = trained()
    few = Path("few")
    few.mkdir()
    for path in sorted(held_out.rglob("*.png"))[:10]:
        path.rename(few / path.name)
    for reference, error, words in (
        ("typo", SourceError, "typo"),
        ("held.h5", BankNotFoundError, "with --reference"),
        ("HELD.SAFETENSORS", BankNotFoundError, "with --reference"),
        (few, ConfigError, "10 real images"),
    ):
        with pytest.raises(error, match=words) as caught:
            gmem_gen.evaluate(bank, pixels(), checkpoint=run, reference=reference, options=options())
        assert "--bank" not in str(caught.value)
    Path("digits").rename("moved")
    with pytest.raises(ConfigError, match="nothing to compare"):
        gmem_gen.evaluate(bank, pixels(), checkpoint=run, options=options())


# ---- Who judges


def encoder(name: str, **parameters: object) -> gmem_bank.EncoderSpec:
    return gmem_bank.load_encoder(name, parameters=parameters).spec


def checkpoint(condition: str, path: Path = Path("none"), projection: int = 0) -> SimpleNamespace:
    model = SimpleNamespace(config=SimpleNamespace(condition=condition))
    return SimpleNamespace(
        model=model, path=path, config=SimpleNamespace(model=SimpleNamespace(projection_dim=projection))
    )


def write_tokens_of(spec: gmem_bank.EncoderSpec | None, folder: Path) -> Path:
    """A checkpoint's state that remembers patch tokens of an encoder."""
    record = {"fingerprint": "", "dim": 4, "space": "unit", "encoder": "x", "encoder_fingerprint": "", "num_rows": 1}
    state = {"step": 1, "elapsed": 0, "config": {}, "latent": {}, "tokenizer": {}, "bank": record, "keys_digest": "",
             "hashes": {}, "tokens": {"encoder": None if spec is None else spec.to_json()}}  # fmt: skip
    folder.mkdir()
    write_state(folder / STATE, state)
    return folder


def test_a_judge_is_known_by_its_weights_and_not_by_how_it_is_asked(bank: Path, tmp_path: Path) -> None:
    """Another size of the bank's encoder is still the bank's encoder; a generator that ignores snippets learned nothing of it."""
    own, other = gmem_bank.open(bank), encoder("pixels", size=8)
    same = encoder("hog", size=24)
    assert same.fingerprint != own.encoder.fingerprint
    network = gmem_bank.EncoderSpec(name="dinov2", family="transformers:dinov2", dim=8, space="raw", weights_sha256="ab",
                                    parameters={"dtype": "fp32"})  # fmt: skip
    renamed = gmem_bank.EncoderSpec(name="hf:there", family="transformers:dinov2", dim=4, space="unit", weights_sha256="ab",
                                    parameters={"dtype": "bf16"})  # fmt: skip
    assert same_weights(network, renamed)
    assert not same_weights(same, other)
    cases = [
        (same, own, checkpoint("memory"), True), (other, own, checkpoint("memory"), False), (same, own, checkpoint("class"), False),
        (same, own, checkpoint("none"), False), (same, own, None, None), (other, own, None, None), (same, None, None, None),
        (same, own, checkpoint("none", write_tokens_of(same, tmp_path / "a"), 8), True),
        (other, own, checkpoint("memory", write_tokens_of(same, tmp_path / "b"), 8), False),
        (other, own, checkpoint("memory", write_tokens_of(None, tmp_path / "c"), 8), None),
        (other, own, checkpoint("memory", projection=8), None),
    ]  # fmt: skip
    for judge, memory, generator, expected in cases:
        found, said = circularity(judge, memory, generator)
        assert found is expected
        assert said.startswith("CIRCULAR") is (expected is True)
    assert "the bank's encoder" in circularity(same, own, None)[1]
    assert circularity(other, own, None) == circularity(same, None, None) == (None, "")


def test_the_own_encoder_as_judge_is_called_circular(bank: Path) -> None:
    """Of a checkpoint that draws by snippets, in whatever size it is loaded; of given samples nobody knows."""
    judge = gmem_bank.load_encoder("hog", space="raw", parameters={"size": 24})
    report = gmem_gen.evaluate(bank, judge, checkpoint=trained(), options=options())
    assert report.judge["circular"] is True
    assert report.remarks[0].startswith("CIRCULAR")
    given = gmem_gen.evaluate(bank, judge, samples="digits", options=options())
    assert given.to_json()["judge"]["circular"] is None
    assert given.remarks[0].startswith("The judge is the bank's encoder")


def test_dinov2_judges_where_none_is_named_if_it_is_here_and_not_the_own(
    bank: Path, held_out: Path, monkeypatch
) -> None:
    """Weights that are nowhere are not fetched, and what to give instead is said."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    with pytest.raises(ConfigError, match=r"dinov2-base.*not in the hub's cache.*--encoder"):
        gmem_gen.evaluate(None, samples="digits", reference=held_out, options=options())
    result = CliRunner().invoke(main, ["evaluate", "--samples", "digits", "-r", str(held_out), "-q"])
    assert result.exit_code == 1
    assert "--encoder" in result.stderr
    asked = []
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *names: "/cache/" + "/".join(names))
    stand_in, own = pixels(), gmem_bank.load_encoder("hog")
    for judge in (stand_in, own):
        monkeypatch.setattr(
            gmem_bank, "load_encoder", lambda name, judge=judge, **how: asked.append((name, how)) or judge
        )
        if judge is stand_in:
            report = gmem_gen.evaluate(bank, samples="digits", reference=held_out, options=options(), device="cpu")
            assert report.judge["encoder"] == "pixels"
        else:
            with pytest.raises(ConfigError, match="is the encoder of the bank"):
                gmem_gen.evaluate(bank, samples="digits", reference=held_out, options=options())
    assert asked[0] == ("dinov2", {"space": "raw", "device": "cpu"})


# ---- Samples


def test_samples_that_cannot_be_read_are_left_out_wherever_they_stand(held_out: Path, bank: Path) -> None:
    """The first of all is no image: the rest is judged, and it is counted."""
    (held_out / "d0" / "0000.png").write_bytes(b"no image")
    report = gmem_gen.evaluate(None, pixels(), samples=held_out, reference="digits", options=options())
    assert report.samples["count"] == 80
    assert any("given samples 1 could not be read" in remark for remark in report.remarks)


def test_real_images_are_made_grey_where_samples_have_one_channel(held_out: Path, bank: Path) -> None:
    """In all their files or in their array; samples that lost their colour are compared with colour, unless it is asked for."""
    for path in Path("digits").rglob("*.png"):
        with Image.open(path) as image:
            Image.merge("RGB", [image, image, Image.new("L", image.size)]).save(path)

    def judged(samples: str | Path, **changes: object) -> gmem_gen.EvaluationReport:
        return gmem_gen.evaluate(None, pixels(), samples=samples, reference="digits", options=options(**changes))

    source = gmem_bank.open_images(held_out)
    images = np.stack([source.read(place) for place in range(len(source))])
    np.savez("grey.npz", arr_0=images[..., :1])
    np.savez("colourless.npz", arr_0=images)
    grey, array, colourless = judged(held_out), judged("grey.npz"), judged("colourless.npz")
    assert grey.samples["grey"] is array.samples["grey"] is True
    assert colourless.samples["grey"] is False
    assert colourless.samples["looks_grey"] is True
    assert grey.distribution.frechet.value == array.distribution.frechet.value
    assert any("made grey" in remark for remark in grey.remarks)
    assert any("look grey, and real images do not" in remark for remark in colourless.remarks)
    assert colourless.reference["pixels"] != grey.reference["pixels"]
    assert judged("colourless.npz", grey=True).reference["pixels"] == grey.reference["pixels"]
    assert judged(held_out, grey=False).reference["pixels"] == colourless.reference["pixels"]
    path = sorted(held_out.rglob("*.png"))[37]
    with Image.open(path) as image:
        image.convert("RGB").save(path)
    assert judged(held_out).reference["pixels"] == colourless.reference["pixels"]


def test_samples_that_are_not_square_are_remarked(held_out: Path, bank: Path) -> None:
    """Real images are cropped to a square, which the samples are not."""
    for path in held_out.rglob("*.png"):
        with Image.open(path) as image:
            image.resize((12, 8)).save(path)
    report = gmem_gen.evaluate(None, pixels(), samples=held_out, reference="digits", options=options())
    assert any("Samples are 12×8" in remark and "squares of 8" in remark for remark in report.remarks)
    own = gmem_gen.evaluate(None, pixels(), samples=held_out, reference="digits", options=options(match_size=False))
    assert not any("12×8" in remark for remark in own.remarks)


def test_of_many_given_samples_as_many_are_drawn_as_are_asked_for(held_out: Path, bank: Path) -> None:
    """By the seed; all without the option, whatever the number to draw is."""
    for given, count in ((None, 80), (60, 60), (300, 80)):
        report = gmem_gen.evaluate(
            None, pixels(), samples=held_out, reference="digits", options=options(num_given=given)
        )
        assert report.samples["count"] == count
    with pytest.raises(ConfigError, match="num_given must be 50"):
        options(num_given=10)


def test_drawn_samples_lie_in_their_file_and_not_in_memory(bank: Path) -> None:
    """As NumPy reads them."""
    report = gmem_gen.evaluate(bank, pixels(), checkpoint=trained(), options=options(), out="out")
    found = mapped_samples(Path("out/samples.npz"))
    assert isinstance(found, np.memmap)
    with np.load("out/samples.npz") as arrays:
        assert np.array_equal(found, arrays["arr_0"])
    wide = np.broadcast_to(found, (50, 8, 8, 3))
    digest = hashlib.sha256(
        b"".join(hashlib.sha256(b"(8, 8, 3)" + image.tobytes()).digest() for image in wide)
    ).hexdigest()
    assert report.samples["pixels"] == digest


# ---- What a reader has to know


def test_what_is_the_same_on_both_sides_is_said(bank: Path, held_out: Path) -> None:
    """A reference that was trained on, as images or as a bank of the judge; samples that are the reference."""
    gmem_bank.build("digits", pixels(), "again.safetensors")

    def said(samples: str | Path, reference: str | Path, memory: Path | None = bank) -> str:
        report = gmem_gen.evaluate(memory, pixels(), samples=samples, reference=reference, options=options())
        return " ".join(report.remarks)

    assert "120 of 120 reference images are training images" in said(held_out, "digits")
    assert "bank of images that the generator's bank was made of" in said(held_out, "again.safetensors")
    assert "80 of 80 samples are reference images" in said(held_out, held_out, None)
    fair = said("digits", held_out)
    assert "training images:" not in fair
    assert "samples are reference images" not in fair
    (held_out / "d0" / "copy.png").write_bytes(next(Path("digits/d0").glob("*.png")).read_bytes())
    assert "1 of 81 reference images are training images" in said("digits", held_out)
    brighter = Path("brighter")
    for path in Path("digits").rglob("*.png"):
        with Image.open(path) as image:
            (brighter / path.parent.name).mkdir(parents=True, exist_ok=True)
            image.point(lambda value: min(255, value + 1)).save(brighter / path.parent.name / path.name)
    assert "100% of reference images are near-copies of training images" in said(held_out, brighter)


def test_what_was_left_out_is_said(bank: Path, held_out: Path) -> None:
    """Masked rows, components of the reference, concepts, snippets."""
    opened = gmem_bank.open(bank)
    gmem_bank.mask(bank, gmem_bank.Selection(keys=tuple(opened.keys(np.arange(3)))))
    gmem_bank.build(held_out, pixels(), "held.safetensors")
    gmem_bank.compress("held.safetensors", rank=8, output="small.safetensors")
    report = gmem_gen.evaluate(bank, pixels(), samples="digits", reference="small.safetensors", options=options())
    said = " ".join(report.remarks)
    assert "3 rows of the bank are masked" in said
    assert "a bank of rank 8 in 64 dimensions" in said
    assert report.to_json()["distribution"]["frechet"]["rank_deficient"] is True
    assert "given ones do not say which they were drawn from" in said
    full = gmem_gen.evaluate(None, pixels(), samples="digits", reference="held.safetensors", options=options())
    assert full.distribution.rank_deficient is False
    flat = Path("flat")
    flat.mkdir()
    for path in held_out.rglob("*.png"):
        path.rename(flat / path.name)
    assert "not judged by concept: none was asked for one." in " ".join(
        gmem_gen.evaluate(bank, pixels(), samples=flat, options=options()).remarks
    )
    assert "not judged by concept: real images have fewer than two." in " ".join(
        gmem_gen.evaluate(None, pixels(), samples="digits", reference=flat, options=options()).remarks
    )


def test_more_is_not_asked_of_images_than_they_can_say(bank: Path, held_out: Path, monkeypatch) -> None:
    """Before anything is drawn; on the command line as wrong usage where the line alone says so."""
    run = trained()
    monkeypatch.setattr(evaluator, "draw_samples", None)
    for changes, words in (
        ({"neighbours": 50}, "50. nearest neighbour"),
        ({"manifold_neighbours": 80, "num": 90}, "90 samples and 80 real"),
        ({"kid_subset_size": 26}, "at most half"),
    ):
        with pytest.raises(ConfigError, match=words):
            gmem_gen.evaluate(bank, pixels(), checkpoint=run, reference=held_out, options=options(**changes))
    for words in (["-n", "60", "-k", "60"], ["--samples", "digits"], ["-n", "60", "--manifold-neighbours", "60"]):
        result = CliRunner().invoke(main, ["evaluate", "-e", "pixels", *words])
        assert result.exit_code == 2, result.output


# ---- What is kept, and what is said


def test_real_images_are_embedded_once_for_all_checkpoints(bank: Path, held_out: Path) -> None:
    """A shared cache: a second evaluation embeds its samples alone; embeddings of earlier samples go with them."""
    calls: list[int] = []
    judge = pixels()
    encode = judge.encode
    judge.encode = lambda crops: calls.append(len(crops)) or encode(crops)
    run, counts = trained(), []
    for seed, out in ((0, "one"), (1, "two"), (2, "one")):
        sampling = gmem_gen.SampleConfig(num_steps=1, seed=seed)
        gmem_gen.evaluate(
            bank,
            judge,
            checkpoint=run,
            reference=held_out,
            options=options(),
            sampling=sampling,
            out=out,
            cache="shared",
        )
        counts.append(sum(calls))
        assert len(list(Path(out, ".cache/samples").glob("*.npy"))) == 2  # by the judge, and by the bank's encoder
    assert np.diff(counts).tolist() == [50, 50]
    assert counts[0] == 50 + 120 + 80


def test_a_report_says_what_was_compared(bank: Path, held_out: Path) -> None:
    """Hashes, versions and cost, and no option that did nothing."""
    drawn = gmem_gen.evaluate(bank, pixels(), checkpoint=trained(), reference=held_out, options=options()).to_json()
    given = gmem_gen.evaluate(bank, pixels(), samples="digits", reference=held_out, options=options()).to_json()
    assert drawn["samples"]["sampling"]["nfe"] == 4  # two steps of Heun
    assert drawn["samples"]["sampling"]["bank"] == gmem_bank.open(bank).fingerprint
    assert drawn["reference"]["pixels"] == given["reference"]["pixels"]
    assert given["samples"]["pixels"] == given["memorisation"]["pixels"] != given["reference"]["pixels"]
    assert drawn["versions"]["gmem"] == gmem_bank.__version__
    assert (drawn["options"]["num"], given["options"]["num"]) == (50, None)
    (held_out / "d0" / "0000.png").write_bytes(next(Path("digits/d0").glob("*.png")).read_bytes())
    changed = gmem_gen.evaluate(None, pixels(), samples="digits", reference=held_out, options=options()).to_json()
    assert changed["reference"]["pixels"] != given["reference"]["pixels"]


def test_kid_and_manifolds_have_sizes_of_their_own(bank: Path, held_out: Path) -> None:
    """Precision and recall of three neighbours, density and coverage of five; KID of forty subsets of twenty."""
    stages = {}
    report = gmem_gen.evaluate(
        None, pixels(), samples="digits", reference=held_out, watch=lambda stage: lambda *done: stages.update({stage: done}),
        options=options(manifold_neighbours=3, kid_subset_size=20, kid_subsets=40),
    )  # fmt: skip
    samples, real = embeddings("digits"), embeddings(held_out)
    expected = {k: neighbourhoods(samples, real, k=k).measures() for k in (3, 5)}
    for name, estimate in report.distribution.measures.items():
        k = 3 if name in ("precision", "recall") else 5
        assert estimate.value == pytest.approx(expected[k][name].mean())
        assert report.distribution.neighbours_of(name) == k
    found = report.to_json()["distribution"]
    assert (found["kid"]["subset_size"], found["kid"]["num_subsets"]) == (20, 40)
    assert (found["neighbours"], found["manifold_neighbours"]) == (5, 3)
    whole = kernel_distance(samples, real, rng=np.random.default_rng(0), subset_size=40)
    assert report.distribution.kid.estimate.value == pytest.approx(whole.estimate.value, rel=0.3)
    assert stages == {"embed samples": (120, 120), "embed reference": (80, 80), "compare": (3, 3)}


# ---- The command


def test_options_that_would_do_nothing_are_refused(bank: Path, held_out: Path) -> None:
    """Those of drawing beside samples, those of a bank without one."""
    words = ["evaluate", "--samples", "digits", "-e", "pixels", "-r", str(held_out), "-q"]
    for more, named in (
        (["--images", "digits"], "--images"),
        (["--near-copy", "0.1"], "--near-copy"),
        (["--bank-weights", "x"], "--bank-weights"),
        (["--checkpoint-weights", "ema"], "--checkpoint-weights"),
        (["-b", "bank.safetensors", "--checkpoint-weights", "model"], "--checkpoint-weights"),
        (["-c", "runs/bank"], "--checkpoint"),
        (["--concept", "d1"], "--concept"),
        (["--set", "sample.num_steps=3"], "--set sample.num_steps=3"),
    ):
        result = CliRunner().invoke(main, [*words, *more])
        assert result.exit_code == 2, result.output
        assert named in result.stderr
    result = CliRunner().invoke(main, [*words, "--set", "size=8", "--num", "60", "--bootstrap", "0", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["samples"]["count"] == 60


def test_the_command_shares_embeddings_in_the_run(bank: Path, held_out: Path) -> None:
    """Of a checkpoint as of its run; settings of sampling are those of its configuration with the line's over them."""
    run = Path(trained())
    words = ["evaluate", "-e", "pixels", "-n", "50", "-r", str(held_out), "--bootstrap", "0", "-q", "--json",
             "--set", "sample.method=euler"]  # fmt: skip
    for place in (run, next((run / "checkpoints").glob("step-*"))):
        result = CliRunner().invoke(main, [*words, "-c", str(place)])
        assert result.exit_code == 0, result.output
        sampling = json.loads(result.stdout)["samples"]["sampling"]
        assert (sampling["sample.method"], sampling["sample.num_steps"], sampling["nfe"]) == ("euler", 2, 2)
        out = run / ("evaluation" if place == run else f"evaluation-{place.name}")
        assert (out / "report.html").is_file()
    assert len(list((run / ".embeddings").glob("*.npy"))) == 3  # reference, training images, own images
    wrong = CliRunner().invoke(main, [*words, "-c", str(run), "--set", "sample.stepps=1"])
    assert wrong.exit_code == 2
