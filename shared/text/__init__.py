"""Texts as vectors."""

from shared.text.encoder import ClipEncoder, StaticEncoder, TextEncoder

__all__ = ["ClipEncoder", "StaticEncoder", "TextEncoder"]
