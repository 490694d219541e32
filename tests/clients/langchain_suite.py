"""LangChain's own tests of a chat model, with `langchain-openai` as the client of our server."""

from __future__ import annotations

import os
from typing import Any

from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests


class TestChatModel(ChatModelIntegrationTests):
    """The capabilities that a model has by default are left as they are: text, tools, schemas."""

    @property
    def chat_model_class(self) -> type[ChatOpenAI]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {
            "model": "qwen",
            "base_url": os.environ["TEST_API_BASE_URL"],
            "api_key": os.environ["TEST_API_KEY"],
            "temperature": 0,
            "max_tokens": 256,
            "stream_usage": True,
        }

    @property
    def supports_json_mode(self) -> bool:
        return True
