"""`cyclewise serve` in the place of llama.cpp's server, for the tests that ship with it.

    LLAMA_SERVER_BIN_PATH=a file that runs this one with its arguments

Whatever model the flags name, stories260K is served, with llama.cpp's default template (ChatML) or
the one that the flags give. What a flag asks for and no flag of ours means is left out: a test that
depends on it fails, and docs/compatibility.md says why.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from cyclewise.__main__ import main
from tests.models import tiny

# beside the alias that a test gives: what tests call the model, which llama.cpp does not look at
NAMES = ("gpt-3.5-turbo", "gpt-3.5-turbo-instruct", "davinci-002", "codellama70b")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{{ '<|im_start|>assistant\n' }}"
)


def flags() -> argparse.Namespace:
    """The flags of llama.cpp's server that mean something to ours."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", default="8080")
    parser.add_argument("--alias", default="stories260K")
    parser.add_argument("--ctx-size", type=int, default=512)
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--kv-unified", action="store_true")
    parser.add_argument("--threads")
    parser.add_argument("--api-key")
    parser.add_argument("--cors-origins")
    parser.add_argument("--chat-template")
    parser.add_argument("--chat-template-file", type=Path)
    return parser.parse_known_args()[0]


def template(given: argparse.Namespace) -> str:
    """The chat template that the flags ask for."""
    if given.chat_template_file is not None:
        return str(given.chat_template_file.read_text())
    return CHATML if given.chat_template in (None, "chatml") else str(given.chat_template)


def write_stories(folder: Path, path: Path, template: str) -> None:
    """Write stories260K as a file that our server reads."""
    vocabulary = tiny.stories_vocabulary(folder / "tok512.bin")
    tiny.write_stories(
        folder / "stories260K.bin", path, {**vocabulary, "tokenizer.chat_template": template}
    )


def arguments(given: argparse.Namespace, model: Path) -> list[str]:
    """The same for our server."""
    slots = 1 if given.kv_unified else given.parallel  # that share the context
    found = ["serve", str(model), "--host", given.host, "--port", given.port]
    found += ["--context", str(min(given.ctx_size // slots, 512))]  # what the model was trained for
    found += ["--parallel", str(given.parallel)]
    for name in (given.alias, *NAMES):
        found += ["--name", name]
    if given.threads is not None:
        found += ["--threads", given.threads]
    if given.cors_origins is not None:
        found += ["--cors", f"http://{given.cors_origins}"]
    if given.api_key is not None:
        keys = model.with_name("keys")
        keys.write_text(given.api_key)
        found += ["--api-key-file", str(keys)]
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        given, model = flags(), Path(place) / "stories260K.gguf"
        write_stories(Path(os.environ["STORIES260K"]), model, template(given))
        sys.argv[1:] = arguments(given, model)
        main()
