"""Prompts as files: what language models are told, and the form of what they answer."""

from shared.prompting.prompt import Message, Prompt, load_prompt, prompts_root

__all__ = ["Message", "Prompt", "load_prompt", "prompts_root"]
