"""Quantizes a GGUF file with llama.cpp's own quantizer, to each format that is asked for.

    python benchmarks/quantize.py SOURCE.gguf FOLDER Q4_K_M Q6_K ...

Runs in an interpreter that has llama-cpp-python; Cyclewise is not needed there. Writes
FOLDER/NAME.gguf in lower case, NAME being llama.cpp's name of the mixture. MXFP4 is none of them
for a dense model: every matrix but the embedding and the output, which become Q8_0, is made MXFP4
by llama.cpp's list of exceptions. Files that exist are left alone.
"""

from __future__ import annotations

import argparse
import ctypes
import pathlib

import llama_cpp.llama_cpp as api

EXCEPTIONS = {"MXFP4": (rb"blk\..*\.weight", api.GGML_TYPE_MXFP4, "Q8_0")}


def quantize(source: pathlib.Path, target: pathlib.Path, name: str) -> None:
    """Writes one file; an error of llama.cpp's is a RuntimeError."""
    pattern, kind, mixture = EXCEPTIONS.get(name, (None, 0, name))
    parameters = api.llama_model_quantize_default_params()
    whole = "ALL" if mixture == "F32" else "MOSTLY"
    parameters.ftype = getattr(api, f"LLAMA_FTYPE_{whole}_{mixture}")
    parameters.allow_requantize = True
    # A list that ends with an entry without a pattern; it must live as long as the call.
    overrides = (api.llama_model_tensor_override * 2)()
    if pattern is not None:
        overrides[0].pattern, overrides[0].type = pattern, kind
        parameters.tt_overrides = ctypes.cast(
            overrides, ctypes.POINTER(api.llama_model_tensor_override)
        )
    partial = target.with_suffix(".partial")
    status = api.llama_model_quantize(
        str(source).encode(), str(partial).encode(), ctypes.byref(parameters)
    )
    if status:
        raise RuntimeError(f"llama.cpp returned {status} for {name}")
    partial.rename(target)


def main() -> None:
    """Writes every file and prints its size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=pathlib.Path)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("formats", nargs="+")
    arguments = parser.parse_args()
    quiet = api.llama_log_callback(lambda level, text, data: None)
    api.llama_log_set(quiet, None)
    for name in arguments.formats:
        target = arguments.folder / f"{name.lower()}.gguf"
        if not target.exists():
            quantize(arguments.source, target, name)
            print(f"{target}: {target.stat().st_size:,} bytes", flush=True)


if __name__ == "__main__":
    main()
