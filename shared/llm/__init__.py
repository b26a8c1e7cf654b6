"""Language models behind any OpenAI-compatible endpoint."""

from shared.llm.answer import Refused, Reply, Truncated, Usage, WrongAnswer
from shared.llm.client import LLM, Check, LLMSettings, correction, llm_from

__all__ = [
    "LLM",
    "Check",
    "LLMSettings",
    "Refused",
    "Reply",
    "Truncated",
    "Usage",
    "WrongAnswer",
    "correction",
    "llm_from",
]
