"""Writes SmolLM2 as Q4_0 and as Q8_0, out of its Q4_1 file, to compare formats on one model.

    python benchmarks/make_files.py SmolLM2-135M-Instruct.Q4_1.gguf FOLDER

The matrices are dequantized and quantized again by the `gguf` package; what was not Q4_1 (the Q8_0
embedding, the norms) and all metadata, the tokenizer with it, are copied. Values differ from a Q4_0
made of the original weights, so such a file is fair for speed, and for quality only against another
engine reading the same file.
"""

from __future__ import annotations

import argparse
import pathlib

import gguf

TARGETS = {
    "q4_0": (gguf.GGMLQuantizationType.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}


def copy_metadata(reader: gguf.GGUFReader, writer: gguf.GGUFWriter) -> None:
    """Copies every field but those the writer makes itself, and the file type, which changes."""
    made = {"general.architecture", "general.file_type"}
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in made:
            continue
        kind = field.types[0]
        element = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=element)


def convert(source: pathlib.Path, folder: pathlib.Path, target: str) -> pathlib.Path:
    """Writes one file and returns its path."""
    block_format, file_type = TARGETS[target]
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    path = folder / f"smollm2-{target}.gguf"
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, architecture)
    copy_metadata(reader, writer)
    writer.add_file_type(file_type)
    for tensor in reader.tensors:
        data, kind = tensor.data, tensor.tensor_type
        if kind == gguf.GGMLQuantizationType.Q4_1:
            data = gguf.quants.quantize(gguf.quants.dequantize(data, kind), block_format)
            kind = block_format
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(path)
    return path


def main() -> None:
    """Writes every target and prints its path and size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=pathlib.Path)
    parser.add_argument("folder", type=pathlib.Path)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for target in TARGETS:
        path = convert(arguments.source, arguments.folder, target)
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
