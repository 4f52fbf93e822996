"""What one technique alone reaches where sst2_24x.py stacks them.

    stackcomp study pipelines/studies/sst2_single.py

Each is scored as the stacks are: on the selection split, by which the best one is chosen, and on the test split.
"""

from sst2_24x import WEIGHTS, tuned, two_bits

import stackcomp as sc

TECHNIQUES = {
    "4 bits": sc.LowBitWeights(bits=4, group=64, only=WEIGHTS),
    "3 bits": sc.LowBitWeights(bits=3, group=64, only=WEIGHTS),
    "vocabulary": sc.PruneVocabulary(least=6),
    "coding": sc.EntropyCode(),
    "2 bits, trained": two_bits,
}

study = sc.Study(
    name="smallest_sst2_single",
    entries=(
        tuned,
        *(
            sc.Entry(
                key=f"{name}/{split}",
                model=tuned,
                task=tuned.task,
                pipeline=sc.Pipeline(technique),
                labels={"technique": name},
                split=split,
            )
            for name, technique in TECHNIQUES.items()
            for split in ("selection", "test")
        ),
    ),
)
