"""The embedded encoder on its real files; the CLIP encoder without open_clip, and on a tiny real model."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import InvalidInput, Precondition
from shared.text import ClipEncoder, StaticEncoder

TEXTS = st.lists(st.text(min_size=1, max_size=20).filter(str.strip), min_size=1, max_size=8)


@pytest.fixture(scope="module")
def static():
    return StaticEncoder()


@given(TEXTS)
@settings(deadline=None)
def test_rows_are_unit_repeatable_and_alone(static, texts):
    rows = static.encode(texts)
    assert rows.dtype == np.float32
    assert rows.shape == (len(texts), 256)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(rows, static.encode(texts))
    np.testing.assert_allclose(rows[-1:], static.encode(texts[-1:]), atol=1e-6)
    np.testing.assert_array_equal(static.encode([t.lower() for t in texts]), rows)


@pytest.mark.parametrize(
    ("anchor", "near", "far"),
    [
        ("red", "crimson", "indoors"),
        ("small", "tiny", "foggy"),
        ("indoors", "living room", "crimson"),
        ("cloudy", "foggy", "small"),
    ],
)
def test_near_in_meaning_is_near(static, anchor, near, far):
    a, b, c = static.encode([anchor, near, far])
    assert a @ b > a @ c


def test_more_texts_than_a_batch(static):
    texts = [f"tag {i}" for i in range(5000)]
    rows = static.encode(texts)
    np.testing.assert_allclose(
        rows[[0, 4095, 4096, 4999]], static.encode([texts[i] for i in (0, 4095, 4096, 4999)]), atol=1e-6
    )


def test_no_texts_no_rows(static):
    assert static.encode([]).shape == (0, 256)


def test_blank_texts_are_named(static):
    with pytest.raises(InvalidInput) as caught:
        static.encode(["red", " ", "blue", ""])
    assert [v.field for v in caught.value.violations] == ["texts[1]", "texts[3]"]


def test_the_name_tells_the_weights(static):
    assert "l2_supercat_256@" in static.name


def test_without_network_or_the_wheels_own_loader():
    """In a process of its own: whatever reaches for a socket fails, and the wheel's code is never imported."""
    code = """
import socket, sys
def refuse(*args, **kwargs):
    raise AssertionError("reached for the network")
socket.socket = socket.create_connection = socket.getaddrinfo = refuse
from shared.text import StaticEncoder
assert StaticEncoder().encode(["red"]).shape == (1, 256)
assert "wordllama" not in sys.modules and "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_files_that_are_not_installed(monkeypatch):
    monkeypatch.setattr(StaticEncoder, "_VECTORS", "wordllama/weights/none.safetensors")
    with pytest.raises(Precondition, match=r"hibug2-platform\[text\]"):
        StaticEncoder()


HAS_CLIP = importlib.util.find_spec("open_clip") is not None


@pytest.mark.skipif(HAS_CLIP, reason="open_clip is installed")
def test_clip_without_open_clip_says_what_to_install():
    with pytest.raises(Precondition, match=r"hibug2-platform\[clip\]"):
        ClipEncoder("ViT-B-32", "openai")


def test_clip_without_weights_is_refused():
    with pytest.raises(Precondition, match="no weights"):
        ClipEncoder("ViT-B-32", "")


@pytest.mark.skipif(not HAS_CLIP, reason="open_clip is not installed (the extra `clip`)")
class TestClip:
    def test_rows_are_unit_and_repeatable(self, tiny_clip):
        encoder = ClipEncoder("tiny-clip", tiny_clip)
        texts = [f"photo of object, color: {i}" for i in range(300)]
        rows = encoder.encode(texts)
        assert rows.dtype == np.float32
        assert rows.shape == (300, 16)
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
        np.testing.assert_allclose(rows, ClipEncoder("tiny-clip", tiny_clip).encode(texts), atol=1e-6)
        np.testing.assert_allclose(rows[[299]], encoder.encode(texts[299:]), atol=1e-5)
        assert encoder.encode([]).shape == (0, 16)
        assert encoder.name == "open_clip/tiny-clip@tiny.pt"

    @pytest.mark.parametrize(("model", "weights"), [("no-such-model", None), ("tiny-clip", "no/such/file.pt")])
    def test_what_cannot_be_loaded_is_named(self, tiny_clip, model, weights):
        with pytest.raises(Precondition) as caught:
            ClipEncoder(model, weights or tiny_clip)
        assert model in str(caught.value)
        assert (weights or tiny_clip) in str(caught.value)
