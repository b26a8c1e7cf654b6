"""What the scripted model says when it is asked for attributes and their tags: decent, and the same each time.

It knows a question by the first words of its instructions, whatever the form in which the answer is wanted.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

ATTRIBUTES: dict[str, dict[str, tuple[str, list[str]]]] = {
    "main_object": {
        "object shape": ("The outline of the object.", ["narrow", "medium", "wide"]),
        "object pattern": ("What covers the surface of the object.", ["plain", "striped", "spotted", "checked"]),
        "object pose": ("How the object is placed.", ["upright", "tilted", "lying"]),
        "is print present": ("Yes when letters or a picture are on the object.", ["yes", "no"]),
    },
    "background": {
        "background type": ("The kind of place around the object.", ["plain", "indoors", "outdoors", "not visible"]),
        "is shadow present": ("Yes when the object throws a shadow.", ["yes", "no"]),
    },
    "global": {
        "viewpoint": ("Where the object is seen from.", ["front", "side", "above"]),
        "light direction": ("Where the light comes from.", ["left", "right", "even"]),
    },
}

# Each pair of images differs most in one of five features, and so in one of these.
DIFFERENCES = (
    ("background", "support surface", "What the object lies or stands on."),
    ("main_object", "surface wear", "How worn the surface looks."),
    ("global", "is frame visible", "Yes when the picture has a frame."),
    ("background", "things nearby", "What else is in view close to the object."),
    ("main_object", "fastener type", "What holds the object together."),
)

# "object placement" says the same as "object pose", and "object charm" is in the eye of the beholder.
BOXES = (
    ("main_object", "occluded part", "The part of the object that something covers."),
    ("main_object", "Outline contrast", "How clearly the outline stands out."),
    ("background", "similar things nearby", "Things of a like shape in view."),
    ("global", "is motion blurred", "Yes when the object is smeared."),
)
JOINTS = (
    ("main_object", "hidden joints", "Which joints are covered or outside the image."),
    ("main_object", "limb crossing", "Which limbs cross."),
    ("main_object", "object placement", "How the object is placed."),
    ("background", "others touching", "How many others touch the object."),
)
CONFUSION = (
    ("main_object", "object pose", "How the object is placed."),
    ("main_object", "part proportions", "How long the parts are compared with each other."),
    ("main_object", "object placement", "How the object is placed."),
    ("main_object", "object charm", "How pleasant the object is."),
)
TAGS = {
    "support surface": ["table", "floor", "grass", "not visible"],
    "surface wear": ["new", "used", "worn out"],
    "things nearby": ["none", "tools", "plants", "furniture", "not visible"],
    "fastener type": ["buttons", "zip", "laces", "buckle", "not visible"],
    "occluded part": ["none", "upper half", "lower half", "one side"],
    "hidden joints": ["none", "hands", "feet", "head"],
    "limb crossing": ["none", "arms", "legs", "arms and legs"],
}
MERGES = {"object placement": "object pose"}
DROPS = {"object charm": "people would not agree"}
SYNONYMS = {"checkered": "checked"}


def answer(body: dict[str, Any], schema: dict[str, Any], seen: list[np.ndarray]) -> Any | None:
    """The answer to a question about attributes or their tags; None for any other question.

    `seen` are the features of each image, (5,) in [0, 1].
    """
    told = body["messages"][0]["content"]
    for words, reply in _REPLIES:
        if told.startswith(words):
            return reply(body, schema, seen)
    return None


def tags_of(name: str) -> list[str]:
    for named in ATTRIBUTES.values():
        if name in named:
            return named[name][1]
    return TAGS.get(name, ["yes", "no"] if name.startswith("is ") else ["low", "medium", "high"])


def _directly(*_: Any) -> Any:
    return {
        category: [{"name": name, "description": text} for name, (text, _) in named.items()]
        for category, named in ATTRIBUTES.items()
    }


def _listed(*found: tuple[str, str, str]) -> Any:
    lists: dict[str, list[dict[str, str]]] = {category: [] for category in ATTRIBUTES}
    for category, name, text in found:
        lists[category].append({"name": name, "description": text})
    return lists


def _compared(body: dict[str, Any], _: Any, seen: list[np.ndarray]) -> Any:
    if len(seen) != 2:
        return _listed()
    found = DIFFERENCES[int(np.abs(seen[0] - seen[1]).argmax())]
    return _listed() if found[1] in _input(body, "in the list already") else _listed(found)


def _hard(body: dict[str, Any], *_: Any) -> Any:
    told = body["messages"][0]["content"]
    return _listed(*(JOINTS if "joint" in told else BOXES))


def _confused(*_: Any) -> Any:
    return _listed(*CONFUSION)


def _similar(_: Any, schema: dict[str, Any], *__: Any) -> Any:
    classes = schema["properties"]["pairs"]["items"]["properties"]["main_object"]["enum"]
    others = [*classes[1:], f"toy {classes[0]}"]
    return {"pairs": [{"main_object": a, "other": b} for a, b in zip(classes, others, strict=True)]}


def _self_check(_: Any, schema: dict[str, Any], *__: Any) -> Any:
    names = schema["properties"]["drop"]["items"]["properties"]["name"]["enum"]
    merges = [(name, into) for name, into in MERGES.items() if {name, into} <= set(names)]
    return {
        "merge": [{"name": name, "into": into, "reason": "the same in other words"} for name, into in merges],
        "drop": [{"name": name, "reason": reason} for name, reason in DROPS.items() if name in names],
    }


def _tag_lists(_: Any, schema: dict[str, Any], *__: Any) -> Any:
    names = schema["properties"]["attributes"]["items"]["properties"]["name"]["enum"]
    return {"attributes": [{"name": name, "tags": tags_of(name)} for name in names]}


def _looked(_: Any, schema: dict[str, Any], seen: list[np.ndarray]) -> Any:
    names = schema["properties"]["missing"]["items"]["properties"]["attribute"]["enum"]
    brightness, _, _, _, fineness = seen[-1]
    missing = {"object pattern": "checkered"} if fineness > 0.5 else {}
    if brightness < 0.5:
        missing["light direction"] = "from behind"
    return {"missing": [{"attribute": name, "tag": tag} for name, tag in missing.items() if name in names]}


def _settled(body: dict[str, Any], *_: Any) -> Any:
    listed = re.findall(r"^- (.+?) \(.*\n  tags: (.*)$", _input(body, "\n  tags: "), re.MULTILINE)
    settled = []
    for name, text in listed:
        groups: dict[str, list[str]] = {}
        for tag in text.split(" | "):
            groups.setdefault(SYNONYMS.get(tag, tag), []).append(tag)
        settled.append({"name": name, "tags": [{"tag": tag, "covers": covers} for tag, covers in groups.items()]})
    return {"attributes": settled}


def _combined(body: dict[str, Any], *_: Any) -> Any:
    """Tags of neighbouring attributes, one step further in each combination."""
    text = _input(body, "Pairs in each combination: ")
    attributes = [(name, tags.split(" | ")) for name, tags in re.findall(r"^- (.+) \(\w+\): (.*)$", text, re.MULTILINE)]
    pairs, count = (
        int(re.search(words, text)[1]) for words in (r"Pairs in each combination: (\d+)", r"Give (\d+) combinations")
    )
    turned = [[(i + k) % len(attributes) for k in range(pairs)] for i in range(count)]
    return {
        "combinations": [
            {
                "pairs": [
                    {"attribute": (of := attributes[a])[0], "tag": of[1][(i + k) % len(of[1])]}
                    for k, a in enumerate(row)
                ]
            }
            for i, row in enumerate(turned)
        ]
    }


def _mixed_up(body: dict[str, Any], *_: Any) -> Any:
    asked = re.search(r"^Asked about: (.*)$", _input(body, "Asked about: "), re.MULTILINE)[1].split("; ")
    return {"targets": [{"main_object": name, "other": f"toy {name}"} for name in asked]}


def _input(body: dict[str, Any], words: str) -> str:
    """The last text of the user that holds `words`: an answer that was sent back comes after it."""
    for message in reversed(body["messages"]):
        content = message["content"]
        text = content if isinstance(content, str) else content[0]["text"]
        if message["role"] == "user" and words in text:
            return str(text)
    return ""


_REPLIES = (
    ("You list the visual attributes", _directly),
    ("You compare two images", _compared),
    ("You know how vision models fail. For the main objects", _hard),
    ("You know how vision models fail. A model takes", _confused),
    ("You know how vision models fail. For the classes", _similar),
    ("You check a list", _self_check),
    ("You write the tags", _tag_lists),
    ("You look at one image", _looked),
    ("You bring lists of tags", _settled),
    ("You foresee where vision models fail", _combined),
    ("You foresee what vision models mix up", _mixed_up),
)
