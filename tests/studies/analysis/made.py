"""Rows of a study of combinations, made by hand: figures that can be worked out on paper."""

CAME = 1000  # bytes of the model as it came
EMBEDDINGS = 100  # of them
SCORE = 80.0


def row(*passes, size=CAME, score=SCORE, seed=0, noise=0.5, latency=None, embeddings=EMBEDDINGS, **more):
    """The finished row of a pipeline."""
    names, strengths = (
        zip(*[name if isinstance(name, tuple) else (name, "") for name in passes], strict=True)
        if passes
        else ((), ())
    )
    return {
        "key": f"{' > '.join(names) or 'dense'}/{seed}",
        "labels": {"passes": list(names), "strengths": list(strengths)},
        "seed": seed,
        "task": "toy",
        "split": "test",
        "limit": None,
        "model": "toy@1",
        "declaration": f"Pipeline({', '.join(names)})",
        "fingerprint": f"of {' '.join(names)} {seed}",
        "file_sha256": None,
        **_figures(size, score, noise, embeddings),
        **({} if latency is None else {"latency_ratio": latency, "latency_ms": 10 * latency}),
        "steps": [
            {"name": "dense", "declaration": "", **_figures(CAME, SCORE, 0.0, EMBEDDINGS)},
            {"name": "all", "declaration": "", **_figures(size, score, noise, embeddings)},
        ],
        **more,
    }


def _figures(size, score, noise, embeddings):
    components = {
        "values": 0,
        "indices": 0,
        "scales": 0,
        "embeddings": embeddings,
        "dense": size - embeddings,
        "header": 0,
    }
    return {
        "size_bytes": size,
        "score": score,
        "noise": 1.0,
        "metric": "accuracy",
        "difference": score - SCORE,
        "difference_noise": noise,
        "components": components,
        "compression": CAME / size,
        "layer_compression": None,
        "seconds": 1.0,
    }
