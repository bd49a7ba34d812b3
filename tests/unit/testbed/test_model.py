"""The embedded model's folder: its tokens, its adapter, and when it is built again."""

import json

import pytest
import torch

from spo.errors import EngineError
from spo.testbed import model, smollm


@pytest.fixture(scope="module")
def gguf():
    return smollm.language_model_file()


@pytest.fixture(scope="module")
def tokenizer(gguf):
    return smollm.read_tokenizer(gguf)


def test_the_picture_is_one_token_in_place_of_another(tokenizer):
    ids = tokenizer.encode(model.chat_prompt("Hi"))
    assert len(tokenizer) == 49_152
    assert ids.count(smollm.IMAGE_TOKEN_ID) == 1
    assert (
        tokenizer.decode(ids) == "<|im_start|>user\n<image>\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_chat_template_writes_what_chat_prompt_writes(tokenizer):
    content = [{"type": "image"}, {"type": "text", "text": "Who?"}]
    written = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    assert written == model.chat_prompt("Who?")
    plain = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Who?"}], tokenize=False, add_generation_prompt=True
    )
    assert plain == model.chat_prompt("Who?", image=False)


def test_prompts_pad_on_the_left(tokenizer):
    batch = tokenizer(["a", "a b c"], padding=True)
    assert batch["attention_mask"][0] == [0, 0, 1]


def test_rotary_permutation_is_undone():
    # Two heads of width 4: GGUF interleaves the halves, [0, 2, 1, 3] within a head.
    stored = torch.tensor([0, 2, 1, 3, 4, 6, 5, 7]).reshape(8, 1).float().numpy()
    assert smollm._undo_rotary_permutation(stored, 2).ravel().tolist() == list(range(8))


def test_the_adapter_is_added_with_its_scale():
    state = {"model.layers.3.mlp.up_proj.weight": torch.ones(4, 2)}
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [0.0], [0.0], [-1.0]])
    model.merge_adapter(state, {"lora.3.mlp.up_proj.a": a, "lora.3.mlp.up_proj.b": b})
    assert state["model.layers.3.mlp.up_proj.weight"].tolist() == [[3, 5], [1, 1], [1, 1], [-1, -3]]


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(smollm, "_PACKAGE", "no_such_package_at_all")
    with pytest.raises(EngineError, match="extra `cpu` or `gpu`"):
        smollm.language_model_file()


def test_missing_weights_say_how_to_get_them(tmp_path):
    with pytest.raises(EngineError, match="train-vlm"):
        model.read_weights(tmp_path / "absent.safetensors")


@pytest.fixture
def cheap_build(monkeypatch, tmp_path):
    """Real inputs' digests and the real cache, but a folder that takes no time to write."""
    gguf, weights, built = tmp_path / "lm.gguf", tmp_path / "vlm.safetensors", []
    gguf.write_bytes(b"language model")
    weights.write_bytes(b"weights")

    def write_folder(folder, *_):
        built.append(folder)
        (folder / "model.safetensors").write_bytes(b"tensors")

    monkeypatch.setattr(model, "language_model_file", lambda: gguf)
    monkeypatch.setattr(model, "WEIGHTS_FILE", weights)
    monkeypatch.setattr(model, "write_folder", write_folder)
    return weights, built


def test_assemble_builds_once(cheap_build, tmp_path):
    _, built = cheap_build
    cache = tmp_path / "cache"
    folder = model.assemble(cache, progress=False)
    assert model.assemble(cache, progress=False) == folder
    assert len(built) == 1
    assert [path.name for path in cache.iterdir()] == [folder.name]
    marker = json.loads((folder / model.MARKER).read_text())
    assert set(marker["files"]) == {"model.safetensors"}


@pytest.mark.parametrize("damage", ["content", "missing", "marker"])
def test_a_damaged_folder_is_built_again(cheap_build, tmp_path, damage):
    _, built = cheap_build
    folder = model.assemble(tmp_path / "cache", progress=False)
    if damage == "content":
        (folder / "model.safetensors").write_bytes(b"tensorz")
    elif damage == "missing":
        (folder / "model.safetensors").unlink()
    else:
        (folder / model.MARKER).write_text("{")
    assert model.assemble(tmp_path / "cache", progress=False) == folder
    assert len(built) == 2
    assert (folder / "model.safetensors").read_bytes() == b"tensors"


def test_other_weights_give_another_folder(cheap_build, tmp_path):
    weights, _ = cheap_build
    folder = model.assemble(tmp_path / "cache", progress=False)
    weights.write_bytes(b"other weights")
    assert model.assemble(tmp_path / "cache", progress=False) != folder


def test_a_build_that_fails_leaves_nothing(cheap_build, tmp_path, monkeypatch):
    def broken(folder, *_):
        (folder / "half").write_text("x")
        raise OSError("disk full")

    monkeypatch.setattr(model, "write_folder", broken)
    with pytest.raises(OSError, match="disk full"):
        model.assemble(tmp_path / "cache", progress=False)
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_shipped_weights_fit_the_architecture(gguf):
    stored = model.read_weights(model.WEIGHTS_FILE)
    assert model.WEIGHTS_FILE.stat().st_size < 20 * 2**20
    config = smollm._text_config(_reader(gguf))
    adapted = [name for name in stored if name.startswith("lora.")]
    assert len(adapted) == 2 * config.num_hidden_layers * len(model.LORA_MODULES)
    assert stored["multi_modal_projector.linear_2.weight"].shape == (576, 576)
    assert all(torch.isfinite(value).all() for value in stored.values())


def _reader(gguf):
    from gguf import GGUFReader

    return GGUFReader(gguf)
