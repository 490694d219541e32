from __future__ import annotations

import pytest

from cyclewise.errors import UnsupportedModelError
from cyclewise.text.pretokenizers import keeps_whole_words, patterns_of


def words(pre: str, text: str) -> list[str]:
    from tokenizers import Regex, pre_tokenizers

    splits = [pre_tokenizers.Split(Regex(p), behavior="isolated") for p in patterns_of(pre)]
    return [word for word, _ in pre_tokenizers.Sequence(splits).pre_tokenize_str(text)]


TEXT = "I'LL pay $1234  for\n\n «École»!"


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", "I|'|LL| pay| $|1234| | for|\n\n| «|École|»!"),
        ("smollm", "I|'|LL| pay| $|1|2|3|4| | for|\n\n| «|École|»!"),
        ("qwen2", "I|'LL| pay| $|1|2|3|4| | for|\n\n| «|École|»!"),
        ("llama-bpe", "I|'LL| pay| $|123|4| | for|\n\n| «|École|»!"),
        ("gpt-4o", "I'LL| pay| $|123|4| | for|\n\n| «|École|»!"),
        ("tekken", "I|'LL| pay| $|1|2|3|4| | for|\n\n| «|École|»!"),
        ("falcon", "I|'|LL| pay| |$|123|4| | for|\n\n |«|École|»!"),
        ("default", "I|'|LL| pay| |$|123|4| | for|\n\n |«|École|»!"),
        ("deepseek-coder", "I|'|LL| pay| $|1|2|3|4| | for|\n|\n| «|École|»!"),
        ("deepseek-v3", "I|'LL| pay| $|123|4| | for|\n\n| «|École|»!"),
    ],
)
def test_words(pre, expected):
    assert words(pre, TEXT) == expected.split("|")


NAMES = (
    "default llama-bpe llama3 llama-v3 deepseek-llm deepseek-coder deepseek-v3 falcon mpt "
    "starcoder gpt-2 refact command-r qwen2 deepseek-r1-qwen olmo dbrx smollm smaug-bpe "
    "stablelm2 tekken gpt-4o exaone chatglm-bpe glm4 poro-chat viking bailingmoe seed-coder qwen35"
)


@pytest.mark.parametrize("pre", NAMES.split())
def test_every_name_compiles_and_loses_nothing(pre):
    text = "a  b\tc\r\n12345 日本語 l'été's x_y(z) 😀\u3000!"
    assert "".join(words(pre, text)) == text


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(UnsupportedModelError, match=r"'llama-bp' .*nearest known is 'llama-bpe'"):
        patterns_of("llama-bp")


def test_llama3_keeps_words_whole():
    assert keeps_whole_words("llama-bpe") and not keeps_whole_words("qwen2")
