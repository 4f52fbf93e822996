import errno
import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors import safe_open

from stackcomp import checkpoint
from stackcomp.core.errors import CheckpointError, OutputInUse
from tests import toys
from tests.nn.test_surgery import logits
from tests.test_quantizer import compress


@pytest.fixture
def inputs():
    return toys.batch(toys.tokenizer())


@pytest.fixture(params=[False, True], ids=["dense", "compressed"])
def model(request):
    model = toys.bert_classifier()
    return compress(model) if request.param else model


@pytest.fixture
def folder(model, tmp_path):
    checkpoint.save(
        model, tmp_path / "a", tokenizer=toys.tokenizer(), recipe={"seed": 1}, ledger={"rows": []}
    )
    return tmp_path / "a"


def test_round_trip_with_all_that_belongs_to_it(model, folder, inputs):
    again = checkpoint.load(folder)
    assert type(again) is type(model)
    assert not again.training
    assert torch.equal(logits(again, inputs), logits(model, inputs))
    assert json.loads((folder / "recipe.json").read_text()) == {"format": 1, "seed": 1}
    assert json.loads((folder / "ledger.json").read_text()) == {"format": 1, "rows": []}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer("the film was good")["input_ids"] == toys.tokenizer()("the film was good")["input_ids"]
    assert checkpoint.is_ours(folder)
    assert not checkpoint.is_ours(folder.parent)


def test_tensors_start_where_those_of_torch_do_however_they_lie_in_the_file(model, folder):
    """Products of others differ in their last bits on some processors."""
    given = [checkpoint.load(folder)]
    if "quantization_config" in json.loads((folder / "config.json").read_text()):
        given.append(transformers.AutoModelForSequenceClassification.from_pretrained(folder))
    for again in given:
        assert not [name for name, part in again.state_dict().items() if part.data_ptr() % 64]


WITHOUT_US = """
import sys, transformers
try:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
except OSError as error:
    sys.exit(f"refused: {error}")
assert "stackcomp" not in sys.modules
"""


def test_without_our_import_a_compressed_model_is_refused_and_a_plain_one_loads(model, folder):
    done = subprocess.run([sys.executable, "-c", WITHOUT_US, str(folder)], capture_output=True, text=True)
    compressed = "quantization_config" in json.loads((folder / "config.json").read_text())
    assert done.returncode == int(compressed), done.stderr
    assert ("refused" in done.stderr and "import_stackcomp_first" in done.stderr) is compressed


def test_saving_twice_gives_the_same_bytes(model, folder, tmp_path):
    checkpoint.save(
        checkpoint.load(folder),
        tmp_path / "b",
        tokenizer=toys.tokenizer(),
        recipe={"seed": 1},
        ledger={"rows": []},
    )
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_another_class(folder, model, inputs):
    base = checkpoint.load(folder, "AutoModel")
    assert isinstance(base, transformers.BertModel)
    with torch.no_grad():
        assert torch.equal(base(**inputs)[0], model.bert(**inputs)[0])
    assert isinstance(checkpoint.load(folder, transformers.AutoModel), transformers.BertModel)
    with pytest.raises(CheckpointError, match=r"lacks|missing"):
        checkpoint.load(folder, "AutoModelForMaskedLM")


def test_nothing_pickled(folder):
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}


@pytest.mark.parametrize("family", toys.FAMILIES)
@pytest.mark.parametrize("make", [toys.make, toys.classifier, toys.language_model])
@pytest.mark.parametrize("compressed", [False, True])
def test_components_sum_to_the_file(family, make, compressed, tmp_path):
    model = compress(make(family)) if compressed else make(family)
    seen = {}
    checkpoint.save(model, tmp_path / "a", ledger=lambda sizes: seen.update(sizes) or {})
    sizes = checkpoint.components(tmp_path / "a")
    assert sizes == seen == checkpoint.components(tmp_path / "a" / "model.safetensors")
    assert sum(sizes.values()) == (tmp_path / "a" / "model.safetensors").stat().st_size
    embedded = sum(module.weight.shape.numel() for module in embeddings(model))
    if compressed:
        rows = sum(module.weight.shape[0] for module in embeddings(model))
        assert sizes["embeddings"] == embedded + 4 * rows  # a byte a value, a float32 scale a row
        with safe_open(tmp_path / "a" / "model.safetensors", "pt") as file:
            packed = sum(file.get_tensor(name).nbytes for name in file.keys() if name.endswith(".support"))  # noqa: SIM118
        assert sizes["indices"] == packed > 0
        assert sizes["values"] > 0 < sizes["scales"]
    else:
        assert sizes["embeddings"] == 4 * embedded
        assert sizes["values"] == sizes["indices"] == sizes["scales"] == 0


def embeddings(model):
    return [
        module for module in model.modules() if type(module).__name__ in ("Embedding", "CompressedEmbedding")
    ]


def test_a_folder_in_use_is_refused(model, folder):
    with pytest.raises(OutputInUse, match="in use"):
        checkpoint.save(model, folder)
    checkpoint.verify(folder)


def test_an_empty_folder_may_be_written_to(model, tmp_path):
    (tmp_path / "a").mkdir()
    checkpoint.save(model, tmp_path / "a")
    checkpoint.verify(tmp_path / "a")


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "recipe.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", [cut, flip, os.unlink])
def test_damage_is_refused(folder, name, damage):
    damage(folder / name)
    with pytest.raises(CheckpointError, match=rf"{name}.*copy or save it again"):
        checkpoint.verify(folder)
    with pytest.raises(CheckpointError, match=name):
        checkpoint.load(folder)


@pytest.mark.parametrize("damage", [cut, flip])
def test_plain_transformers_refuses_altered_weights_too(damage, tmp_path):
    checkpoint.save(compress(toys.bert_classifier()), tmp_path / "a")
    damage(tmp_path / "a" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "a")


@pytest.mark.parametrize("name", ["recipe.json", "ledger.json", "stackcomp.json"])
def test_a_newer_version_is_refused(folder, name):
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | {"format": 2}))
    manifest = json.loads((folder / "stackcomp.json").read_text())
    if name != "stackcomp.json":
        manifest = checkpoint.manifest.describe(folder, manifest["files"], "9.0.0")
        (folder / "stackcomp.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="format 2, this version reads 1"):
        checkpoint.load(folder)


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"format": 1}', '{"format": 1, "files": {}}', '{"format": 1, "files": {"config.json": {}}}'],
)
def test_a_damaged_manifest_is_refused(folder, text):
    (folder / "stackcomp.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"damaged|format"):
        checkpoint.verify(folder)


def test_a_folder_that_is_not_ours_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="no checkpoint of stackcomp"):
        checkpoint.load(tmp_path / "file")
    with pytest.raises(CheckpointError, match="no checkpoint of stackcomp"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("calls", [0, 1, 3, 5])
def test_a_full_disk_leaves_nothing(model, tmp_path, monkeypatch, calls):
    real, left = os.fsync, [calls]

    def full(handle):
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= 1
        return real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(model, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_while_weights_are_written_leaves_nothing(model, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(model, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_publish_copies_beside_other_things(folder, tmp_path, model, inputs):
    place = tmp_path / "out"
    (place / "steps").mkdir(parents=True)
    for rows in ([1], [1, 2]):  # the second time over the first
        checkpoint.publish(folder, place, ledger={"rows": rows})
        assert json.loads((place / "ledger.json").read_text()) == {"format": 1, "rows": rows}
    assert torch.equal(logits(checkpoint.load(place), inputs), logits(model, inputs))
    assert (place / "steps").is_dir()
    assert sorted(path.name for path in place.iterdir()) == sorted(
        ["steps", *(path.name for path in folder.iterdir())]
    )
    checkpoint.verify(folder)


def test_publish_leaves_no_file_of_the_checkpoint_before(folder, tmp_path):
    place = tmp_path / "out"
    checkpoint.publish(folder, place, ledger={})
    assert (place / "tokenizer.json").is_file()
    (place / "notes.txt").write_text("mine")
    checkpoint.save(toys.bert_classifier(), tmp_path / "b")
    checkpoint.publish(tmp_path / "b", place, ledger={})
    beside = {path.name for path in (tmp_path / "b").iterdir()}
    assert {path.name for path in place.iterdir()} == beside | {"notes.txt"}


def test_a_publication_that_stops_half_way_is_no_checkpoint(folder, tmp_path, monkeypatch):
    place = tmp_path / "out"
    checkpoint.publish(folder, place, ledger={})
    monkeypatch.setattr(
        checkpoint, "write_atomic", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space"))
    )
    with pytest.raises(OSError, match="No space"):
        checkpoint.publish(folder, place, ledger={})
    assert not checkpoint.is_ours(place)
    with pytest.raises(CheckpointError):
        checkpoint.load(place)
