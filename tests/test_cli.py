from __future__ import annotations

import io
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import cyclewise.cli
import cyclewise.llm
from cyclewise import LLM, SamplingParams, __version__
from cyclewise.cli import app
from cyclewise.models.config import Config, Rope
from cyclewise.repl import converse
from cyclewise.terminal import table, write
from tests.engine.toy import ToyModel, ToyTemplate, ToyTokenizer, hashed_logits, scripted
from tests.models import lora_oracle, oracle
from tests.weights import layouts

GREEDY = ["--temperature", "0"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CYCLEWISE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def toy(monkeypatch):
    """Make the commands load a toy, which says `text` after a prompt of so many tokens."""

    def make(text=None, prompt_tokens=0, template=False, **options):
        logits = hashed_logits if text is None else scripted(text, prompt_tokens)
        model = ToyModel(logits=logits, **options)
        monkeypatch.setattr(cyclewise.llm, "_load", lambda *_, **__: (model, ToyTokenizer()))
        monkeypatch.setattr(cyclewise.cli, "load", lambda *_, **__: model)
        if template:
            model.metadata["tokenizer.chat_template"] = "toy"
            monkeypatch.setattr(LLM, "_chat_template", lambda _: ToyTemplate())
        return model

    return make


def call(*arguments, stdin=None):
    result = CliRunner().invoke(app, list(arguments), input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def process(*arguments, **options):
    options.setdefault("stdin", subprocess.DEVNULL)
    command = [sys.executable, "-m", "cyclewise", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def test_run_with_and_without_the_template(toy):
    model = toy("Blue.", prompt_tokens=5)
    assert call("run", "toy", "sky?", *GREEDY).stdout == "Blue.\n"
    assert model.closed
    toy("Blue.", prompt_tokens=9, template=True)  # u:sky?<end>a:
    result = call("run", "toy", "sky?", *GREEDY)
    assert result.exit_code == 0
    assert result.stdout == "Blue.\n"
    assert result.stderr.startswith("prompt 9 tokens at ")
    assert "answer 5 tokens at " in result.stderr
    assert result.stderr.endswith("; the model ended its turn\n")
    toy("Blue.", prompt_tokens=5, template=True)
    assert call("run", "toy", "--raw", "sky?", *GREEDY).stdout == "Blue.\n"
    toy("Yes.", prompt_tokens=14, template=True)  # s:Hm<end>u:sky?<end>a:
    assert call("run", "toy", "sky?", "--system", "Hm", *GREEDY).stdout == "Yes.\n"


def test_run_reads_standard_input(toy):
    model = toy("ok", prompt_tokens=1 + len("two\nlines"))
    assert call("run", "toy", *GREEDY, stdin="two\nlines\n").stdout == "ok\n"
    assert model.machine.kv.reshape(-1)[1:10].tolist() == list(b"two\nlines")


@pytest.mark.parametrize("stdin", ["", "\n", " \n\t"])
def test_an_empty_standard_input(toy, stdin):
    toy()
    result = call("run", "toy", stdin=stdin)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: the prompt is empty: give it")


def test_standard_input_that_is_no_text(toy):
    toy()
    result = call("run", "toy", stdin=b"ab\xff")
    assert result.exit_code == 2
    assert result.stderr == "error: standard input is not UTF-8 text: byte 2 cannot be read\n"


def test_run_json(toy):
    toy("a\nb", prompt_tokens=3)
    result = call("run", "toy", "xy", "--json", *GREEDY)
    assert result.stderr == ""
    told = json.loads(result.stdout)
    assert told["model"] == "toy"
    assert told["text"] == "a\nb"
    assert told["finish_reason"] == "stop"
    assert (told["prompt_tokens"], told["generated_tokens"]) == (3, 3)


def test_run_says_why_it_stopped(toy):
    for options, why in [
        (["--max-tokens", "3"], "--max-tokens 3 reached"),
        (["--max-tokens", "0"], "the context of 20 tokens is full"),
        (["--stop", "ccc", "--stop", "b"], "a stop string came"),
    ]:
        toy("aaaabbbb" + "d" * 40, prompt_tokens=3, context=20)
        result = call("run", "toy", "xy", *options, *GREEDY)
        assert result.exit_code == 0
        assert result.stderr.endswith(f"; {why}\n")


def test_run_with_a_seed(toy):
    texts = []
    for seed in ("1", "1", "2"):
        toy()
        texts.append(call("run", "toy", "xy", "--seed", seed, "--max-tokens", "9").stdout)
    assert texts[0] == texts[1] != texts[2]


def test_run_with_several_answers(toy):
    toy()
    options = ("--seed", "3", "--max-tokens", "5", "--context", "64")
    result = call("run", "toy", "xy", *options, "--n", "2")
    assert result.stderr.splitlines()[:2] == ["answer 1 of 2", "answer 2 of 2"]
    facts = json.loads(call("run", "toy", "xy", *options, "--n", "2", "--json").stdout)
    texts = [choice["text"] for choice in facts["choices"]]
    assert len(texts) == 2
    assert facts["text"] == texts[0]
    assert result.stdout == "".join(f"{text}\n" for text in texts)


def test_run_with_logprobs(toy):
    toy("Blue.", prompt_tokens=5)
    options = ("--logprobs", "2", "--prompt-logprobs", "0", "--logit-bias", f"{ord('B')}=-100")
    facts = json.loads(call("run", "toy", "sky?", "--raw", "--json", *options, *GREEDY).stdout)
    assert facts["text"] != "Blue."
    assert [entry["top"][0]["text"] for entry in facts["logprobs"]][:1] == ["B"]
    assert [entry and entry["text"] for entry in facts["prompt_logprobs"]] == [None, *"sky?"]


def test_run_with_a_structure(toy, tmp_path):
    file = tmp_path / "schema.json"
    file.write_text('{"enum": ["Rot", "Blau"]}')
    (tmp_path / "grammar.lark").write_text('start: "so" | "ja"')
    toy("Blue.", prompt_tokens=3)
    for options, answers in [
        (["--json-schema", file.read_text()], ['"Rot"', '"Blau"']),
        (["--json-schema", str(file)], ['"Rot"', '"Blau"']),
        (["--regex", "a|b"], ["a", "b"]),
        (["--grammar", str(tmp_path / "grammar.lark")], ["so", "ja"]),
    ]:
        assert call("run", "toy", "xy", *options, *GREEDY).stdout.rstrip("\n") in answers
        toy("Blue.", prompt_tokens=3)
    result = call("run", "toy", "xy", "--grammar", "no/such/file")
    assert result.stderr.startswith("error: cannot read the grammar 'no/such/file'")
    result = call("run", "toy", "xy", "--json-schema", '{"contains": {}}')
    assert result.stderr.startswith("error: json_schema uses `contains`")


def test_sampling_defaults_are_those_of_the_library(toy, monkeypatch):
    seen = []
    toy()
    stream = LLM.stream
    monkeypatch.setattr(
        LLM, "stream", lambda self, prompt, params: seen.append(params) or stream(self, prompt)
    )
    call("run", "toy", "xy")
    assert seen == [SamplingParams()]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "toy", "x", "--top-p", "7"], "error: top_p must be a number from 0 to 1"),
        (["run", "toy", "x", "--max-tokens", "-1"], "error: max_tokens must be"),
        (["run", "toy", "x", "--logit-bias", "5"], "error: --logit-bias must be like 42=-100"),
        (["run", "toy", "x", "--logit-bias", "5=101"], "error: logit_bias must be a number from"),
        (["run", "toy", "x", "--logprobs", "5"], "error: --logprobs and --prompt-logprobs"),
        (["run", "toy", "x", "--n", "0"], "error: n must be"),
        (["run", "toy", "x", "--threads", "0"], "error: threads must be"),
        (["run", "toy", "x", "--raw", "--system", "y"], "error: --raw"),
        (["run", "toy", "x" * 64, "--raw"], "error: the prompt has 65 tokens and the context"),
        (["chat", "toy"], "error: toy has no chat template"),
        (["perplexity", "toy", "--text", "no/such/file"], "error: cannot read the text"),
        (["models", "rm", "smollm2"], "error: no model 'smollm2' in the cache"),
    ],
)
def test_errors_are_one_sentence(toy, monkeypatch, arguments, sentence):
    toy()
    monkeypatch.setattr(LLM, "has_chat_template", False)
    result = call(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(sentence)
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_wrong_options_and_commands():
    result = call("run", "toy", "x", "--temprature", "1")
    assert result.exit_code == 2
    assert "--temperature" in result.stderr
    result = call("rnu")
    assert result.exit_code == 2
    assert "'run'" in result.stderr
    result = call("run", "toy", "x", "--temperature", "hot")
    assert result.exit_code == 2
    assert "--temperature" in result.stderr


@pytest.mark.parametrize(
    ("error", "code", "stderr"),
    [
        (KeyboardInterrupt(), 130, ""),
        (MemoryError(), 2, "error: not enough memory"),
        (BrokenPipeError(), 1, ""),
        (OSError(28, "No space left on device"), 2, "error: [Errno 28] No space left on device"),
    ],
)
def test_other_ends(toy, error, code, stderr):
    def fail():
        raise error

    toy().machine.before_step = fail
    result = call("run", "toy", "x")
    assert result.exit_code == code
    assert result.stderr.startswith(stderr)
    assert "Traceback" not in result.stderr


def test_models(cache):
    result = call("models")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0].split() == ["NAME", "SIZE", "WHAT", "IT", "IS"]
    assert any(line.startswith("smollm2 ") for line in result.stdout.splitlines())
    told = json.loads(call("models", "--json").stdout)
    assert told["cache"] == str(cache)
    smollm2 = next(entry for entry in told["models"] if entry["name"] == "smollm2")
    assert smollm2["cached"] is False
    assert smollm2["path"] is None
    assert smollm2["bytes"] == 98_362_432


def test_pruning_packed_weights(cache):
    folder = cache / "packed"
    folder.mkdir(parents=True)
    (folder / "model-0123456789ab.packed").write_bytes(bytes(3_000_000))
    told = json.loads(call("models", "prune", "--keep", "8GB", "--json").stdout)
    assert told["freed_bytes"] == 3_000_000 and told["kept_bytes"] == 0  # it is of no model
    assert call("models", "prune").stdout == "packed weights: 0.0 MB freed, 0.0 MB kept\n"
    refused = process("models", "prune", "--keep", "much")
    assert refused.returncode == 2 and "--keep is 'much'" in refused.stderr


def test_info(toy):
    model = toy()
    model.path = "toy.gguf"
    model.config = Config(
        architecture="toys", name="Toy", num_layers=2, hidden_size=8, num_heads=2, num_kv_heads=1,
        head_dim=4, feed_forward=16, vocab_size=9, context_length=50, trained_context=99,
        norm_epsilon=1e-5, rope=Rope(4, 1e4), query_scale=0.5, windows=(None, 32),
    )  # fmt: skip
    model.format_bytes = {"F32": 1_000_000, "Q4_1": 3_000_000}
    model.bytes_per_token, model.kv_bytes_per_token = 4_000_000, 128
    model.machine.num_threads = 2
    model.machine.read_bandwidth = lambda seconds: 8e9
    told = json.loads(call("info", "toy", "--json").stdout)
    assert (told["kv"], told["kv_bytes_per_token"]) == ("f16", 128)
    assert told["decode_limit_tokens_per_second"] == 2000
    assert told["format_bytes"] == {"F32": 1_000_000, "Q4_1": 3_000_000}
    assert (told["architecture"], told["window"], told["windowed_layers"]) == ("toys", 32, 1)
    assert model.closed
    text = call("info", "toy").stdout
    assert "128 bytes of cache each (f16)" in text
    assert "Q4_1 3.0 MB (75%), F32 1.0 MB (25%)" in text
    assert "2000 tokens/s" in text
    assert "2 heads of 4, 1 of keys and values; 1 of 2 layers see the last 32 tokens" in text


def test_info_of_a_directory_that_is_quantized(tmp_path):
    _, floats = layouts.write_both(tmp_path, "bytes")
    result = call("info", str(floats), "--quantize", "q4_k")
    assert result.exit_code == 0 and "quantized        Q4_K, embedding and output" in result.stdout
    assert "Q4_1" in result.stdout and "F32" in result.stdout
    found = json.loads(call("info", str(floats), "--json").stdout)
    assert found["quantized"] is None and set(found["format_bytes"]) == {"F32"}
    for arguments, sentence in (
        ((floats, "--quantize", "q5_k"), "quantize is 'q5_k'; weights are quantized to q8_0"),
        ((tmp_path / "bytes", "--quantize", "q4_0"), "quantized already (compressed-tensors)"),
    ):
        result = call("info", *map(str, arguments))
        assert result.exit_code == 2 and sentence in result.stderr


def test_bench_passes_its_options_on(toy, monkeypatch):
    import cyclewise.bench.bench

    seen = {}

    def run_bench(model, *, progress, **options):
        seen.update(options)
        return SimpleNamespace(as_dict=lambda: {"threads": 2})

    monkeypatch.setattr(cyclewise.bench.bench, "run_bench", run_bench)
    model = toy()
    options = ["--prompt-tokens", "5", "--generate-tokens", "6", "--depth", "7", "--repeats", "8"]
    peers = ["--against", "llama.cpp", "--against", "openvino"]
    result = call("bench", "toy", *options, *peers, "--json")
    assert json.loads(result.stdout) == {"threads": 2}
    assert seen == {
        "prompt_tokens": 5,
        "generate_tokens": 6,
        "depth": 7,
        "repeats": 8,
        "against": ["llama.cpp", "openvino"],
        "adapter": None,
    }
    assert model.closed


def test_perplexity(toy, tmp_path):
    (tmp_path / "text").write_text("The quick brown fox jumps over the lazy dog. " * 4)
    toy(context=16)
    options = ["--text", str(tmp_path / "text"), "--context", "16", "--chunks", "2"]
    told = json.loads(call("perplexity", "toy", *options, "--json").stdout)
    assert told["perplexity"] > 1
    assert told["tokens"] > 0
    toy(context=16)
    assert call("perplexity", "toy", *options).stdout.startswith("perplexity ")


def test_an_adapter_for_every_command(tmp_path):
    model = str(oracle.write_gguf(tmp_path / "model.gguf", "llama"))
    lora = str(lora_oracle.write_peft(tmp_path / "adapter", "llama"))
    told = json.loads(call("info", model, "--lora", lora, "--json").stdout)
    (adapter,) = told["adapters"]
    assert (adapter["path"], adapter["modules"], adapter["ranks"]) == (lora, 14, [4])
    assert (
        f"adapter          {lora}: 0.1 MB, 14 matrices, rank 4\n"
        in call("info", model, "--lora", lora).stdout
    )
    counts = ("--prompt-tokens", "4", "--generate-tokens", "2", "--repeats", "1")
    told = json.loads(call("bench", model, "--lora", lora, *counts, "--json").stdout)
    plain = json.loads(call("bench", model, *counts, "--json").stdout)
    more = told["bytes_per_decode_token"] - plain["bytes_per_decode_token"]
    assert more == adapter["nbytes"]
    refused = call("bench", model, "--lora", lora, "--against", "llama.cpp")
    assert refused.exit_code == 2 and refused.stderr.startswith("error: --lora has no peer")
    refused = call("info", model, "--lora", str(tmp_path / "nothing"))
    assert refused.exit_code == 2
    assert refused.stderr == f"error: {tmp_path / 'nothing'}: there is no adapter of that name\n"


def test_run_asks_for_its_adapter(toy, monkeypatch):
    seen = []
    toy()
    stream = LLM.stream
    monkeypatch.setattr(
        LLM, "stream", lambda self, prompt, params: seen.append(params) or stream(self, prompt)
    )
    assert call("run", "toy", "xy", "--lora", "some/where").exit_code == 0
    assert seen == [SamplingParams(adapter="some/where")]


class Terminal(io.StringIO):
    """Standard input that is a terminal; a line may be an exception to raise."""

    def __init__(self, *lines):
        super().__init__()
        self.lines = list(lines)

    def isatty(self):
        return True

    def readline(self, *_):
        line = self.lines.pop(0) if self.lines else ""
        if isinstance(line, BaseException):
            raise line
        return line


def talk(llm, monkeypatch, capsys, *lines):
    monkeypatch.setattr(sys, "stdin", Terminal(*lines))
    converse(llm, SamplingParams(temperature=0, max_tokens=8), None)
    return capsys.readouterr()


@pytest.fixture
def talker(toy):
    toy(template=True, context=400, max_batch_tokens=64)
    return LLM("toy")


def test_chat_keeps_the_conversation_until_reset(talker, monkeypatch, capsys):
    seen = []
    original = talker.chat
    talker.chat = lambda messages, *rest, **options: (
        seen.append([m["content"] for m in messages]) or original(messages, *rest, **options)
    )
    out, err = talk(
        talker, monkeypatch, capsys, "one\n", "\n", "two\n", "/reset\n", "three\n", "/exit\n", "x"
    )
    assert [len(contents) for contents in seen] == [1, 3, 1]
    assert [contents[-1] for contents in seen] == ["one", "two", "three"]
    assert seen[1][1] in out
    assert "forgotten" in err


def test_ctrl_c_stops_the_answer_and_not_the_program(talker, monkeypatch, capsys):
    machine = talker.model.machine

    def interrupt():
        if len(machine.steps) == 4:
            raise KeyboardInterrupt

    machine.before_step = interrupt
    seen = []
    original = talker.chat

    def chat(messages, *rest, **options):
        seen.append([m["role"] for m in messages])
        if len(seen) == 2:
            machine.before_step = lambda: None
        return original(messages, *rest, **options)

    talker.chat = chat
    _, err = talk(talker, monkeypatch, capsys, "one\n", KeyboardInterrupt(), "two\n")
    assert "Stopped." in err
    assert "Ctrl-D or /exit leaves." in err
    assert seen == [["user"], ["user", "assistant", "user"]]  # what was said stays said
    assert talker.generate("x", SamplingParams(max_tokens=1)).text is not None


def test_chat_goes_on_when_the_context_is_full(talker, monkeypatch, capsys):
    out, err = talk(talker, monkeypatch, capsys, "x" * 500 + "\n", "short\n")
    assert "the prompt has 505 tokens and the context holds 400" in err
    assert "/reset" in err
    assert out.count("\n") >= 2


def test_chat_commands(talker, monkeypatch, capsys):
    _, err = talk(talker, monkeypatch, capsys, "/help\n", "/rest\n", "/xyzzy\n")
    assert "/rest is no command; did you mean /reset?" in err
    assert err.count("forget the conversation") == 2  # /help, and after /xyzzy


def test_chat_through_a_pipe(toy):
    toy("Yes.", prompt_tokens=8, template=True)
    result = call("chat", "toy", *GREEDY, stdin="one\n/exit\ntwo\n")
    assert result.exit_code == 0
    assert (result.stdout, result.stderr) == ("Yes.\n", "")


def test_a_model_cannot_steer_the_terminal(monkeypatch):
    class Screen(io.StringIO):
        def isatty(self):
            return True

    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    write("a\x1b[2Jb\x07\tc\n\x9b1m\x7f")
    assert screen.getvalue() == "a[2Jb\tc\n1m"


def test_a_table():
    assert table([["A", "B"], ["long", "x"]]) == "A     B\nlong  x"


# Real processes: what a user types.


def test_help_is_light_and_teaches():
    code = (
        "import sys; from cyclewise.cli import app; app(['run', '--help'], standalone_mode=False);"
        "heavy = {'numpy', 'llvmlite', 'tokenizers', 'huggingface_hub', 'jinja2', 'rich'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")
    assert 'cyclewise run smollm2 "Name three rivers."' in done.stdout


def test_version():
    done = process("--version")
    assert (done.returncode, done.stdout) == (0, f"cyclewise {__version__}\n")


def test_bad_input_in_a_real_process(tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    (tmp_path / "text.gguf").write_bytes(b"not a model" * 100)
    for arguments in [
        ["run", "no-such-model", "x"],
        ["run", tmp_path / "bad.gguf", "x"],
        ["info", tmp_path / "text.gguf"],
    ]:
        done = process(*arguments)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        assert done.stdout == ""


def test_a_reader_that_stops_reading():
    command = [sys.executable, "-m", "cyclewise", "models"]
    running = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
    )
    running.stdout.close()
    assert running.stderr.read() == b""
    running.stderr.close()
    assert running.wait(timeout=60) == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/dev/full is Linux's")
def test_a_full_disk():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "cyclewise", "models"]
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL
        )
    assert done.returncode == 2
    assert done.stderr == "error: [Errno 28] No space left on device\n"


def test_ctrl_c_while_the_command_is_imported(monkeypatch, capsys):
    from cyclewise.__main__ import main

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(cyclewise.cli, "main", interrupted)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    assert capsys.readouterr() == ("", "")
