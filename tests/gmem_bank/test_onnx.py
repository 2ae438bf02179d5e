"""Encoders in ONNX files: the numbers of the graph, whatever its layout, and a clear word for what is no encoder."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.nn import functional

import gmem_bank
from gmem_bank.errors import EncoderError, EncoderMismatchError

SIDE, DIM, GRID = 32, 5, 4
KERNEL = np.random.default_rng(0).standard_normal((DIM, 3, 8, 8)).astype(np.float32)


def save_graph(
    path: Path, *, batch: object = "batch", layout: str = "nchw", output: str = "map", dtype: int = TensorProto.FLOAT,
    channels: int = 3, external: str | None = None, dim: int = 4,
) -> None:  # fmt: skip
    """A convolution of 8×8 patches, given as a map, as tokens or as their mean."""
    numbers = KERNEL.astype(np.float16) if dtype == TensorProto.FLOAT16 else KERNEL
    kernel = numpy_helper.from_array(numbers[:, :channels], "kernel")
    nodes, found = [], "x"
    if layout == "nhwc":
        nodes.append(helper.make_node("Transpose", ["x"], ["first"], perm=[0, 3, 1, 2]))
        found = "first"
    nodes.append(helper.make_node("Conv", [found, "kernel"], ["map"], kernel_shape=[8, 8], strides=[8, 8]))
    shapes = {"map": [batch, DIM, GRID, GRID], "tokens": [batch, GRID * GRID, DIM], "flat": [batch, DIM]}
    nodes.append(helper.make_node("Reshape", ["map", "form"], ["rows"]))
    nodes.append(helper.make_node("Transpose", ["rows"], ["tokens"], perm=[0, 2, 1]))
    nodes.append(helper.make_node("GlobalAveragePool", ["map"], ["pooled"]))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["flat"]))
    form = numpy_helper.from_array(np.array([0, DIM, GRID * GRID], np.int64), "form")
    side = [batch, SIDE, SIDE, channels] if layout == "nhwc" else [batch, channels, SIDE, SIDE]
    outputs = [helper.make_tensor_value_info(n, dtype, shapes[n]) for n in output.split("+")]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", dtype, side[:dim])], outputs, [kernel, form]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    if external:
        onnx.save(model, path, save_as_external_data=True, location=external, size_threshold=100)
    else:
        onnx.save(model, path)


def expected_map(crops: np.ndarray) -> np.ndarray:
    """The same by PyTorch, from pixels in 0..1 normalised and resized as GMem does."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels = (torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 255 - mean) / std
    pixels = functional.interpolate(pixels, size=(SIDE, SIDE), mode="bicubic", align_corners=False)
    return functional.conv2d(pixels, torch.from_numpy(KERNEL), stride=8).numpy()


@pytest.fixture
def crops() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (5, 256, 256, 3), dtype=np.uint8)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("batch", ["batch", 1, 2])
@pytest.mark.parametrize("output", ["map", "tokens", "flat"])
def test_the_numbers_are_those_of_the_graph(crops: np.ndarray, layout: str, batch: object, output: str) -> None:
    """Of either layout, for open and fixed batch sizes; maps and tokens are pooled."""
    save_graph(Path("net.onnx"), batch=batch, layout=layout, output=output)
    encoder = gmem_bank.load_encoder("onnx:net.onnx", parameters={"pooling": "mean", "num_special_tokens": 0})
    expected = expected_map(crops).mean(axis=(2, 3))
    assert encoder.spec.dim == DIM
    np.testing.assert_allclose(encoder.encode(crops), expected, atol=1e-4)
    assert encoder.best_batch_size() == (32 if batch == "batch" else batch)


def test_poolings_of_tokens_and_choice_of_output(crops: np.ndarray) -> None:
    """cls is the first token, mean leaves special ones out; of several outputs one is chosen by name."""
    save_graph(Path("net.onnx"), output="map+tokens")
    with pytest.raises(EncoderError, match=r"has the outputs \['map', 'tokens'\]: --set output=NAME"):
        gmem_bank.load_encoder("onnx:net.onnx")
    tokens = expected_map(crops).reshape(5, DIM, -1).transpose(0, 2, 1)
    load = lambda **parameters: gmem_bank.load_encoder("onnx:net.onnx", parameters={"output": "tokens", **parameters})  # noqa: E731
    np.testing.assert_allclose(load().encode(crops), tokens[:, 0], atol=1e-4)
    np.testing.assert_allclose(load(pooling="mean").encode(crops), tokens[:, 1:].mean(1), atol=1e-4)
    both = load(pooling="cls+mean").encode(crops)
    np.testing.assert_allclose(both, np.hstack([tokens[:, 0], tokens[:, 1:].mean(1)]), atol=1e-4)
    np.testing.assert_allclose(load().encode_tokens(crops), tokens[:, 1:], atol=1e-4)


def test_half_precision_and_other_normalisations(crops: np.ndarray) -> None:
    """A float16 graph is fed float16; `normalise` changes what it sees, and the fingerprint."""
    save_graph(Path("half.onnx"), output="flat", dtype=TensorProto.FLOAT16)
    encoder = gmem_bank.load_encoder("onnx:half.onnx")
    expected = expected_map(crops).mean(axis=(2, 3))
    np.testing.assert_allclose(encoder.encode(crops), expected, atol=0.05)
    other = gmem_bank.load_encoder("onnx:half.onnx", parameters={"normalise": "half"})
    assert other.spec.preprocessing["mean"] == [0.5, 0.5, 0.5]
    assert other.spec.fingerprint != encoder.spec.fingerprint


def test_a_bank_finds_its_file_again_and_refuses_another(photos: Path, new_photos: Path, tmp_path: Path) -> None:
    """Through build, insert and a move of file and bank together; other weights are another encoder."""
    save_graph(tmp_path / "net.onnx", output="flat")
    bank = tmp_path / "b.safetensors"
    gmem_bank.build(photos, gmem_bank.load_encoder(f"onnx:{tmp_path / 'net.onnx'}"), bank)
    opened = gmem_bank.open(bank)
    assert (opened.encoder.name, opened.encoder.weights_path) == ("onnx:net.onnx", "net.onnx")
    gmem_bank.insert_concept(bank, [new_photos], gmem_bank.reload_encoder(opened.encoder, opened.folder))
    model = onnx.load(tmp_path / "net.onnx")
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(2 * KERNEL, "kernel"))
    onnx.save(model, tmp_path / "net.onnx")
    with pytest.raises(EncoderMismatchError, match="weights sha256"):
        gmem_bank.reload_encoder(opened.encoder, opened.folder)


def test_weights_beside_the_file_are_part_of_the_fingerprint(crops: np.ndarray) -> None:
    """External data count, under whatever name beside the file; names that lead elsewhere are refused."""
    save_graph(Path("net.onnx"), output="flat", external="net.onnx.data")
    encoder = gmem_bank.load_encoder("onnx:net.onnx")
    np.testing.assert_allclose(encoder.encode(crops), expected_map(crops).mean(axis=(2, 3)), atol=1e-4)
    data = bytearray(Path("net.onnx.data").read_bytes())
    data[1] ^= 1
    Path("net.onnx.data").write_bytes(data)
    assert gmem_bank.load_encoder("onnx:net.onnx").spec.fingerprint != encoder.spec.fingerprint
    Path("net.onnx.data").rename("moved.data")
    with pytest.raises(EncoderError, match=r"keeps weights in 'net.onnx.data', which is not a file beside it"):
        gmem_bank.load_encoder("onnx:net.onnx")
    Path("deep").mkdir()
    Path("moved.data").rename("net.onnx.data")  # in the working folder, where the runtime itself would look
    Path("net.onnx").rename("deep/net.onnx")
    with pytest.raises(EncoderError, match="not a file beside it"):
        gmem_bank.load_encoder("onnx:deep/net.onnx")
    data = Path("deep/net.onnx").read_bytes()
    Path("deep/far.onnx").write_bytes(data.replace(b"net.onnx.data", b"../t.onnx.dat"))
    Path("t.onnx.dat").write_bytes(Path("net.onnx.data").read_bytes())
    with pytest.raises(EncoderError, match="not a file beside it"):
        gmem_bank.load_encoder("onnx:deep/far.onnx")


@pytest.mark.parametrize(
    ("facts", "parameters", "message"),
    [
        ({"channels": 1}, {}, r"input x tensor\(float\) .*expected one input of images"),
        ({"dim": 3}, {}, "inputs x .*expected one input|is not a network that onnxruntime can load"),
        ({"dtype": TensorProto.DOUBLE}, {}, r"tensor\(double\).*expected one input|can load"),
        ({}, {"input_size": 224}, "takes images of 32 pixels, not 224"),
        ({}, {"pooling": "max"}, "pooling must be one of cls, mean"),
        ({}, {"output": "gone"}, "has the outputs"),
        ({}, {"colour": 1}, "has no parameter 'colour'"),
        ({}, {"preset": "native"}, "needs a usable .*preprocessor_config.json"),
        ({}, {"num_special_tokens": -1}, "must be a whole number"),
    ],
)
def test_wrong_inputs_and_parameters_are_named(facts: dict, parameters: dict, message: str) -> None:
    """What the file has, what is expected, and which option changes it."""
    save_graph(Path("net.onnx"), output="flat", **facts)
    with pytest.raises(EncoderError, match=message):
        gmem_bank.load_encoder("onnx:net.onnx", parameters=parameters)


def test_what_is_no_onnx_file_is_refused() -> None:
    """Noise, a file that was cut, none at all, and a device that this runtime lacks."""
    Path("noise.onnx").write_bytes(b"\x00noise" * 100)
    save_graph(Path("net.onnx"), output="flat")
    Path("cut.onnx").write_bytes(Path("net.onnx").read_bytes()[:-40])
    for name in ("noise", "cut"):
        with pytest.raises(EncoderError, match="is not a network that onnxruntime can load"):
            gmem_bank.load_encoder(f"onnx:{name}.onnx")
    with pytest.raises(EncoderError, match=r"no file gone.onnx"):
        gmem_bank.load_encoder("onnx:gone.onnx")
    with pytest.raises(EncoderError, match="has no 'mps'"):
        gmem_bank.load_encoder("onnx:net.onnx", device="mps")


class Runtime:
    """An onnxruntime that says it has CUDA, and starts it or not."""

    def __init__(self, *, starts: bool) -> None:
        import onnxruntime

        self.real, self.starts, self.asked = onnxruntime, starts, None
        self.SessionOptions, self.__version__ = onnxruntime.SessionOptions, onnxruntime.__version__

    def get_available_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def InferenceSession(self, model: bytes, options: object, providers: list) -> object:
        self.asked = providers
        session = self.real.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        active = self.get_available_providers() if self.starts else ["CPUExecutionProvider"]
        session.get_providers = lambda: active
        return session


@pytest.mark.parametrize(("device", "number"), [("cuda", 0), ("cuda:1", 1), ("cuda:12", 12), ("auto", 0)])
def test_the_gpu_asked_for_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch, device: str, number: int) -> None:
    """Its number reaches the runtime; where CUDA does not start, only "auto" goes on without it."""
    save_graph(Path("net.onnx"), output="flat")
    for starts in (True, False):
        runtime = Runtime(starts=starts)
        monkeypatch.setitem(sys.modules, "onnxruntime", runtime)
        if starts or device == "auto":
            assert gmem_bank.load_encoder("onnx:net.onnx", device=device).spec.dim == DIM
        else:
            with pytest.raises(
                EncoderError, match=rf"could not start it on '{device}' \(running: CPUExecutionProvider\)"
            ):
                gmem_bank.load_encoder("onnx:net.onnx", device=device)
        assert runtime.asked == [("CUDAExecutionProvider", {"device_id": number}), "CPUExecutionProvider"]
