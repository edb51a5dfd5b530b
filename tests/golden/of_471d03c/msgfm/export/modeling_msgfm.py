"""msGFM in plain PyTorch: everything needed to load this folder's weights and run them, in one file.

    from modeling_msgfm import load
    model = load("FOLDER")                      # strict: every tensor must fit
    outputs = model({"hr": {"image": image}})

`python modeling_msgfm.py [FOLDER]` runs the frozen batch of parity.safetensors and prints the differences. Needs torch
and safetensors; where `transformers` is installed, MsGFMModel is a PreTrainedModel with the same forward.

Inputs are raw physical units as `input_contract` in config.json declares them (bands and their order, unit,
statistics); the model normalises. Per sensor: image [B,T,C,H,W], every acquisition encoded alone and brought to the
training's image size first (`embed`, `encode` and `decode` take normalised images of any size); optional valid
[B,T,H,W] (1 = measured), bands [B,T,C] (1 = measured), hidden [B,T,h,w] (1 = this patch of the resized image is
replaced by the mask token). Any subset of the sensors will do.

In evaluation a token always gets its expert. In training mode an expert has room for a share of the tokens of `group`
images and the gate is noisy, as in pretraining; stochastic depth and the auxiliary loss are not here.
"""
import importlib.util
import json
import pathlib
import sys

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn


def pad_corner(x, multiple):
    """Zero padding at the bottom and the right of [B,H,W,C] up to multiples."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % multiple, 0, -x.shape[1] % multiple))


class PatchEmbed(nn.Module):
    def __init__(self, channels, width, patch):
        super().__init__()
        self.patch, self.proj, self.norm = patch, nn.Conv2d(channels, width, patch, patch), nn.LayerNorm(width)

    def forward(self, x):  # [B,C,H,W] -> [B,h,w,width]
        x = pad_corner(x.permute(0, 2, 3, 1), self.patch).permute(0, 3, 1, 2)
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class WindowAttention(nn.Module):
    """Scaled dot-product attention inside windows with a table of relative biases."""

    def __init__(self, width, heads, window):
        super().__init__()
        self.heads, self.window = heads, window
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x, mask):  # [B, windows, n*n, C], [windows, n*n, n*n] or None
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5)
        q, k, v = qkv[0] * qkv.shape[-1] ** -0.5, qkv[1], qkv[2]
        n, reach = round(x.shape[2] ** 0.5), self.window - 1  # a window smaller than the table's uses its middle
        at = torch.arange(n * n, device=x.device)
        y, z = at // n, at % n
        index = (y[:, None] - y + reach) * (2 * reach + 1) + z[:, None] - z + reach
        logits = q @ k.transpose(-2, -1) + self.relative_position_bias_table[index].permute(2, 0, 1)
        logits = logits if mask is None else logits + mask[:, None]
        return self.proj((logits.softmax(-1) @ v).transpose(2, 3).flatten(3))


class MLP(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Experts(nn.Module):
    def __init__(self, count, width, hidden):
        super().__init__()
        shapes = {"fc1_w": (hidden, width), "fc1_bias": (hidden,), "fc2_w": (hidden, width), "fc2_bias": (width,)}
        for name, shape in shapes.items():
            self.register_parameter(f"batched_{name}", nn.Parameter(torch.zeros(count, *shape).normal_(std=0.02)))

    def forward(self, x, e):  # [n, C] through expert e
        h = F.gelu(x @ self.batched_fc1_w[e].T + self.batched_fc1_bias[e])
        return h @ self.batched_fc2_w[e] + self.batched_fc2_bias[e]


class Gate(nn.Module):
    def __init__(self, width, count):
        super().__init__()
        self.wg = nn.Linear(width, count, bias=False)


class MixtureLayer(nn.Module):
    """Top-1 routing: a token's score times its expert's output; 0 where the expert has no place left for it."""

    def __init__(self, width, hidden, moe):
        super().__init__()
        self.count, self.capacity, self.group, self.noise = (
            moe[key] for key in ("experts", "capacity", "group", "gate_noise"))
        self.gates = nn.ModuleList([Gate(width, self.count)])
        self.experts = Experts(self.count, width, hidden)

    def forward(self, x):  # [B,H,W,C] -> same
        tokens = x.flatten(0, 2)
        logits = self.gates[0].wg(tokens)
        if self.training and self.noise:
            logits = logits + self.noise / self.count * torch.randn_like(logits)
        score, expert = logits.softmax(-1).max(-1)
        kept = self.kept(score, expert, x.shape) if self.training else torch.ones_like(expert, dtype=torch.bool)
        out = torch.zeros_like(tokens)
        for e in range(self.count):
            chosen = torch.nonzero((expert == e) & kept)[:, 0]
            out = out.index_add(0, chosen, score[chosen, None] * self.experts(tokens[chosen], e))
        return out.view_as(x)

    def kept(self, score, expert, shape):
        """Which tokens an expert has a place for: of the images routed together, those with the highest scores."""
        if shape[0] % self.group:
            raise ValueError(f"in training mode a batch must be a multiple of moe.group = {self.group}, got {shape[0]}")
        count = self.group * shape[1] * shape[2]
        places, kept = int(self.capacity * -(-count // self.count)), torch.zeros_like(expert, dtype=torch.bool)
        for start in range(0, len(expert), count):
            order = start + score[start:start + count].argsort(descending=True, stable=True)
            for e in range(self.count):
                kept[order[expert[order] == e][:places]] = True
        return kept


class Mixture(nn.Module):  # the extra level of the official names
    def __init__(self, width, hidden, moe):
        super().__init__()
        self._moe_layer = MixtureLayer(width, hidden, moe)

    def forward(self, x):
        return self._moe_layer(x)


class Block(nn.Module):
    """Pre-norm block on a map [B,H,W,C]. A map no larger than the window is one window, and not shifted."""

    def __init__(self, width, heads, window, shifted, hidden, moe):
        super().__init__()
        self.window, self.shifted = window, shifted
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = WindowAttention(width, heads, window)
        self.mlp = Mixture(width, hidden, moe) if moe else MLP(width, hidden)

    def forward(self, x):
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def attend(self, x):
        """Pad, roll, cut into windows, attend, undo it. Padding is not masked; other regions of a rolled map get
        -100."""
        _, height, width, channels = x.shape
        w = min(self.window, height, width)
        shift = self.window // 2 if self.shifted and min(height, width) > self.window else 0
        x = pad_corner(x, w)
        rows, columns = x.shape[1] // w, x.shape[2] // w
        mask = self.mask(x.shape[1], x.shape[2], w, shift, x) if shift else None
        x = torch.roll(x, (-shift, -shift), (1, 2))
        x = x.unflatten(2, (columns, w)).unflatten(1, (rows, w)).transpose(2, 3).reshape(len(x), -1, w * w, channels)
        x = self.attn(x, mask)
        x = x.reshape(len(x), rows, columns, w, w, channels).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return torch.roll(x, (shift, shift), (1, 2))[:, :height, :width]

    def mask(self, height, width, w, shift, like):
        axes = (torch.arange(-n, 0, device=like.device) for n in (height, width))
        y, x = ((at >= -w).long() + (at >= -shift).long() for at in axes)
        ids = 3 * y[:, None] + x
        ids = ids.unflatten(1, (-1, w)).unflatten(0, (-1, w)).transpose(1, 2).reshape(-1, w * w)
        return (ids[:, :, None] != ids[:, None, :]).to(like.dtype) * -100.0


class PatchMerging(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x):  # [B,H,W,C] -> [B,H/2,W/2,2C]; column outer, row inner
        x = pad_corner(x, 2)
        x = torch.cat([x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], -1)
        return self.reduction(self.norm(x))


class Stage(nn.Module):
    """The blocks of a stage; merging follows them, as in the official names."""

    def __init__(self, width, heads, window, depth, hidden, moe, merges):
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(width, heads, window, bool(b % 2), hidden, moe if b % 2 else None) for b in range(depth))
        if merges:
            self.downsample = PatchMerging(width)


class Encoder(nn.Module):
    def __init__(self, architecture, contract):
        super().__init__()
        cfg, count = architecture, len(architecture["depths"])
        held = cfg.get("modules")
        if not held or "mask_token" in held:
            self.mask_token = nn.Parameter(torch.zeros(1, 1, cfg["embed_dims"]))
        self.patch_embeds = nn.ModuleDict({
            name: PatchEmbed(len(rule["bands"]), cfg["embed_dims"], cfg["patch"])
            for name, rule in contract["sensors"].items()})
        stages = []
        for s, depth in enumerate(cfg["depths"]):
            width, grid = cfg["embed_dims"] * 2**s, cfg["img_size"] // (cfg["patch"] * 2**s)
            moe = cfg["moe"] if s in cfg["moe"]["stages"] else None
            stages.append(Stage(width, cfg["num_heads"][s], min(cfg["window"], grid), depth,
                                int(width * cfg["mlp_ratio"]), moe, s < count - 1))
        self.layers, self.norm = nn.ModuleList(stages), nn.LayerNorm(cfg["embed_dims"] * 2 ** (count - 1))
        for norm in (m for m in self.modules() if isinstance(m, nn.LayerNorm)):
            norm.eps = cfg["eps"]


class MsGFMParts:
    """Construction and forward pass, shared by the plain module and the transformers one."""

    def build(self, architecture, contract):
        self.architecture, self.contract = architecture, contract
        self.stride = architecture["patch"] * 2 ** (len(architecture["depths"]) - 1)
        width, held = architecture["embed_dims"] * 2 ** (len(architecture["depths"]) - 1), architecture.get("modules")
        self.encoder = Encoder(architecture, contract)
        self.decoders = nn.ModuleDict({
            name: nn.Sequential(nn.Conv2d(width, len(rule["bands"]) * self.stride**2, 1), nn.PixelShuffle(self.stride))
            for name, rule in contract["sensors"].items() if not held or f"decoder_{name}" in held})

    def embed(self, name, image, hidden=None):
        """Normalised [B,C,H,W] -> tokens [B,h,w,width]; hidden [B,h,w]: nonzero = the mask token instead."""
        tokens = self.encoder.patch_embeds[name](image)
        if hidden is None:
            return tokens
        if hidden.shape != tokens.shape[:3]:
            raise ValueError(f"{name}: hidden must be {tuple(tokens.shape[:3])}, one value per patch, got "
                             f"{tuple(hidden.shape)}")
        return torch.where(hidden[..., None] != 0, self.encoder.mask_token[0, 0], tokens)

    def encode(self, tokens):
        """[B,h,w,width] -> (map [B,H_i,W_i,C_i] of every stage, the last one normalised)."""
        maps = []
        for stage in self.encoder.layers:
            for block in stage.blocks:
                tokens = block(tokens)
            maps.append(tokens)
            if hasattr(stage, "downsample"):
                tokens = stage.downsample(tokens)
        return maps, self.encoder.norm(maps[-1])

    def decode(self, name, final):
        """[B,h,w,C] -> the normalised pixels [B,bands,h*stride,w*stride] of a sensor; times std plus mean: its unit
        (of heights, above the image's median)."""
        return self.decoders[name](final.permute(0, 3, 1, 2))

    def prepare(self, name, sensor):
        """Fill in absent masks, check the shapes, normalise, resize. Returns image [B,T,C,S,S], measured [B,T]."""
        rule, image, side = self.contract["sensors"][name], sensor["image"], self.architecture["img_size"]
        if image.ndim != 5 or image.shape[2] != len(rule["bands"]):
            raise ValueError(f"{name}: image must be [B,T,{len(rule['bands'])},H,W] with bands {rule['bands']} in "
                             f"{rule['unit']}, got {tuple(image.shape)}")
        b, t, c, height, width = image.shape
        image = image.to(next(self.parameters()))
        masks = {"valid": (b, t, height, width), "bands": (b, t, c)}
        for key, shape in masks.items():
            if key in sensor and sensor[key].shape != shape:
                raise ValueError(f"{name}: {key} must be {shape}, got {tuple(sensor[key].shape)}")
        valid, bands = (sensor.get(key, image.new_ones(shape)).to(image) for key, shape in masks.items())
        mean, std = (image.new_tensor(rule[key])[:, None, None] for key in ("mean", "std"))
        use = (valid > 0)[:, :, None] & (bands > 0)[..., None, None]
        if "datum" in rule:  # heights above the lower median of the image's pixels
            ordered = torch.where(use, image, torch.inf).flatten(3).sort(-1).values
            count = use.flatten(3).sum(-1, keepdim=True)
            middle = ordered.gather(-1, (count - 1).clamp(min=0) // 2)
            image = image - torch.where(count > 0, middle, 0.0)[..., None]
        image = torch.where(use, (image - mean) / std, 0.0)
        if (height, width) != (side, side):
            image = F.interpolate(image.flatten(0, 1), size=(side, side), mode="bilinear", align_corners=False,
                                  antialias=True).unflatten(0, (b, t))
        return image, use.flatten(2).any(2).to(image.dtype)

    def forward(self, inputs):
        """inputs: see the top of the file. Returns, by sensor: maps [B,T,D,h,w], the last normalised one; stages, a
        list of [B,T,C_i,h_i,w_i] before every merging; mask [B,T], 1 where anything was measured; pixels {sensor:
        [B,T,C,S,S]}, the normalised reconstruction by every decoder."""
        if not inputs or set(inputs) - set(self.contract["sensors"]):
            raise ValueError(f"sensors {list(inputs)} given; the model takes any of {list(self.contract['sensors'])}")
        out = {"maps": {}, "stages": {}, "mask": {}, "pixels": {}}
        for name, sensor in inputs.items():
            image, out["mask"][name] = self.prepare(name, sensor)
            hidden, lead = sensor.get("hidden"), image.shape[:2]
            tokens = self.embed(name, image.flatten(0, 1), None if hidden is None else hidden.flatten(0, 1))
            stages, final = self.encode(tokens)
            out["stages"][name] = [m.permute(0, 3, 1, 2).unflatten(0, lead) for m in stages]
            out["maps"][name] = final.permute(0, 3, 1, 2).unflatten(0, lead)
            out["pixels"][name] = {key: self.decode(key, final).unflatten(0, lead) for key in self.decoders}
        return out


class MsGFM(MsGFMParts, nn.Module):
    def __init__(self, config):  # the content of config.json
        super().__init__()
        self.build(config["architecture"], config["input_contract"])


if importlib.util.find_spec("transformers") is not None:
    from transformers import PretrainedConfig, PreTrainedModel

    class MsGFMConfig(PretrainedConfig):
        model_type = "msgfm"

        def __init__(self, architecture=None, input_contract=None, **kwargs):
            self.architecture, self.input_contract = architecture, input_contract
            super().__init__(**kwargs)

    class MsGFMModel(MsGFMParts, PreTrainedModel):
        config_class, main_input_name = MsGFMConfig, "inputs"

        def __init__(self, config):
            super().__init__(config)
            self.build(config.architecture, config.input_contract)
            self.post_init()

        def _init_weights(self, module):
            """Weights come from the folder."""


def load(folder="."):
    """The model of an exported folder in eval mode. Strict: a missing, unexpected or misshapen tensor is an error."""
    folder = pathlib.Path(folder)
    model = MsGFM(json.loads((folder / "config.json").read_text()))
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True, assign=True)
    return model.eval()


@torch.no_grad()
def check(folder="."):
    """Run the frozen batch; returns {output: relative L2 against the stored one}."""
    stored, inputs = load_file(pathlib.Path(folder) / "parity.safetensors"), {}
    for kind, *path in (key.split(".") for key in stored):
        if kind == "input":
            inputs.setdefault(path[0], {})[path[1]] = stored[".".join((kind, *path))]
    differences, outputs = {}, load(folder)(inputs)
    for key in (k for k in stored if k.startswith("output.")):
        got, value = outputs, stored[key]
        for step in key.split(".")[1:]:
            got = got[int(step)] if isinstance(got, list) else got[step]
        differences[key] = float((got - value).double().norm() / value.double().norm().clamp(min=1e-30))
    return differences


if __name__ == "__main__":
    where = sys.argv[1] if len(sys.argv) > 1 else str(pathlib.Path(__file__).parent)
    limit = json.loads((pathlib.Path(where) / "config.json").read_text())["parity"]["tolerance_rel_l2"]
    result = check(where)
    for name, difference in sorted(result.items()):
        print(f"{name:32s} relative L2 {difference:.2e}  {'ok' if difference <= limit else 'DIFFERS'}")
    sys.exit(0 if all(difference <= limit for difference in result.values()) else 1)
