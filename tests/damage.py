"""Ways to damage a model's folder: each draws what it does, does it, and says what it did."""

import json
import os
import shutil
from pathlib import Path

import torch
import yaml
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

VALUES = st.sampled_from(
    [None, True, False, 0, 1, -1, 2, 3, 7, 10**18, -(10**18), 0.0, -0.5, 1.5, 1e300, float("nan"), float("inf"),
     "", " ", "x", "silu", "linear", "auto", "../..", "moesaic", "a\nb", [], [1], ["x"], [[]], [0, 1], {}, {"x": 1},
     {"rope_type": "yarn"}, {"type": []}]
)  # fmt: skip
INDEX = "model.safetensors.index.json"


def some_of(draw, found):
    """One of what was found, by a stable order."""
    return draw(st.sampled_from(sorted(found)))


def shard(draw, folder):
    """A file of tensors, read; None where it cannot be."""
    names = [path.name for path in folder.glob("*.safetensors") if path.is_file()]
    if not names:
        return None, {}
    path = folder / some_of(draw, names)
    try:
        return path, load_file(path)
    except Exception:  # damaged before
        return path, {}


def store(draw, path, tensors, name="", change=None):
    """Write a file of tensors again; an index may learn of it, or not."""
    save_file({k: t.contiguous() for k, t in tensors.items()}, path, metadata={"format": "pt"})
    index = path.parent / INDEX
    if name and index.is_file() and draw(st.booleans()):
        content = json.loads(index.read_text())
        content["weight_map"].pop(name, None)
        content["weight_map"] |= {key: path.name for key in tensors if change == key}
        index.write_text(json.dumps(content))


def presence(draw, folder):
    """A tensor is gone, has another name, or is there twice."""
    path, tensors = shard(draw, folder)
    if not tensors:
        return ""
    name = some_of(draw, tensors)
    kind = draw(st.sampled_from(["drop", "rename", "copy", "scale"]))
    ending = {"rename": "x", "copy": ".copy", "scale": "_scale"}.get(kind, "")
    kept = tensors[name] if kind in ("copy", "scale") else tensors.pop(name)
    if ending:
        tensors[name + ending] = torch.ones(1) if kind == "scale" else kept.clone()
    store(draw, path, tensors, name if kind in ("drop", "rename") else "x", name + ending)
    return f"{kind} {name}"


def shape(draw, folder):
    """A tensor has another shape."""
    path, tensors = shard(draw, folder)
    if not tensors:
        return ""
    name = some_of(draw, tensors)
    changes = {
        "transposed": lambda t: t.T if t.ndim == 2 else t[None],
        "flat": lambda t: t.flatten() if t.ndim > 1 else t[:, None],
        "a row less": lambda t: t[:-1],
        "a row more": lambda t: torch.cat([t, t[-1:]]),
        "none": lambda t: t[:0],
        "a number": lambda t: t.flatten()[:1].reshape(()),
    }
    kind = some_of(draw, changes)
    if not tensors[name].ndim or changes[kind](tensors[name]).shape == tensors[name].shape:
        return ""
    tensors[name] = changes[kind](tensors[name]).clone()
    store(draw, path, tensors)
    return f"{kind} {name}"


def dtype(draw, folder):
    """A tensor has another dtype."""
    path, tensors = shard(draw, folder)
    if not tensors:
        return ""
    name = some_of(draw, tensors)
    if not tensors[name].is_floating_point():
        return ""
    kinds = ["int8", "uint8", "int64", "bool", "float8_e4m3fn", "float16", "float32", "float64", "complex64"]
    kind = draw(st.sampled_from(kinds))
    tensors[name] = tensors[name].to(getattr(torch, kind))
    store(draw, path, tensors)
    return f"{kind} {name}"


def numbers(draw, folder):
    """A tensor holds what is no weight."""
    path, tensors = shard(draw, folder)
    if not tensors:
        return ""
    name, value = some_of(draw, tensors), draw(st.sampled_from(["nan", "inf", "-inf", "1e30", "0"]))
    where = draw(st.sampled_from(["one", "all"]))
    if tensors[name].numel() == 0:
        return ""
    flat = tensors[name].flatten()
    flat[: 1 if where == "one" else None] = torch.tensor(float(value)).to(flat.dtype)
    tensors[name] = flat.view_as(tensors[name])
    store(draw, path, tensors)
    return f"{where} {value} in {name}"


def content(draw, folder):
    """Bytes of a file are others."""
    names = [path.name for path in folder.iterdir() if path.is_file() and not path.is_symlink()]
    if not names:
        return ""
    path = folder / some_of(draw, names)
    data = bytearray(path.read_bytes())
    kind = draw(st.sampled_from(["cut", "empty", "zero", "flip", "more", "text", "deep", "bytes"]))
    place = int(len(data) * draw(st.sampled_from([0, 1e-6, 0.001, 0.1, 0.5, 0.9, 0.999])))
    if kind == "cut":
        del data[place:]
    elif kind == "zero":
        data[place : place + 64] = bytes(len(data[place : place + 64]))
    elif kind == "flip":
        data[place : place + 3] = bytes(byte ^ 0x5A for byte in data[place : place + 3])
    else:
        kinds = {"empty": b"", "more": data + b"x" * 9, "text": b"hello", "deep": b"[" * 9_999, "bytes": b"\xff\xfe\0x"}
        data = kinds[kind]
    path.write_bytes(data)
    return f"{path.name}: {kind} at {place}"


def places(value, path=()):
    """All places in JSON, but no list's or mapping's beyond its first and last few entries."""
    found = [path]
    entries = list(value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ()))
    for key, inner in entries if len(entries) < 60 else entries[:3] + entries[-3:]:
        found += places(inner, (*path, key))
    return found


def settings(draw, folder):
    """A value in a file of settings is another, of any type, is gone, or one is new."""
    names = [path.name for path in folder.iterdir() if path.suffix in (".json", ".yaml") and path.is_file()]
    if not names:
        return ""
    weight = [name for name in names if name == "config.json"] * 6
    path = folder / draw(st.sampled_from(sorted([*names, *weight])))
    read = yaml.safe_load if path.suffix == ".yaml" else json.loads
    try:
        values = read(path.read_text())
    except Exception:  # damaged before
        return ""
    found = [place for place in places(values) if place] if isinstance(values, dict | list) else []
    if not found:
        return ""
    *outer, last = draw(st.sampled_from(sorted(found, key=str)))
    inside = values
    for key in outer:
        inside = inside[key]
    kind = draw(st.sampled_from(["set", "set", "set", "drop", "add"]))
    value = draw(VALUES)
    if kind == "drop":
        del inside[last]
    elif kind == "add" and isinstance(inside, dict):
        last = draw(st.sampled_from(["tie_word_embeddings", "num_experts", "quantization_config", "auto_map", "dtype",
                                     "torch_dtype", "sliding_window", "layer_types", "rope_scaling", "text_config", "x",
                                     "use_cache", "chat_template", "compression_config", "is_encoder_decoder",
                                     "_attn_implementation", "attn_implementation", "num_labels", "id2label"]
                                    ))  # fmt: skip
        inside[last] = value
    else:
        inside[last] = value
    path.write_text(yaml.safe_dump(values) if path.suffix == ".yaml" else json.dumps(values))
    return f"{path.name}: {kind} {'.'.join(map(str, [*outer, last]))} {value!r}"


def files(draw, folder):
    """A file is gone or no file any more."""
    names = [path.name for path in folder.iterdir()]
    if not names:
        return ""
    path = folder / some_of(draw, names)
    kind = draw(st.sampled_from(["gone", "folder", "link", "dangling", "loop", "device", "unreadable", "other"]))
    if kind == "unreadable":
        path.chmod(0) if not path.is_symlink() else None
        return f"{path.name}: unreadable"
    data = path.read_bytes() if path.is_file() else b""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        (folder.parent / f"real-{path.name}").write_bytes(data)
        path.symlink_to(folder.parent / f"real-{path.name}")
    elif kind == "other":
        other = some_of(draw, [each.name for each in folder.iterdir()] or ["none"])
        if (folder / other).is_file():
            shutil.copyfile(folder / other, path)
        kind += f" {other}"
    elif kind in ("dangling", "loop", "device"):
        path.symlink_to({"dangling": "nowhere", "loop": path.name, "device": os.devnull}[kind])
    return f"{path.name}: {kind}"


def index(draw, folder):
    """An index names other files."""
    path = folder / INDEX
    try:
        values = json.loads(path.read_text())
        names = sorted(values["weight_map"])
    except Exception:  # there is none, or it was damaged before
        if not (folder / "model.safetensors").is_file():
            return ""
        names = ["model.norm.weight"]
        values = {"metadata": {}, "weight_map": {names[0]: "model.safetensors"}}
    name = draw(st.sampled_from(names))
    value = draw(
        st.sampled_from(["../x.safetensors", "/etc/passwd", ".", "..", "", "config.json", "model-outer.safetensors",
                         "model-layer-00001.safetensors", None, 5, ["x"], "x" * 300, "a\\b", "a\0b", "\ud800"])
    )  # fmt: skip
    new = draw(st.sampled_from([name, name + ".more", ""]))
    values["weight_map"][new] = value
    path.write_text(json.dumps(values))
    return f"{INDEX}: {new} is in {value!r}"


TENSORS = (presence, shape, dtype)
"""Damages that no exit code 0 may hide."""
ALL = (*TENSORS, numbers, content, settings, settings, settings, files, index)
EXTRA = {
    "hf_quant_config.json": "{}", "adapter_config.json": "{}", "chat_template.jinja": "{{ x", "added_tokens.json": "[]",
    "special_tokens_map.json": "5", "modeling.py": "raise SystemExit", "preprocessor_config.json": "[]",
    "tokenizer.model": "x", "vocab.json": "{}", "merges.txt": "", "README.md": "---\na: [\n---",
    "pytorch_model.bin": "x", "model.safetensors": "", "LICENSE": "x",
}  # fmt: skip


def extra(draw, folder):
    """A file is there that was not."""
    name = some_of(draw, EXTRA)
    path = Path(folder) / name
    if os.path.lexists(path):
        return ""
    path.write_text(EXTRA[name])
    return f"{name}: new"
