"""What a prompt is set into before an understanding model reads it."""

from __future__ import annotations

from dataclasses import dataclass, fields

from nexus_rt.core.errors import ModelError, shorten, shown

SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content"
    " that the user provides, and assist the user with a variety of tasks using natural language."
)
REWRITE = (
    "Say what the user's request shows as one plain description of a video: the things in it, how"
    " they look and how they move. Work out what is only hinted at. Answer with the description"
    " alone."
)
_CHAT = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n" + REWRITE + "<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n{prompt}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
_LLAMA3 = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n" + SYSTEM + "<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nGenerate {kind} about:\n{prompt}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{marker}<|end_of_text|>"
)


def _llama3(kind: str, marker: str) -> str:
    return _LLAMA3.replace("{kind}", kind).replace("{marker}", marker)


@dataclass(frozen=True)
class Template:
    """What a prompt is set into, `{prompt}` marking its place; by default Omni-Video's, in Llama
    3's chat format. chat: what it is set into to be answered in words."""

    video: str = _llama3("a video", "[GEN_VID]")
    image: str = _llama3("an image", "[GEN_IMG]")  # for a single frame
    video_marker: str = "[GEN_VID]"
    image_marker: str = "[GEN_IMG]"
    chat: str = _CHAT

    def __post_init__(self) -> None:
        for name, marker in (
            ("video", self.video_marker),
            ("image", self.image_marker),
            ("chat", None),
        ):
            text = getattr(self, name)
            if text.count("{prompt}") != 1:
                raise ModelError(
                    f"the {name} template has {text.count('{prompt}')} prompt slots; expected"
                    " exactly one '{prompt}'.",
                    code="invalid_value",
                    param=name,
                )
            if marker is not None and (not marker or marker not in text):
                raise ModelError(
                    f"the {name} template lacks its marker {shorten(marker, 80)}; it must end in"
                    f" it.",
                    code="missing",
                    param=name,
                )

    @classmethod
    def from_dict(cls, values: dict) -> Template:
        """Read the `template` object of a connector's config."""
        if not isinstance(values, dict) or not all(isinstance(v, str) for v in values.values()):
            raise ModelError(
                "the template is no object of texts; expected video, image, their markers and"
                " chat.",
                code="invalid_type",
                param="template",
            )
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ModelError(
                f"the template sets an unknown {shown(unknown[0])}; expected video, image,"
                " their markers and chat.",
                code="unknown_name",
                param=shorten(unknown[0], 60),
            )
        return cls(**values)

    def render(self, prompt: str, single_frame: bool = False) -> str:
        """The text the model reads."""
        return (self.image if single_frame else self.video).replace("{prompt}", prompt)
