"""How the networks compute: in which number format, compiled or not."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from .errors import UserError

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = ("auto", *_DTYPES)


def choose(precision: str, device: torch.device) -> str:
    """One of `PRECISIONS` → "fp32", "bf16" or "fp16".

    "auto" is bf16 where the device multiplies such numbers faster (a GPU of compute capability 8.0,
    a CPU with AVX-512 BF16 or AMX), else fp32. UserError for another word, and for fp16 without a
    CUDA GPU.
    """
    if precision not in PRECISIONS:
        known = ", ".join(PRECISIONS)
        raise UserError(f"--precision {precision!r} is unknown; choose one of {known}")
    if precision == "fp16" and device.type != "cuda":
        raise UserError("--precision fp16 needs a CUDA GPU; use auto, bf16 or fp32 here")
    if precision != "auto":
        return precision
    return "bf16" if _multiplies_bf16(device) else "fp32"


def _multiplies_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # since torch 2.10
        found = torch.cpu.get_capabilities()
        return bool(found.get("avx512_bf16") or found.get("amx_bf16"))
    return False


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """The context of "bf16" or "fp16": convolutions and matrix products are done in it.

    "fp32" changes nothing, so that a caller's own context counts.
    """
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, _DTYPES[precision])


def require_compiler(device: torch.device) -> None:
    """UserError where torch.compile does not work: tried on a sum, which takes seconds once."""
    needed = "a C++ compiler (g++)" if device.type == "cpu" else "triton and a C compiler (gcc)"
    try:
        torch.compile(torch.add)(torch.ones(2, device=device), 1)
    except Exception as error:  # of many kinds: a missing program, header, package, platform
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"--compile needs {needed}, and torch.compile does not work here ({reason}); "
            "install it, or leave --compile out"
        ) from error
