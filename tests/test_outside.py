"""The package of `examples/round_mantissa` as an installer leaves it: found through its metadata, listed, run, tested by our own tests."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import transformers

import stackcomp as sc
from stackcomp import nn
from stackcomp.passes import registered
from tests import toys

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "examples" / "round_mantissa"
PAGE = ROOT / "docs" / "own_pass.md"

STACK = """
import json, sys
import stackcomp as sc
from tests import toys
from tests.passes.test_conformance import manager

def size(name, *passes):
    found = manager(f"{sys.argv[1]}/{name}", toys.tokenizer()).run(toys.bert_classifier(), sc.Pipeline(*passes))
    return found.ledger.rows[-1].size_bytes, [dict(row.findings) for row in found.ledger.rows]

everything = ("encoder.layer.*", "embeddings")
pruned = sc.MagnitudePrune(sparsity=0.5, only="encoder.layer.*")
coded, _ = size("coded", pruned, sc.EntropyCode())
short, findings = size("short", pruned, sc.RoundMantissa(bits=2, only=everything), sc.EntropyCode())
print(json.dumps({"coded": coded, "short": short, "findings": findings}))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """Runs Python where the package is installed: its module, and the metadata that an installer writes of its pyproject."""
    site = tmp_path_factory.mktemp("site")
    project = tomllib.loads((SOURCE / "pyproject.toml").read_text("utf8"))["project"]
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    groups = project["entry-points"].items()
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()) for group, points in groups]
    (info / "entry_points.txt").write_text("\n".join(lines))
    (site / "round_mantissa.py").write_text((SOURCE / "round_mantissa.py").read_text("utf8"))

    def run(*arguments):
        paths = os.pathsep.join([str(site), str(ROOT)])
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="module")
def module():
    spec = importlib.util.spec_from_file_location("round_mantissa", SOURCE / "round_mantissa.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_it_is_listed_and_the_page_s_pipeline_is_legal(python, tmp_path):
    assert "RoundMantissa\n  Round every stored value" in python("-m", "stackcomp.cli", "passes")
    (code,) = re.findall(
        r"^```py\n(import stackcomp.*?)^```", PAGE.read_text("utf8"), re.DOTALL | re.MULTILINE
    )
    (tmp_path / "pipeline.py").write_text(code)
    assert "2. RoundMantissa(" in python("-m", "stackcomp.cli", "check", str(tmp_path / "pipeline.py"))


def test_it_stacks_shrinks_and_reloads_where_it_is_not_installed(python, module, tmp_path):
    found = json.loads(python("-c", STACK, str(tmp_path)).splitlines()[-1])
    assert found["short"] < 0.75 * found["coded"]
    assert found["short"] == (tmp_path / "short" / "model.safetensors").stat().st_size
    assert 0.01 < found["findings"][2]["relative_error"] < 0.125
    assert "RoundMantissa" not in registered()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "short")
    short, whole = nn.weights(model), nn.weights(sc.load(tmp_path / "coded"))
    for id_, handle in whole.items():
        chosen = id_.startswith(("encoder.layer.", "embeddings."))
        wanted = module.rounded(handle.dense(), 2) if chosen else handle.dense()
        assert torch.equal(short[id_].dense(), wanted), id_
    assert torch.isfinite(model(**toys.batch(toys.tokenizer())).logits).all()


def test_our_own_tests_are_tests_of_it(python):
    suite = "tests/passes/test_conformance.py"
    said = python("-m", "pytest", "-p", "no:cacheprovider", "-rp", suite, "-k", "RoundMantissa")
    assert said.count("PASSED") >= 8


@pytest.mark.parametrize(
    ("bits", "dtype", "low", "high"),
    [
        (2, torch.float8_e5m2, 1e-3, 1e3),
        (3, torch.float8_e4m3fn, 0.02, 200),
        (7, torch.bfloat16, 1e-30, 1e30),
        (10, torch.float16, 1e-3, 1e3),
    ],
)
def test_it_rounds_as_torch_does(module, bits, dtype, low, high):
    chance = torch.Generator().manual_seed(0)
    values = torch.exp(
        torch.empty(5000).uniform_(*torch.tensor([low, high]).log().tolist(), generator=chance)
    )
    values = torch.cat([values, -values, torch.zeros(1), 1 + torch.arange(64) / 32])
    assert torch.equal(module.rounded(values, bits), values.to(dtype).float())
    assert torch.equal(module.rounded(values, module.MANTISSA), values)


def test_it_rounds_what_is_stored_however_it_is_stored(module, tmp_path):
    from tests.passes.test_conformance import apply, apply_alone

    model, tokenizer = toys.gpt2_lm(), toys.tokenizer()
    apply(sc.LowRank(ratio=1.5, only="h.0", data_aware=False), model, tokenizer, tmp_path)
    apply(sc.MagnitudePrune(only="h.1"), model, tokenizer, tmp_path)
    zeros = {id_: handle.dense() == 0 for id_, handle in nn.weights(model).items()}
    step = module.RoundMantissa(bits=1, only=("h.*", "wte"))
    found = apply_alone(step, model, model, tokenizer, tmp_path, toys.language_task())
    assert 0 < found["relative_error"] <= 0.25
    for id_, handle in nn.weights(model).items():
        if id_.startswith(("h.", "wte")):
            for matrix in handle.matrices.values():
                assert torch.equal(matrix.values, module.rounded(matrix.values, 1)), id_
            assert torch.equal(handle.dense()[zeros[id_]], torch.zeros(int(zeros[id_].sum())))
    with pytest.raises(sc.errors.SettingError, match="bits=24"):
        module.RoundMantissa(bits=24)


def test_the_page_shows_the_files_themselves():
    shown = re.findall(r'^--8<-- "(.*)"$', PAGE.read_text("utf8"), re.MULTILINE)
    assert sorted(ROOT / path for path in shown) == sorted(
        path for path in SOURCE.iterdir() if path.is_file()
    )
