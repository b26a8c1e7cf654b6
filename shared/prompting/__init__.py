"""Prompts as files: what language models are told, and the form of what they answer."""

from shared.prompting.prompt import DataURL, Message, Prompt, load_prompt, load_question, prompts_root

__all__ = ["DataURL", "Message", "Prompt", "load_prompt", "load_question", "prompts_root"]
