"""What the processor can do, as far as results and speed depend on it."""

import torch


def bf16_pays(device: torch.device | str) -> bool:
    """Whether products of bfloat16 matrices have instructions of their own: elsewhere they are slower than float32."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return kind == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def instructions() -> str:
    """The vector instructions that torch uses, and whether bfloat16 has some: "AVX512 BF16"."""
    return torch.backends.cpu.get_cpu_capability() + (" BF16" if bf16_pays("cpu") else "")
