"""Language models behind any OpenAI-compatible endpoint."""

from shared.llm.answer import Refused, Reply, Truncated, Usage, WrongAnswer
from shared.llm.client import LLM, Check, correction, llm_from, together
from shared.llm.encoding import Form
from shared.llm.ledger import Account, BudgetSpent, Ledger, Spend
from shared.llm.prices import Estimate, Price, Prices
from shared.llm.settings import LLMSettings

__all__ = [
    "LLM",
    "Account",
    "BudgetSpent",
    "Check",
    "Estimate",
    "Form",
    "LLMSettings",
    "Ledger",
    "Price",
    "Prices",
    "Refused",
    "Reply",
    "Spend",
    "Truncated",
    "Usage",
    "WrongAnswer",
    "correction",
    "llm_from",
    "together",
]
