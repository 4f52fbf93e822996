"""The new process of `benchmarks.reload`: loads a checkpoint in the two ways a user would and writes the answers of each."""

import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

import stackcomp
from benchmarks.reload import answers_of


def main(checkpoint: str, batch: str, out: str) -> None:
    """Write load.pt and auto.pt into `out`."""
    kinds = AutoConfig.from_pretrained(checkpoint).architectures or []
    writes = any(kind.endswith("ForCausalLM") for kind in kinds)
    auto = AutoModelForCausalLM if writes else AutoModelForSequenceClassification
    inputs = torch.load(batch)
    for name, load in {"load": stackcomp.load, "auto": auto.from_pretrained}.items():
        torch.save(answers_of(load(checkpoint), inputs), Path(out) / f"{name}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
