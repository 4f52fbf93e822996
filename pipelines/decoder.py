"""A decoder: GPT-2 in 4 bits by GPTQ, its word embedding in 8, scored by perplexity on WikiText-2.

    stackcomp check pipelines/decoder.py
    stackcomp run pipelines/decoder.py --out out/gpt2

For a Llama-like model name it in STACKCOMP_MODEL and its blocks in STACKCOMP_BLOCKS ("layers.*"). The word embedding is
tied to the output head, so it is one weight with two paths: it is rounded once and stays tied. WikiText-2 comes from the
hub or from the folder in STACKCOMP_DATA.
"""

import os

import stackcomp as sc

BLOCKS = os.environ.get("STACKCOMP_BLOCKS", "h.*")
EMBEDDING = "wte" if BLOCKS == "h.*" else "embed_tokens"
task = sc.tasks.language_modelling()


def model() -> str:
    """The name of the model; a function, so that `check` asks no hub for it."""
    return os.environ.get("STACKCOMP_MODEL", "openai-community/gpt2")


pipeline = sc.Pipeline(
    sc.GPTQ(bits=4, only=BLOCKS),
    sc.Int8Weights(only=EMBEDDING),
)
