"""`ASVD` against its formula."""

import pytest
import torch

import stackcomp as sc
from stackcomp import checkpoint, nn
from stackcomp.core.errors import SettingError, UnreachableRatio
from tests import toys
from tests.passes.test_conformance import apply

ID = "encoder.layer.1.intermediate.dense"
BLOCKS = "encoder.layer.*"


def inputs(model, tokenizer, id_):
    """What a layer reads at real tokens of the calibration text."""
    texts = toys.classification_task().texts("train", 1024)
    given = tokenizer(texts, padding=True, return_tensors="pt")
    seen = []
    (module,) = nn.weights(model)[id_].modules
    hook = module.register_forward_pre_hook(lambda _, x: seen.append(x[0][given["attention_mask"].bool()]))
    with torch.no_grad():
        model(**given)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.5])
def test_factors_are_those_of_the_formula(alpha, model, tokenizer, tmp_path):
    with torch.no_grad():  # inputs of very different sizes, and one that is always zero
        norm = model.bert.encoder.layer[1].attention.output.LayerNorm
        norm.weight.copy_(torch.logspace(-2, 1, 16))
        norm.weight[3] = norm.bias[3] = 0
    weight = nn.weights(model)[ID].dense().clone()
    scale = inputs(model, tokenizer, ID).abs().mean(0) ** alpha
    findings = apply(sc.ASVD(ratio=2.0, alpha=alpha, only=ID), model, tokenizer, tmp_path)
    rank = 32 * 16 // (2 * (32 + 16))
    assert findings == {"layers": {ID: f"rank {rank}"}}
    found = nn.weights(model)[ID].dense()
    u, s, v = torch.linalg.svd(weight * scale, full_matrices=False)
    torch.testing.assert_close(
        found * scale, u[:, :rank] * s[:rank] @ v[:rank], rtol=1e-4, atol=1e-4 * float(s[0])
    )
    assert torch.isfinite(found).all()


def test_sizes_of_inputs_are_means_over_real_tokens(model, tokenizer):
    found = sc.data.Calibration(toys.classification_task().texts("train", 48), tokenizer).mean_inputs(
        model, {ID: nn.weights(model)[ID].modules}
    )
    torch.testing.assert_close(found[ID], inputs(model, tokenizer, ID).abs().mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_it_stacks_and_reloads(family, tokenizer, tmp_path):
    model = toys.classifier(family)
    blocks = sc.core.families.FAMILIES[family].blocks
    for step in (sc.ASVD(ratio=1.5, only=blocks), sc.LowBitWeights(group=4, only=blocks)):
        apply(step, model, tokenizer, tmp_path)
    assert any(handle.spec.factored for handle in nn.weights(model).values())
    checkpoint.save(model, tmp_path / "saved")
    batch = toys.batch(tokenizer)
    with torch.no_grad():
        assert torch.equal(checkpoint.load(tmp_path / "saved")(**batch).logits, model(**batch).logits)


def test_what_cannot_be_done_is_refused_before_any_compute():
    with pytest.raises(UnreachableRatio, match=r"ASVD: ratio=50 leaves no rank.*the largest is 10\.67"):
        sc.check(sc.ASVD(ratio=50.0, only=BLOCKS), toys.bert_classifier())
    for settings in ({"alpha": -0.1}, {"alpha": 2.5}, {"samples": 0}, {"ratio": 0.5}):
        with pytest.raises(SettingError, match=next(iter(settings))):
            sc.ASVD(**settings)


@pytest.mark.parametrize(
    "step", [sc.ASVD, sc.LowRank, sc.DenseSparse, lambda only: sc.DenseSparse(only=only, atoms=4, nonzeros=2)]
)
def test_ids_of_words_are_not_read_as_inputs(step):
    with pytest.raises(SettingError, match=r"word_embeddings is an embedding.*data_aware=False"):
        sc.check(step(only="embeddings.word_embeddings"), toys.bert_classifier())
