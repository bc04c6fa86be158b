from __future__ import annotations

import random
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf as gguf_library
import numpy
import pytest

from addenda.bases.gguf_header import Array, read_header
from addenda.errors import BaseModelError, UnsafeError

HUGE = 2**40


def test_a_sound_file_reads_as_the_gguf_library_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "sound.gguf"
    writer = gguf_library.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_float32("llama.rope.freq_base", 10000.0)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "é"])
    writer.add_array("tokenizer.ggml.scores", [0.5, 1.5])
    weights = numpy.random.randn(64, 128).astype(numpy.float32)
    packed = gguf_library.quants.quantize(weights, gguf_library.GGMLQuantizationType.Q4_1)
    writer.add_tensor("a.weight", packed, raw_dtype=gguf_library.GGMLQuantizationType.Q4_1)
    writer.add_tensor("b.bias", numpy.random.randn(7).astype(numpy.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    header, reference = read_header(path), gguf_library.GGUFReader(path)

    assert header.architecture == "llama"
    assert header.metadata["llama.block_count"] == 2
    assert header.metadata["llama.rope.freq_base"] == 10000.0
    assert header.metadata["tokenizer.ggml.add_bos_token"] is True
    assert header.metadata["tokenizer.ggml.tokens"] == Array(3)
    assert header.metadata["tokenizer.ggml.scores"] == Array(2)
    assert header.elements == 64 * 128 + 7
    assert header.formats() == {"Q4_1": 1, "F16": 1}
    for ours, theirs in zip(header.tensors, reference.tensors, strict=True):
        assert (ours.name, ours.start, ours.bytes) == (theirs.name, theirs.data_offset, theirs.n_bytes)
        assert ours.shape == tuple(int(side) for side in reversed(theirs.shape))
        assert ours.type == theirs.tensor_type.name


def set_magic(file) -> None:
    file.magic = b"GGML"


def set_version(file) -> None:
    file.version = 1


def set_big_endian(file) -> None:
    file.version = 3 << 24


def claim_tensors(file) -> None:
    file.counts = (HUGE, None)


def claim_more_tensors_than_there_are(file) -> None:
    file.counts = (60_000, None)


def claim_keys(file) -> None:
    file.counts = (None, 2**63)


def claim_more_keys_than_there_are(file) -> None:
    file.counts = (None, 4000)


def huge_key(file) -> None:
    file.keys.append(struct.pack("<Q", 2**62) + b"key")


def huge_string(file) -> None:
    file.keys.append(file.key("general.name", 8, file.text("x", length=2**31)))


def string_past_the_end(file) -> None:
    file.keys.append(file.key("general.name", 8, file.text("x", length=1_000_000)))


def not_utf8(file) -> None:
    file.keys.append(file.key("general.name", 8, file.text(b"\xff\xfe")))


def huge_array(file) -> None:
    file.keys.append(file.key("tokens", 9, struct.pack("<IQ", 8, HUGE)))


def array_past_the_end(file) -> None:
    file.keys.append(file.key("tokens", 9, struct.pack("<IQ", 4, 10_000_000)))


def nested_array(file) -> None:
    file.keys.append(file.key("tokens", 9, struct.pack("<IQ", 9, 1) * 1000))


def huge_item(file) -> None:
    file.keys.append(file.key("tokens", 9, struct.pack("<IQQ", 8, 1, 2**62)))


def item_past_the_end(file) -> None:
    file.keys.append(file.key("tokens", 9, struct.pack("<IQQ", 8, 1, 100_000)))


def unknown_value_type(file) -> None:
    file.keys.append(file.key("general.name", 99, b"\0" * 8))


def unknown_item_type(file) -> None:
    file.keys.append(file.key("tokens", 9, struct.pack("<IQ", 77, 1)))


def key_twice(file) -> None:
    file.keys.append(file.keys[0])


def no_architecture(file) -> None:
    file.keys = file.keys[1:]


def architecture_is_a_number(file) -> None:
    file.keys[0] = file.key("general.architecture", 4, b"\x01\0\0\0")


def too_many_blocks(file) -> None:
    file.keys[1] = file.key("llama.block_count", 4, struct.pack("<I", 2**31))


def no_blocks(file) -> None:
    file.keys = file.keys[:1]


def odd_alignment(file) -> None:
    file.keys.append(file.key("general.alignment", 4, struct.pack("<I", 33)))


def zero_alignment(file) -> None:
    file.keys.append(file.key("general.alignment", 4, struct.pack("<I", 0)))


def no_tensors(file) -> None:
    file.tensors = []


def tensor_past_the_end(file) -> None:
    file.tensors = [file.tensor("a", (32, 5), 0, 0)]


def offset_past_the_end(file) -> None:
    file.tensors = [file.tensor("a", (32, 4), 0, HUGE)]


def size_overflows_64_bits(file) -> None:
    # 2^33 * 2^31 values of 4 bytes are 2^66 bytes, 0 modulo 2^64
    file.tensors = [file.tensor("a", (2**33, 2**31), 0, 0)]


def offset_overflows_64_bits(file) -> None:
    file.tensors = [file.tensor("a", (32, 4), 0, 2**64 - 32)]


def too_many_dimensions(file) -> None:
    file.tensors = [file.tensor("a", (1,) * 5, 0, 0)]


def huge_rank(file) -> None:
    file.tensors = [file.tensor("a", (32,), 0, 0, rank=2**32 - 1)]


def empty_dimension(file) -> None:
    file.tensors = [file.tensor("a", (32, 0), 0, 0)]


def unknown_format(file) -> None:
    file.tensors = [file.tensor("a", (32, 4), 999, 0)]


def broken_blocks(file) -> None:
    file.tensors = [file.tensor("a", (33, 4), 3, 0)]  # Q4_1 comes in blocks of 32


def unaligned_offset(file) -> None:
    file.tensors = [file.tensor("a", (32, 1), 0, 8)]


def overlapping_tensors(file) -> None:
    file.tensors = [file.tensor("a", (32, 2), 0, 0), file.tensor("b", (32, 2), 0, 128)]


def tensor_twice(file) -> None:
    file.tensors = [file.tensor("a", (32, 2), 0, 0), file.tensor("a", (32, 2), 0, 256)]


HOSTILE = {
    BaseModelError: [
        set_magic,
        set_version,
        set_big_endian,
        string_past_the_end,
        not_utf8,
        array_past_the_end,
        item_past_the_end,
        unknown_value_type,
        unknown_item_type,
        key_twice,
        no_architecture,
        architecture_is_a_number,
        too_many_blocks,
        no_blocks,
        odd_alignment,
        zero_alignment,
        no_tensors,
        empty_dimension,
        unknown_format,
        broken_blocks,
        unaligned_offset,
        tensor_twice,
    ],
    UnsafeError: [
        claim_tensors,
        claim_more_tensors_than_there_are,  # the bytes that follow read as a giant name
        claim_more_keys_than_there_are,
        claim_keys,
        huge_key,
        huge_string,
        huge_array,
        nested_array,
        huge_item,
        tensor_past_the_end,
        offset_past_the_end,
        size_overflows_64_bits,
        offset_overflows_64_bits,
        too_many_dimensions,
        huge_rank,
        overlapping_tensors,
    ],
}
CASES = [(expected, lie) for expected, lies in HOSTILE.items() for lie in lies]


def test_the_file_the_lies_are_made_from_is_sound(gguf, tmp_path: Path) -> None:
    assert read_header(gguf.write(tmp_path / "sound.gguf")).elements == 128


@pytest.mark.parametrize(("expected", "lie"), CASES, ids=[lie.__name__ for _, lie in CASES])
def test_a_lie_is_refused_at_once_with_its_place(
    gguf, tmp_path: Path, expected: type[Exception], lie: Callable[..., None]
) -> None:
    lie(gguf)
    path = gguf.write(tmp_path / "hostile.gguf")
    tracemalloc.start()
    started = time.perf_counter()
    with pytest.raises(expected) as caught:
        read_header(path)
    taken, peak = time.perf_counter() - started, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert taken < 1.0
    assert peak < 16 * 2**20
    assert caught.value.where["file"] == path
    assert 0 <= caught.value.where["byte"] <= path.stat().st_size
    assert caught.value.hint


def test_a_file_cut_anywhere_is_refused(gguf, tmp_path: Path) -> None:
    gguf.keys.append(gguf.key("tokens", 9, struct.pack("<IQ", 8, 2) + gguf.text("a") + gguf.text("b")))
    whole = gguf.write(tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises((BaseModelError, UnsafeError)):
            read_header(path)


def test_flipped_bytes_give_a_header_or_a_typed_error(gguf, tmp_path: Path) -> None:
    whole = gguf.write(tmp_path / "whole.gguf").read_bytes()
    path, refused = tmp_path / "flipped.gguf", 0
    for _ in range(500):
        raw = bytearray(whole)
        for _ in range(random.choice([1, 1, 4])):
            raw[random.randrange(len(raw) - len(gguf.data))] = random.choice([0, 1, 0x7F, 0x80, 0xFF])
        path.write_bytes(raw)
        try:
            header = read_header(path)
        except (BaseModelError, UnsafeError):
            refused += 1
        else:
            assert all(tensor.start + tensor.bytes <= len(raw) for tensor in header.tensors)
    assert refused > 100
