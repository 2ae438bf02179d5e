"""Weights outside an ONNX file: every name is found wherever the format allows one, and what is malformed is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import gmem_bank
from gmem_bank.encoders.onnx_external import external_names
from gmem_bank.errors import EncoderError
from tests.gmem_bank.test_onnx import DIM, SIDE, save_graph


def outside(name: str, tensor: str = "w") -> onnx.TensorProto:
    """A tensor whose numbers are in a file."""
    found = TensorProto(name=tensor, data_type=TensorProto.FLOAT, dims=[DIM], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", name), ("offset", "0"), ("length", str(4 * DIM))):
        found.external_data.add(key=key, value=value)
    return found


def number(value: int) -> bytes:
    """A variable-length integer."""
    return bytes([value & 0x7F | 0x80]) + number(value >> 7) if value > 0x7F else bytes([value])


def field(place: int, data: bytes) -> bytes:
    """A length-delimited field."""
    return number(place << 3 | 2) + number(len(data)) + data


def swapped(path: Path, name: str) -> None:
    """Write value before key, as the format allows."""
    key, value = field(1, b"location"), field(2, name.encode())
    data = path.read_bytes()
    assert data.count(key + value) == 1
    path.write_bytes(data.replace(key + value, value + key))


def test_the_order_of_fields_does_not_hide_a_name() -> None:
    """The same file in the other order is the same network: it counts, and is not looked for in the working folder."""
    save_graph(Path("net.onnx"), output="flat", external="net.data")
    crops = np.random.default_rng(0).integers(0, 256, (2, 256, 256, 3), dtype=np.uint8)
    expected = gmem_bank.load_encoder("onnx:net.onnx").encode(crops)
    swapped(Path("net.onnx"), "net.data")
    onnx.checker.check_model("net.onnx")
    encoder = gmem_bank.load_encoder("onnx:net.onnx")
    np.testing.assert_array_equal(encoder.encode(crops), expected)
    data = bytearray(Path("net.data").read_bytes())
    data[1] ^= 1
    Path("net.data").write_bytes(data)
    assert gmem_bank.load_encoder("onnx:net.onnx").spec.fingerprint != encoder.spec.fingerprint
    Path("deep").mkdir()
    Path("net.onnx").rename("deep/net.onnx")  # the data stay in the working folder
    with pytest.raises(EncoderError, match=r"keeps weights in 'net.data', which is not a file beside it"):
        gmem_bank.load_encoder("onnx:deep/net.onnx")


def test_a_branch_does_not_hide_a_name() -> None:
    """Weights of a subgraph count as others do."""
    branches = [
        helper.make_graph(
            [helper.make_node("Identity", ["w"], [f"{name}-out"])], name, [],
            [helper.make_tensor_value_info(f"{name}-out", TensorProto.FLOAT, [DIM])], [outside(f"{name}.data")],
        )
        for name in ("then", "else")
    ]  # fmt: skip
    nodes = [
        helper.make_node("If", ["yes"], ["added"], then_branch=branches[0], else_branch=branches[1]),
        helper.make_node("ReduceMean", ["x"], ["one"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("Unsqueeze", ["one", "axis"], ["column"]),
        helper.make_node("Add", ["column", "added"], ["y"]),
    ]
    constants = [numpy_helper.from_array(np.array(True), "yes"), numpy_helper.from_array(np.array([1]), "axis")]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", DIM])], constants,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    Path("deep").mkdir()
    Path("deep/net.onnx").write_bytes(model.SerializeToString())
    for folder in (".", "deep"):
        for name, value in (("then", 3.0), ("else", 4.0)):
            Path(folder, f"{name}.data").write_bytes(np.full(DIM, value, np.float32).tobytes())
    assert external_names(Path("deep/net.onnx").read_bytes()) == {"then.data", "else.data"}
    Path("deep/then.data").unlink()
    with pytest.raises(EncoderError, match=r"keeps weights in 'then.data', which is not a file beside it"):
        gmem_bank.load_encoder("onnx:deep/net.onnx")


def test_names_are_found_wherever_a_tensor_can_be() -> None:
    """In initializers, sparse ones, attributes, lists of them, functions, training graphs, and subgraphs of subgraphs."""
    names = [f"{place}.data" for place in range(12)]
    tensors = iter(outside(name) for name in names)

    def sparse() -> onnx.SparseTensorProto:
        return onnx.SparseTensorProto(values=next(tensors), indices=next(tensors), dims=[9])

    inner = helper.make_graph([helper.make_node("Constant", [], ["c"], value=next(tensors))], "inner", [], [])
    middle = helper.make_graph([helper.make_node("Loop", [], ["l"], body=inner)], "middle", [], [], [next(tensors)])
    node = helper.make_node("If", ["x"], ["y"], then_branch=middle)
    node.attribute.add(name="many", type=onnx.AttributeProto.TENSORS).tensors.append(next(tensors))
    node.attribute.add(name="graphs", type=onnx.AttributeProto.GRAPHS).graphs.add().initializer.append(next(tensors))
    node.attribute.add(name="thin", type=onnx.AttributeProto.SPARSE_TENSOR).sparse_tensor.CopyFrom(sparse())
    graph = helper.make_graph([node], "g", [], [], [next(tensors)])
    graph.sparse_initializer.append(sparse())
    model = helper.make_model(graph)
    function = model.functions.add(name="f")
    function.node.append(helper.make_node("Constant", [], ["c"], value=next(tensors)))
    function.attribute_proto.add(name="a", type=onnx.AttributeProto.TENSOR).t.CopyFrom(next(tensors))
    model.training_info.add().algorithm.initializer.append(next(tensors))
    assert next(tensors, None) is None
    assert external_names(model.SerializeToString()) == set(names)
    split = (
        field(7, graph.SerializeToString()) + model.SerializeToString()
    )  # a message in two parts is merged by parsers
    assert external_names(split) == set(names)


LOCATION = field(1, b"location")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (LOCATION + field(1, b"location") + field(2, b"w"), "key or value twice"),
        (LOCATION + field(2, b"a") + field(2, b"b"), "key or value twice"),
        (LOCATION + field(2, b"\xff\xfe"), "can't decode"),
        (LOCATION + number(2 << 3 | 2) + b"\x05w", "beyond its end"),
        (LOCATION + number(3 << 3 | 3), "wire type 3"), (b"\x00\x00", "no field 0"),
        (b"\x80" * 11, "more than ten bytes"), (b"\x08\x80", "ends within a number"), (b"\x09\x00", "beyond its end"),
        (number(1 << 32 | 2), "no field"),
    ],
)  # fmt: skip
def test_what_is_malformed_is_refused(entry: bytes, message: str) -> None:
    """Parsers differ in what they make of it, so it is read by none."""
    model = field(7, field(5, field(13, entry)))
    with pytest.raises(ValueError, match=message):
        external_names(model)
    Path("net.onnx").write_bytes(model)
    with pytest.raises(EncoderError, match="is not a network that onnxruntime can load"):
        gmem_bank.load_encoder("onnx:net.onnx")


def test_a_location_without_a_value_is_no_file() -> None:
    """An absent value is the empty string, which names nothing beside the file."""
    assert external_names(field(7, field(5, field(13, LOCATION)))) == {""}
    assert external_names(field(7, field(5, field(13, field(1, b"offset") + field(2, b"0"))))) == set()
    assert external_names(b"") == set()
