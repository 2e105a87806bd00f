"""Tiny vision-language models of every family, with random weights, and what makes their inputs.

Four families have their real processors. Those of the others need torchvision, which no test has: a few lines here do
what they do to a picture of 32 x 32 pixels.
"""

import numpy
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3Processor,
    Gemma3TextConfig,
    Idefics3Config,
    Idefics3Processor,
    InternVLConfig,
    InternVLVisionConfig,
    Lfm2Config,
    Lfm2VlConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaOnevisionConfig,
    LlavaProcessor,
    PaddleOCRVLConfig,
    PaddleOCRVLProcessor,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen3VLConfig,
    Siglip2VisionConfig,
    SiglipVisionConfig,
    SmolVLMConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import PaddleOCRVLImageProcessorPil

from moesaic.checkpoint.builtin import tiny_folder

IMAGE, VIDEO, START, END = 1024, 1025, 1026, 1027
"""Token ids beyond those of `tiny`, whose tokenizer all have."""
SPECIAL = ("<image>", "<video>", "<start>", "<end>")
TEXT = {
    "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 1032, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 1, "initializer_range": 0.1,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
MROPE = {"head_dim": 8, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
TOKENS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END,
}  # fmt: skip
QWEN_VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32, "patch_size": 8,
}  # fmt: skip
CONFIGS = {
    "llava": lambda: LlavaConfig(
        text_config=LlamaConfig(**TEXT), vision_config=CLIPVisionConfig(**VISION), image_token_index=IMAGE
    ),
    "llava-onevision": lambda: LlavaOnevisionConfig(
        text_config=Qwen2Config(**TEXT), vision_config=SiglipVisionConfig(**VISION), image_token_index=IMAGE,
        video_token_index=VIDEO, image_grid_pinpoints=[[32, 32]],
    ),
    "smolvlm": lambda: SmolVLMConfig(
        text_config=LlamaConfig(**TEXT), vision_config=VISION, image_token_id=IMAGE, scale_factor=2, pad_token_id=1
    ),
    "idefics3": lambda: Idefics3Config(
        text_config=LlamaConfig(**TEXT), vision_config=VISION, image_token_id=IMAGE, scale_factor=2, pad_token_id=1
    ),
    "internvl": lambda: InternVLConfig(
        text_config=Qwen2Config(**TEXT), image_token_id=IMAGE, image_seq_length=4, downsample_ratio=0.5,
        vision_config=InternVLVisionConfig(**VISION | {"image_size": [32, 32], "patch_size": [8, 8]}),
    ),
    "lfm2-vl": lambda: Lfm2VlConfig(
        text_config=Lfm2Config(**TEXT, layer_types=["conv", "full_attention", "conv"], block_auto_adjust_ff_dim=False),
        vision_config=Siglip2VisionConfig(**{n: v for n, v in VISION.items() if n != "image_size"}, num_patches=16),
        image_token_id=IMAGE, downsample_factor=2,
    ),
    "gemma3": lambda: Gemma3Config(
        text_config=Gemma3TextConfig(
            **TEXT, head_dim=8, sliding_window=8,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        vision_config=SiglipVisionConfig(**VISION), image_token_index=IMAGE, mm_tokens_per_image=4,
        boi_token_index=START, eoi_token_index=END,
    ),
    "qwen2.5-vl": lambda: Qwen2_5_VLConfig(
        text_config=TEXT | MROPE, **TOKENS,
        vision_config=QWEN_VISION | {"depth": 2, "window_size": 16, "fullatt_block_indexes": [1]},
    ),
    "qwen3-vl": lambda: Qwen3VLConfig(
        text_config=TEXT | MROPE, **TOKENS,
        vision_config=QWEN_VISION | {"depth": 3, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
    ),
    "paddleocr-vl": lambda: PaddleOCRVLConfig(text_config=TEXT | MROPE, vision_config=VISION, **TOKENS),
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' }}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{{ MARK if p['type'] == 'image' else p['text'] }}{% endfor %}{% endif %}"
    "{{ '\n' if m['role'] == 'user' else '</s>' }}{% endfor %}{{ 'assistant: ' if add_generation_prompt else '' }}"
)


def tokenizer():
    """tiny's, with tokens for pictures behind its own."""
    found = AutoTokenizer.from_pretrained(tiny_folder())
    found.add_tokens(list(SPECIAL), special_tokens=True)
    return found


def template(mark):
    return TEMPLATE.replace("MARK", repr(mark))


class ByHand:
    """What a processor that needs torchvision does to texts with pictures of 32 x 32 pixels."""

    image_token = "<image>"
    image_processor = True

    def __init__(self, tokens, make):
        self.tokenizer, self.tokens, self.make = tokenizer(), tokens, make
        self.chat_template = template("<start><image><end>")

    def apply_chat_template(self, turns, **arguments):
        return self.tokenizer.apply_chat_template(turns, chat_template=self.chat_template, **arguments)

    def __call__(self, text, return_tensors, images=()):
        texts = [one.replace("<image>", "<image>" * self.tokens) for one in text]
        made = dict(self.tokenizer(texts, return_tensors=return_tensors))
        pixels = [torch.tensor(numpy.array(image.resize((32, 32)))).permute(2, 0, 1) / 127.5 - 1 for image in images]
        return made | (self.make(torch.stack(pixels), made["input_ids"]) if images else {})


def patches(pixels_NCHW):
    """[N, 3, 32, 32] -> [N, 16, 3, 8, 8]"""
    return pixels_NCHW.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)


def qwen(pixels_NCHW, ids_BL):
    """Each patch twice, as two frames, in blocks of 2 x 2."""
    order = torch.arange(16).view(2, 2, 2, 2).permute(0, 2, 1, 3).flatten()
    flat = patches(pixels_NCHW)[:, order].unsqueeze(3).expand(-1, -1, -1, 2, -1, -1).flatten(2).flatten(0, 1)
    grid = torch.tensor([[1, 4, 4]] * len(pixels_NCHW))
    return {"pixel_values": flat, "image_grid_thw": grid, "mm_token_type_ids": (ids_BL == IMAGE).long()}


def real(make):
    return lambda: make(tokenizer())


PROCESSORS = {
    "llava": real(
        lambda tokens: LlavaProcessor(
            CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}), tokens,
            patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
            chat_template=template("<image>"),
        )
    ),
    "idefics3": real(
        lambda tokens: Idefics3Processor(
            Idefics3ImageProcessorPil(
                size={"longest_edge": 32}, max_image_size={"longest_edge": 32}, do_image_splitting=False
            ),
            tokens, image_seq_len=4, chat_template=template("<image>"),
        )
    ),
    "gemma3": real(
        lambda tokens: Gemma3Processor(
            Gemma3ImageProcessorPil(size={"height": 32, "width": 32}),
            named(tokens, boi_token="<start>", eoi_token="<end>", image_token="<image>", boi_token_id=START,
                  image_token_id=IMAGE),
            image_seq_length=4, chat_template=template("<start>"),
        )
    ),
    "paddleocr-vl": real(
        lambda tokens: PaddleOCRVLProcessor(
            PaddleOCRVLImageProcessorPil(patch_size=8, size={"shortest_edge": 1024, "longest_edge": 4096}),
            named(tokens, image_token="<image>", image_token_id=IMAGE), chat_template=template("<start><image><end>"),
        )
    ),
    "llava-onevision": lambda: ByHand(
        36, lambda pixels, _: {
            "pixel_values": pixels[:, None].expand(-1, 2, -1, -1, -1),
            "image_sizes": torch.tensor([[32, 32]] * len(pixels)),
        }
    ),
    "smolvlm": lambda: ByHand(
        4, lambda pixels, _: {
            "pixel_values": pixels[None], "pixel_attention_mask": torch.ones(1, len(pixels), 32, 32, dtype=torch.long)
        }
    ),
    "internvl": lambda: ByHand(4, lambda pixels, _: {"pixel_values": pixels}),
    "lfm2-vl": lambda: ByHand(
        4, lambda pixels, _: {
            "pixel_values": patches(pixels).permute(0, 1, 3, 4, 2).flatten(2),
            "spatial_shapes": torch.tensor([[4, 4]] * len(pixels)),
            "pixel_attention_mask": torch.ones(len(pixels), 16, dtype=torch.long),
        }
    ),
    "qwen2.5-vl": lambda: ByHand(4, qwen),
    "qwen3-vl": lambda: ByHand(4, qwen),
}  # fmt: skip


def named(tokens, **names):
    for name, value in names.items():
        setattr(tokens, name, value)
    return tokens


def small_vision_model(family):
    """A model of a family, whose norms are not all one."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(CONFIGS[family]()).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model
