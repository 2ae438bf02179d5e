"""What `gmem-bank build` says to bad input: what is wrong, where, and what to do; nothing is built, and nothing is a traceback."""

from __future__ import annotations

import pickle
import shutil
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper

from gmem_bank.cli import main
from tests.gmem_bank.test_bad_sources import END, header, member
from tests.gmem_bank.test_hub_models import make_model


def picture(photos: Path) -> bytes:
    return min((path.read_bytes() for path in photos.rglob("*.jpg")), key=len)


def tar_with_a_long_member(photos: Path) -> list[str]:
    Path("x.tar").write_bytes(member("good.jpg", picture(photos)) + header("bad.jpg", 10 << 30) + b"abc" + END)
    return ["x.tar"]


def tar_with_a_long_header(photos: Path) -> list[str]:
    record = header("pax", 10 << 30, kind=tarfile.XHDTYPE)
    Path("x.tar").write_bytes(member("good.jpg", picture(photos)) + record + b"abc" + END)
    return ["x.tar"]


def key_twice_in_tars(photos: Path) -> list[str]:
    for name in ("1.tar", "2.tar"):
        Path(name).write_bytes(member("a.jpg", picture(photos)) + END)
    return ["?.tar"]


def key_twice_in_a_list(photos: Path) -> list[str]:
    line = next(photos.rglob("*.jpg")).relative_to(photos).as_posix()
    (photos / "x.txt").write_text(f"{line}\n{line}\n")
    return [str(photos / "x.txt")]


def key_twice_in_a_table(photos: Path) -> list[str]:
    pq.write_table(pa.table({"image": [picture(photos)] * 2, "id": ["k", "k"]}), "x.parquet")
    return ["x.parquet", "--key-column", "id"]


def table_without_images(photos: Path) -> list[str]:
    pq.write_table(pa.table({"text": ["a"], "n": [1]}), "x.parquet")
    return ["x.parquet"]


def network_of_words(photos: Path) -> list[str]:
    ids, mask, out = (helper.make_tensor_value_info(name, TensorProto.INT64, [1, 8]) for name in ("ids", "mask", "out"))
    graph = helper.make_graph([helper.make_node("Add", ["ids", "mask"], ["out"])], "g", [ids, mask], [out])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), "x.onnx")
    return [str(photos), "-e", "onnx:x.onnx"]


def model_of_words(photos: Path) -> list[str]:
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    BertModel(config).save_pretrained("model")
    return [str(photos), "-e", "hf:model"]


def weights_as_a_pickle(photos: Path) -> list[str]:
    make_model(Path("model"), "dinov2")
    Path("model/model.safetensors").unlink()
    Path("model/preprocessor_config.json").unlink()
    Path("model/pytorch_model.bin").write_bytes(pickle.dumps({}))
    return [str(photos), "-e", "hf:model"]


def pickle_in_the_hub(photos: Path) -> list[str]:
    """As the hub cache is where a repository has no safetensors: other weights were not fetched."""
    make_model(Path("model"), "dinov2")
    Path("model/model.safetensors").unlink()
    snapshot = Path("cache/snapshots") / ("0" * 40)
    shutil.copytree("model", snapshot)
    return [str(photos), "-e", "dinov2", "--weights", str(snapshot)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (tar_with_a_long_member, ["x.tar is not a readable tar", "unexpected end of data", "pack it anew"]),
        (tar_with_a_long_header, ["x.tar is not a readable tar", "pack it anew"]),
        (key_twice_in_tars, ["'a.jpg'", "1.tar and in 2.tar", "rename or remove one"]),
        (key_twice_in_a_list, ["x.txt names an image twice", "remove one line"]),
        (key_twice_in_a_table, ["two rows of x.parquet have the key 'k'", "leave --key-column out"]),
        (table_without_images, ["x.parquet has no column of images", "['text', 'n']", "--image-column"]),
        (network_of_words, ["x.onnx has the inputs ids tensor(int64) [1, 8], mask", "expected one input of images"]),
        (model_of_words, ["model holds a 'bert' model", "a vision model is needed"]),
        (
            weights_as_a_pickle,
            ["pytorch_model.bin, a pickle, which can run code", "convert the weights to safetensors"],
        ),
        (pickle_in_the_hub, ["no model.safetensors", "pickles such as", "can run code", "convert the weights"]),
    ],
)
def test_each_is_refused_in_one_line(photos: Path, make: Callable[[Path], list[str]], words: list[str]) -> None:
    """Exit status 1, one line on stderr, no bank and no half of one."""
    arguments = make(photos)
    own = [] if "-e" in arguments else ["-e", "pixels"]
    result = CliRunner().invoke(main, ["build", *arguments, *own, "-q", "-o", "bank.safetensors"])
    assert result.exit_code == 1, result.output
    [line] = [line for line in result.stderr.splitlines() if "Error" in line]
    assert line.startswith("Error: ")
    assert [word for word in words if word not in line] == []
    assert not list(Path().glob(".bank.safetensors.build"))
    assert not Path("bank.safetensors").exists()


def test_a_hostile_tar_gives_what_is_sound_in_it(photos: Path) -> None:
    """Absolute paths, links and pickles are listed on stderr with their reasons; the rest is built."""
    good = picture(photos)
    with tarfile.open("x.tar", "w") as archive:
        for name, data in (
            ("a/1.jpg", good),
            ("/etc/2.jpg", good),
            ("3.pkl", pickle.dumps(1)),
            ("4.jpg", pickle.dumps(1)),
        ):
            found = tarfile.TarInfo(name)
            found.size = len(data)
            archive.addfile(found, BytesIO(data))
        link = tarfile.TarInfo("5.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    result = CliRunner().invoke(main, ["build", "x.tar", "-e", "pixels", "-q"])
    assert result.exit_code == 0, result.output
    assert "1 rows" in result.stdout
    for words in (
        "/etc/2.jpg: its path leads out of its source", "3.pkl: not an image by its extension",
        "4.jpg: not a readable image", "5.jpg: a link or device in a tar file: never followed",
    ):  # fmt: skip
        assert words in result.stderr


def test_a_folder_that_changed_is_named_when_its_build_is_taken_up(photos: Path) -> None:
    """The finished batches of the folder as it was are said to be of no use."""
    import gmem_bank
    from tests.gmem_bank.test_changing_sources import Meddling

    with pytest.raises(KeyboardInterrupt):
        interrupted = Meddling(gmem_bank.load_encoder("pixels"), 4, lambda: True)
        gmem_bank.build(photos, interrupted, "bank.safetensors", batch_size=4)
    next(photos.rglob("*.jpg")).write_bytes(picture(photos))
    result = CliRunner().invoke(main, ["build", str(photos), "-e", "pixels", "--batch-size", "4", "-q"])
    assert result.exit_code == 0, result.output
    assert "does not list the images that it had" in result.stderr
    assert "3 finished batches" in result.stderr
