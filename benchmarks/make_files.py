"""Writes the model files that formats are compared on.

    python benchmarks/make_files.py smollm2 SmolLM2-135M-Instruct.Q4_1.gguf FOLDER
    python benchmarks/make_files.py wide FOLDER

`smollm2` writes SmolLM2 as Q4_0 and as Q8_0, out of its Q4_1 file. The matrices are dequantized and
quantized again by the `gguf` package; what was not Q4_1 (the Q8_0 embedding, the norms) and all
metadata, the tokenizer with it, are copied. Values differ from a Q4_0 made of the original
weights, so such a file is fair for speed, and for quality only against another engine reading the
same file.

`wide` writes a Llama of random weights, 2,048 wide with 8 layers, as FOLDER/f16.gguf, and then by
llama.cpp's quantizer in each format of FORMATS: it needs llama-cpp-python, here or in the
interpreter that CYCLEWISE_PEERS_PYTHON names. Its tokenizer holds bytes and words of no meaning.
6.3 GB in all, and some six minutes with two cores.
"""

from __future__ import annotations

import argparse
import pathlib
import subprocess

import gguf
import numpy as np

from cyclewise.bench.peers import PEERS, find_interpreter

TARGETS = {
    "q4_0": (gguf.GGMLQuantizationType.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}

FORMATS = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K",
    "IQ4_NL", "IQ4_XS", "MXFP4", "F16", "BF16",
)  # fmt: skip

HIDDEN, LAYERS, HEADS, KV_HEADS, FEED_FORWARD, VOCABULARY = 2048, 8, 32, 8, 5632, 32_000


def copy_metadata(reader: gguf.GGUFReader, writer: gguf.GGUFWriter) -> None:
    """Copies every field but those the writer makes itself, and the file type, which changes."""
    made = {"general.architecture", "general.file_type"}
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in made:
            continue
        kind = field.types[0]
        element = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=element)


def finish(writer: gguf.GGUFWriter, partial: pathlib.Path, path: pathlib.Path) -> pathlib.Path:
    """Writes what was added and gives the file its name."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(path)
    return path


def convert(source: pathlib.Path, folder: pathlib.Path, target: str) -> pathlib.Path:
    """Writes SmolLM2 in one format and returns the file's path."""
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
    return finish(writer, partial, path)


def add_tokenizer(writer: gguf.GGUFWriter) -> None:
    """A SentencePiece tokenizer of VOCABULARY tokens: three special, the bytes, and words."""
    special = ["<unk>", "<s>", "</s>"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    words = [f"▁w{number}" for number in range(VOCABULARY - len(special) - len(bytes_))]
    kinds = gguf.TokenType
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*special, *bytes_, *words])
    writer.add_token_scores([0.0] * (len(special) + len(bytes_)) + [-1.0] * len(words))
    writer.add_token_types(
        [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL]
        + [kinds.BYTE] * len(bytes_)
        + [kinds.NORMAL] * len(words)
    )
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def write_wide(folder: pathlib.Path) -> pathlib.Path:
    """Writes the random Llama in float16 and returns the file's path."""
    path = folder / "f16.gguf"
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    writer.add_name("wide random Llama")
    writer.add_context_length(4096)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    add_tokenizer(writer)
    random = np.random.default_rng(0)

    def matrix(name: str, rows: int, columns: int) -> None:
        values = random.standard_normal((rows, columns), np.float32) * np.float32(columns**-0.5)
        writer.add_tensor(f"{name}.weight", values.astype(np.float16))

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(HIDDEN, np.float32))

    keys = HIDDEN // HEADS * KV_HEADS
    matrix("token_embd", VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        norm(block + "attn_norm")
        matrix(block + "attn_q", HIDDEN, HIDDEN)
        matrix(block + "attn_k", keys, HIDDEN)
        matrix(block + "attn_v", keys, HIDDEN)
        matrix(block + "attn_output", HIDDEN, HIDDEN)
        norm(block + "ffn_norm")
        matrix(block + "ffn_gate", FEED_FORWARD, HIDDEN)
        matrix(block + "ffn_up", FEED_FORWARD, HIDDEN)
        matrix(block + "ffn_down", HIDDEN, FEED_FORWARD)
    norm("output_norm")
    matrix("output", VOCABULARY, HIDDEN)
    return finish(writer, partial, path)


def make_wide(folder: pathlib.Path, formats: list[str]) -> None:
    """Writes what is missing of the wide Llama's files."""
    interpreter = find_interpreter(PEERS["llama.cpp"])
    source = folder / "f16.gguf"
    if not source.exists():
        print(f"{write_wide(folder)}: {source.stat().st_size:,} bytes", flush=True)
    script = pathlib.Path(__file__).with_name("quantize.py")
    wanted = [name for name in formats if name != "F16"]
    if wanted:
        subprocess.run([interpreter, script, source, folder, *wanted], check=True)


def main() -> None:
    """Writes what is asked for and prints paths and sizes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    models = parser.add_subparsers(dest="model", required=True)
    smollm2 = models.add_parser("smollm2")
    smollm2.add_argument("source", type=pathlib.Path)
    wide = models.add_parser("wide")
    wide.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    for command in (smollm2, wide):
        command.add_argument("folder", type=pathlib.Path)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if arguments.model == "wide":
        make_wide(arguments.folder, arguments.formats)
        return
    for target in TARGETS:
        path = convert(arguments.source, arguments.folder, target)
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
