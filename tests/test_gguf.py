"""Models in GGUF files: loaded dequantised, with their tokenizer, or refused with the reason."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.testing import assert_close

import tl_scopes as tls
from tl_scopes import models

gguf = pytest.importorskip("gguf")

WIDTH, VOCAB = 32, 40


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return written(tmp_path / "small.gguf")


def written(path: Path, tokenizer: bool = True) -> Path:
    """A random Llama of two layers, with a tokenizer of letters."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(2)
    writer.add_feed_forward_length(2 * WIDTH)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(["<unk>", "<s>", "</s>", "AB", *(chr(ord("A") + i) for i in range(VOCAB - 4))])
        writer.add_token_types([3] * 3 + [1] * (VOCAB - 3))
        writer.add_token_merges(["A B"])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
    random = np.random.default_rng(0)
    heads = {"attn_q": (WIDTH, WIDTH), "attn_k": (16, WIDTH), "attn_v": (16, WIDTH), "attn_output": (WIDTH, WIDTH)}
    mlp = {"ffn_gate": (2 * WIDTH, WIDTH), "ffn_up": (2 * WIDTH, WIDTH), "ffn_down": (WIDTH, 2 * WIDTH)}
    norms = {"attn_norm": (WIDTH,), "ffn_norm": (WIDTH,)}
    shapes = {"token_embd": (VOCAB, WIDTH), "output": (VOCAB, WIDTH), "output_norm": (WIDTH,)}
    shapes |= {f"blk.{i}.{name}": shape for i in range(2) for name, shape in (heads | mlp | norms).items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", (0.3 * random.standard_normal(shape)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_file_or_its_folder(file: Path) -> None:
    """Both are the same model, and its scores are found as anywhere else."""
    answers = [tls.attribute(models.load(path), "ABBA", tls.SemanticScope()) for path in (file, file.parent)]
    assert answers[0].str_tokens[-3:] == ("AB", "B", "A")
    assert answers[0].scores.all()
    assert_close(answers[0].scores, answers[1].scores, rtol=0, atol=0)


def test_names(file: Path, tmp_path: Path) -> None:
    """Files of one folder have names of their own, and so have files of one name, whatever stands beside them."""
    other = written(tmp_path / "other.gguf")
    far = tmp_path / "far" / "model"
    cached = tmp_path / "models--owner--a-model" / "snapshots" / "0123abcd"
    for folder in (far, cached):
        folder.mkdir(parents=True)
    parts = "/".join(tmp_path.absolute().parts[-2:])
    expected = {
        file: f"file {parts}/small.gguf",
        other: f"file {parts}/other.gguf",
        written(far / "small.gguf"): "file far/model/small.gguf",
        written(cached / "small.gguf"): "owner/a-model/small.gguf",
    }
    (tmp_path / "config.json").write_text('{"_name_or_path": "owner/model"}')
    assert {path: models.model_name(models.load(path)) for path in expected} == expected


def test_called(file: Path) -> None:
    """A model from a GGUF file has the name that it was given, as any other."""
    assert models.model_name(models.load(file, called="letters")) == "letters"


def test_the_command(file: Path, capsys: Any) -> None:
    from typer.testing import CliRunner

    from tl_scopes.cli import app

    result = CliRunner().invoke(app, ["ABBA", "--model", str(file)])
    assert result.exit_code == 0
    assert "AB" in result.output


def test_a_file_without_tokenizer(tmp_path: Path, tiny: Any) -> None:
    """It is refused, unless the tokenizer lies beside it."""
    file = written(tmp_path / "bare.gguf", tokenizer=False)
    with pytest.raises(ValueError, match=r"no tokenizer can be read from '.*bare.gguf': .*tokenizer\.save_pretrained"):
        models.load(file)
    tiny.tokenizer.save_pretrained(tmp_path)
    assert models.load(file).tokenizer.vocab_size == tiny.tokenizer.vocab_size


def test_no_gguf_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = file.with_name("other.gguf")
    other.write_bytes(b"GGUF, but no more")
    with pytest.raises(ValueError, match=r"has 2 GGUF files: give the path of one, '.*other.gguf' say"):
        models.load(file.parent)
    with pytest.raises(ValueError, match=r"no tokenizer can be read from '.*other.gguf'"):
        models.load(other)
    (file.parent / "tokenizer_config.json").write_text("{}")
    other.write_bytes(b"safetensors")
    with pytest.raises(ValueError, match=r"'.*other.gguf' is not a GGUF file, in spite of its name"):
        models.load(other)
    monkeypatch.setattr("tl_scopes.models.loading.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"takes the package gguf, which is not installed: pip install gguf"):
        models.load(file)


def test_a_broken_file(file: Path, tiny: Any) -> None:
    tiny.tokenizer.save_pretrained(file.parent)
    file.write_bytes(file.read_bytes()[:5_000])
    with pytest.raises(ValueError, match=r"cannot load the GGUF file '.*small.gguf': .* or check that it is whole"):
        models.load(file)
