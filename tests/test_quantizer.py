import json
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from stackcomp import nn
from stackcomp.core.errors import CheckpointError
from tests import toys
from tests.nn.test_surgery import linear_ids, logits, low_rank, shared_model

POOLERLESS = ("roberta", "mpnet")  # their classifiers have no pooler, their base models want one


def compress(model):
    """A bit of everything: each weight of the model in another form."""
    forms = [
        lambda id_: nn.quantize(model, id_, dynamic=False),
        lambda id_: nn.quantize(model, id_, dynamic=True),
        lambda id_: nn.sparsify(model, id_, lambda matrix: matrix.abs() > 0.1),
        lambda id_: low_rank(model, id_, 4),
        lambda id_: (low_rank(model, id_, 5, transposed=True), nn.quantize(model, id_, dynamic=True)),
        lambda id_: dense_sparse(model, id_, transposed=False),
        lambda id_: (dense_sparse(model, id_, transposed=True), nn.quantize(model, id_, dynamic=False)),
        lambda id_: split(model, id_),
        lambda id_: tile(model, id_),
    ]
    for place, id_ in enumerate(linear_ids(model)):
        forms[place % len(forms)](id_)
    for id_, handle in nn.weights(model).items():
        if handle.spec.kind == "embedding":
            nn.quantize(model, id_, dynamic=False)
    return model


def dense_sparse(model, id_, transposed):
    spec = nn.weights(model)[id_].spec
    n, m = (spec.cols, spec.rows) if transposed else (spec.rows, spec.cols)
    blocks = 2 if m % 2 == 0 else 1
    generator = torch.Generator().manual_seed(0)
    support = torch.rand(n, blocks, 6, generator=generator).argsort(-1)[..., :2].sort(-1).values
    nn.factorize(
        model,
        id_,
        basis=torch.randn(6 * blocks, m // blocks, generator=generator),
        values=torch.randn(n, blocks, 2, generator=generator) / 4,
        support=support,
        transposed=transposed,
    )


def split(model, id_):
    weight = nn.weights(model)[id_].dense()
    basis, coefficients = torch.ones(2, weight.shape[1]) / 8, torch.ones(len(weight), 2) / 8
    nn.split(model, id_, rest=weight, kept=weight > 0, basis=basis, coefficients=coefficients)


def tile(model, id_):
    spec = nn.weights(model)[id_].spec
    generator = torch.Generator().manual_seed(0)
    coefficients = torch.randn(2, spec.rows, spec.cols // 4, generator=generator) / 4
    nn.tile(model, id_, basis=torch.randn(2, 1, 4, generator=generator), coefficients=coefficients)


def a_tiled(ours):
    """The description of a weight that is a sum of Kronecker products."""
    return next(weight for weight in ours["weights"].values() if "tile" in weight)


def a_sum(ours):
    """The matrices of a sum in a description."""
    return next(weight["matrices"] for weight in ours["weights"].values() if len(weight["matrices"]) == 3)


@pytest.fixture
def inputs():
    return toys.batch(toys.tokenizer())


@pytest.fixture
def saved(tmp_path):
    """A compressed classifier on disk."""
    model = compress(toys.bert_classifier())
    model.save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [toys.classifier, toys.language_model])
@pytest.mark.parametrize("family", toys.FAMILIES)
def test_round_trip(family, make, dtype, inputs, tmp_path):
    make(family).save_pretrained(tmp_path / "dense")
    cls = type(make(family))
    model = compress(cls.from_pretrained(tmp_path / "dense", dtype=dtype))
    model.save_pretrained(tmp_path / "one")
    again = cls.from_pretrained(tmp_path / "one")
    assert again.dtype == dtype
    assert torch.equal(logits(again, inputs), logits(model, inputs))
    assert {id_: h.spec for id_, h in nn.weights(again).items()} == {
        id_: h.spec for id_, h in nn.weights(model).items()
    }
    again.save_pretrained(tmp_path / "two")
    assert (tmp_path / "one/model.safetensors").read_bytes() == (
        tmp_path / "two/model.safetensors"
    ).read_bytes()
    assert (tmp_path / "one/config.json").read_bytes() == (tmp_path / "two/config.json").read_bytes()


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_saved_with_a_head_and_loaded_without(family, inputs, tmp_path):
    model = compress(toys.classifier(family))
    model.save_pretrained(tmp_path)
    options = {"add_pooling_layer": False} if family in POOLERLESS else {}
    base = transformers.AutoModel.from_pretrained(tmp_path, **options)
    with torch.no_grad():
        assert torch.equal(base(**inputs)[0], model.base_model(**inputs)[0])


@pytest.mark.parametrize("family", POOLERLESS)
def test_a_base_model_with_parts_that_were_not_saved_is_refused(family, tmp_path):
    compress(toys.classifier(family)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"lacks pooler\..*add_pooling_layer=False"):
        transformers.AutoModel.from_pretrained(tmp_path)


def test_a_new_head_may_be_put_on_a_base_model(tmp_path, inputs):
    compress(toys.make("bert")).save_pretrained(tmp_path)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    assert logits(model, inputs).shape == (4, 5)


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_loaded_in_another_dtype(family, inputs, tmp_path):
    model = compress(toys.classifier(family))
    model.save_pretrained(tmp_path)
    narrow = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    expected = logits(model, inputs)
    assert (logits(narrow, inputs).float() - expected).norm() <= 0.1 * expected.norm()


def test_tensors_are_saved_once(tmp_path):
    model = compress(toys.gpt2_lm())
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert sum(part.nbytes for part in tensors.values()) == sum(part.nbytes for part in unique(model))
    assert not any(name.startswith("lm_head") for name in tensors)


def unique(model):
    return {id(part): part for part in model.state_dict(keep_vars=True).values()}.values()


def test_shared_layers_stay_shared(tmp_path):
    model = shared_model()
    for id_ in ("encoder.layer.0.output.dense", "twin"):
        nn.quantize(model, id_, dynamic=False)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(again(ids)[0], model(ids)[0])
        again.encoder.layer[0].output.dense.matrices["weight"].scales.zero_()
    assert not again.encoder.layer[1].output.dense.dense().any()
    assert nn.weights(again)["twin"].spec.paths == ("twin", "sibling")


@pytest.mark.parametrize("missing", ["values", "scales", "support"])
def test_a_missing_tensor_is_refused(saved, missing):
    def drop(tensors):
        del tensors[next(name for name in sorted(tensors) if name.endswith(f".{missing}"))]

    rewrite(saved, drop)
    with pytest.raises(CheckpointError, match=rf"lacks .*\.{missing}"):
        transformers.AutoModelForSequenceClassification.from_pretrained(saved)


def test_a_missing_plain_tensor_is_refused(saved):
    rewrite(saved, lambda tensors: tensors.pop("classifier.bias"))
    with pytest.raises(CheckpointError, match=r"lacks classifier\.bias"):
        transformers.AutoModelForSequenceClassification.from_pretrained(saved)


def test_an_unexpected_tensor_is_refused(saved):
    rewrite(saved, lambda tensors: tensors.update(extra=torch.ones(2)))
    with pytest.raises(CheckpointError, match="unexpected extra"):
        transformers.AutoModelForSequenceClassification.from_pretrained(saved)


def test_a_wrong_shape_is_refused(saved):
    def cut(tensors):
        tensors["bert.pooler.dense.bias"] = tensors["bert.pooler.dense.bias"][:3].clone()

    rewrite(saved, cut)
    with pytest.raises(
        CheckpointError, match=r"other shapes for bert\.pooler\.dense\.bias: \[3\] in the file"
    ):
        transformers.AutoModelForSequenceClassification.from_pretrained(saved, ignore_mismatched_sizes=True)


def edit(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def test_a_newer_format_is_refused(saved):
    edit(saved, lambda ours: ours.update(format=2, novelty=[1]))
    with pytest.raises(CheckpointError, match="format 2, this version reads 1"):
        transformers.AutoModel.from_pretrained(saved)


@pytest.mark.parametrize(
    "change",
    [
        lambda ours: ours.pop("weights"),
        lambda ours: ours.update(surprise=1),
        lambda ours: ours["weights"]["classifier"].pop("shape"),
        lambda ours: ours["weights"]["classifier"].update(shape=[3, 16]),
        lambda ours: ours["weights"]["classifier"]["matrices"].clear(),
        lambda ours: a_sum(ours).pop("basis"),
        lambda ours: a_sum(ours)["weight"].update(cols=17),
        lambda ours: a_sum(ours)["basis"].update(cols=17),
        lambda ours: a_sum(ours)["coefficients"].update(cols=17),
        lambda ours: ours["weights"]["classifier"].update(branched=True),
        lambda ours: ours["weights"]["classifier"].update(branched=0),
        lambda ours: a_tiled(ours).update(tile=[2, 4]),
        lambda ours: a_tiled(ours).update(tile=[-1, -4]),
        lambda ours: a_tiled(ours).update(tile=[4]),
        lambda ours: a_tiled(ours).update(tile="14"),
        lambda ours: a_tiled(ours).update(transposed=True),
        lambda ours: a_tiled(ours).pop("tile"),
        lambda ours: a_tiled(ours)["matrices"]["basis"].update(rows=3),
    ],
)
def test_a_damaged_description_is_refused(saved, change):
    edit(saved, change)
    with pytest.raises(CheckpointError):
        transformers.AutoModelForSequenceClassification.from_pretrained(saved)


def test_it_trains_with_the_trainer_and_reloads(tmp_path, inputs):
    model = compress(toys.bert_classifier())
    tokenizer = toys.tokenizer()
    rows = [
        {**tokenizer(row["text"], padding="max_length", max_length=12), "labels": row["label"]}
        for row in toys.sentences(16)
    ]
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    frozen = {name: buffer.clone() for name, buffer in model.named_buffers()}
    arguments = transformers.TrainingArguments(
        output_dir=tmp_path / "trainer",
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        save_steps=2,
        use_cpu=True,
    )
    transformers.Trainer(model=model, args=arguments, train_dataset=rows).train()
    changed = [
        name for name, parameter in model.named_parameters() if not torch.equal(before[name], parameter)
    ]
    assert any(name.endswith(".scales") for name in changed)
    assert any(name.endswith(".values") for name in changed)
    assert all(torch.equal(buffer, frozen[name]) for name, buffer in model.named_buffers())
    model.eval().save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again, inputs), logits(model, inputs))
    checkpoint = type(model).from_pretrained(tmp_path / "trainer/checkpoint-2")
    assert not torch.equal(logits(checkpoint, inputs), logits(model, inputs))


ORDERS = {
    "ours first": "import stackcomp; assert not {'torch', 'transformers'} & set(sys.modules); import transformers",
    "ours last": "import transformers; transformers.AutoModel; import stackcomp",
    "by the layers": "from stackcomp.nn import quantize; quantize; import transformers",
    "twice": "import stackcomp, transformers, importlib; transformers.AutoModel; importlib.reload(stackcomp)",
}
REGISTERED = "from transformers.quantizers import auto; assert 'stackcomp' in auto.AUTO_QUANTIZER_MAPPING"


def test_every_order_of_imports_and_a_new_process_gives_the_same_logits(saved, inputs):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(saved)
    torch.save(logits(model, inputs), saved / "logits.pt")
    torch.save(inputs, saved / "inputs.pt")
    loads = f"""
import torch
torch.set_num_threads({torch.get_num_threads()})
model = transformers.AutoModelForSequenceClassification.from_pretrained({str(saved)!r})
inputs = torch.load({str(saved / "inputs.pt")!r})
with torch.no_grad():
    assert torch.equal(model(**inputs).logits, torch.load({str(saved / "logits.pt")!r})), "other logits"
"""
    running = {}
    for order, first in ORDERS.items():
        code = "\n".join(["import sys", first, REGISTERED, loads if order == "ours first" else ""])
        running[order] = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    errors = {order: process.communicate()[1] for order, process in running.items()}
    for order, process in running.items():
        assert process.returncode == 0, f"{order}: {errors[order]}"


def mixture():
    """A model whose plain file holds experts one by one."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.MixtralConfig(
        vocab_size=toys.VOCABULARY, num_key_value_heads=1, num_local_experts=2, **sizes
    )
    return transformers.MixtralForCausalLM(config)


def fused():
    """A model whose plain file holds queries, keys and values as one tensor."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.NomicBertModel(transformers.NomicBertConfig(vocab_size=toys.VOCABULARY, **sizes))


@pytest.mark.parametrize("build", [mixture, fused])
@pytest.mark.parametrize("loaded", [False, True])
def test_models_that_are_converted_on_load_are_saved_under_their_own_names(tmp_path, inputs, build, loaded):
    model = build().eval()
    model.save_pretrained(tmp_path / "plain")
    if loaded:
        model = type(model).from_pretrained(tmp_path / "plain")
    for place, id_ in enumerate(linear_ids(model)):  # queries, keys and values are stored in unlike ways
        nn.sparsify(model, id_, lambda matrix, place=place: matrix.abs() > 0.01 * place)
    nn.code(model)
    for name in ("once", "twice"):
        model.save_pretrained(tmp_path / name)
        again = type(model).from_pretrained(tmp_path / name)
        assert torch.equal(again(**inputs)[0], model(**inputs)[0])
        model = again
    nn.unpack(model).save_pretrained(tmp_path / "unpacked")
    names = [{*load_file(tmp_path / name / "model.safetensors")} for name in ("plain", "unpacked")]
    assert names[0] == names[1]
    plain = type(model).from_pretrained(tmp_path / "unpacked")
    assert torch.allclose(plain(**inputs)[0], again(**inputs)[0], atol=1e-5)


def test_positions_that_are_computed_anew_are_not_missed(tmp_path, inputs):
    sizes = {f"{side}_{size}": 2 for side in ("encoder", "decoder") for size in ("layers", "attention_heads")}
    ids = {"pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 0, "forced_eos_token_id": 3}
    config = transformers.MarianConfig(
        vocab_size=toys.VOCABULARY, d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, **sizes, **ids
    )
    model = transformers.MarianMTModel(config).eval()
    for id_ in linear_ids(model):
        nn.quantize(model, id_)
    model.save_pretrained(tmp_path)
    again = transformers.MarianMTModel.from_pretrained(tmp_path)
    words = {"decoder_input_ids": inputs["input_ids"]}
    assert torch.equal(again(**inputs, **words).logits, model(**inputs, **words).logits)
