from __future__ import annotations

import json
from pathlib import Path

import pytest

from addenda.bases import guard
from addenda.errors import BaseModelError, NotFoundError, UnsafeError

SOUND = {"model_type": "llama", "hidden_size": 64, "_attn_implementation": "sdpa", "auto_map": None}
DANGEROUS = {
    "auto_map": {"auto_map": {"AutoModel": "modeling_evil.Evil"}},
    "auto_map-empty": {"auto_map": {}},
    "trust_remote_code": {"trust_remote_code": True},
    "attention-internal": {"_attn_implementation_internal": "evil/kernels"},
    "attention-repository": {"_attn_implementation": "evil/kernels"},
    "attention-versioned": {"attn_implementation": "evil/kernels@main:run"},
    "attention-per-part": {"attn_implementation": {"text_config": "evil/kernels"}},
    "experts-repository": {"_experts_implementation": "evil/kernels"},
    "custom_code": {"custom_code": "evil.py"},
    "custom_generate": {"custom_generate": "evil/generate"},
    "custom_pipelines": {"custom_pipelines": {"x": {"impl": "evil.Pipe"}}},
    "weights-elsewhere": {"transformers_weights": "../../other.safetensors"},
    "kernels": {"use_kernels": True},
    "kernel-config": {"kernel_config": {"a": "evil/kernels"}},
    "nested": {"text_config": {"vision": [{"auto_map": {"AutoModel": "m.Evil"}}]}},
}


def written(folder: Path, value: object) -> Path:
    path = folder / "config.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_plain_settings_pass_unchanged(tmp_path: Path) -> None:
    assert guard.check_settings(written(tmp_path, SOUND)) == SOUND


@pytest.mark.parametrize("keys", DANGEROUS.values(), ids=DANGEROUS.keys())
def test_settings_that_can_bring_code_are_refused(tmp_path: Path, keys: dict[str, object]) -> None:
    with pytest.raises(UnsafeError, match="could run foreign code"):
        guard.check_settings(written(tmp_path, {**SOUND, **keys}))


def test_every_dangerous_key_is_named_at_once_with_its_place(tmp_path: Path) -> None:
    settings = {"trust_remote_code": False, "text_config": {"auto_map": {"AutoModel": "m.Evil"}}}
    with pytest.raises(UnsafeError) as caught:
        guard.check_settings(written(tmp_path, settings))
    assert "'trust_remote_code'" in caught.value.message
    assert "'text_config.auto_map'" in caught.value.message


@pytest.mark.parametrize(
    "text", ["", "[1]", "3", '"text"', "{", '{"a": 1', "[" * 100_000, "\x00", '{"a": 1e999}extra']
)
def test_what_is_no_json_object_is_a_typed_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(BaseModelError, match=r"'config\.json'"):
        guard.read_object(written(tmp_path, text))


def test_a_missing_or_giant_settings_file_is_a_typed_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NotFoundError, match="missing"):
        guard.read_object(tmp_path / "config.json")
    monkeypatch.setattr(guard, "MAX_JSON", 10)
    with pytest.raises(BaseModelError, match="larger than 10 bytes"):
        guard.read_object(written(tmp_path, SOUND))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt", "model.pkl"])
def test_pickled_weights_are_refused_and_never_read(tmp_path: Path, name: str) -> None:
    ran = tmp_path / "ran"
    (tmp_path / name).write_bytes(b"cposix\nsystem\n(S'touch " + str(ran).encode() + b"'\ntR.")
    with pytest.raises(UnsafeError, match=name) as caught:
        guard.weight_files(tmp_path)
    assert "save_pretrained" in caught.value.hint
    assert not ran.exists()


def test_safetensors_are_taken_even_beside_pickles(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert guard.weight_files(tmp_path) == [tmp_path / "model.safetensors"]


def test_shards_are_those_the_index_names(tmp_path: Path) -> None:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name in names:
        (tmp_path / name).write_bytes(b"weights")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": names[1], "b": names[0], "c": names[1]}}))
    assert guard.weight_files(tmp_path) == [tmp_path / name for name in names]
    (tmp_path / names[0]).unlink()
    with pytest.raises(BaseModelError, match=names[0]):
        guard.weight_files(tmp_path)


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/abs.safetensors", "a\\b.safetensors", "model.bin", 7]
)
def test_an_index_cannot_name_what_is_outside_its_folder(tmp_path: Path, name: object) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UnsafeError, match="no safetensors file of its folder"):
        guard.weight_files(tmp_path)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": []}])
def test_an_index_without_a_map_is_a_typed_error(tmp_path: Path, index: object) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BaseModelError, match="weight_map"):
        guard.weight_files(tmp_path)


def test_a_folder_without_weights_names_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "adapter.safetensors").write_bytes(b"")
    with pytest.raises(NotFoundError) as caught:
        guard.weight_files(tmp_path)
    assert caught.value.where["other safetensors files"] == "adapter.safetensors"
