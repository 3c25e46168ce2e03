"""What is exported: the networks of a model as modules with named inputs and outputs.

B batch, S tokens of the text, H W height and width of the latents.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sd.config import ModelConfig
from sd.text.tokenizer import END, START


def sizes(batch: int, sequence: int, height: int, width: int, factor: int) -> dict[str, int]:
    """What the names in shapes stand for."""
    image = {"image_height": factor * height, "image_width": factor * width}
    return {"batch": batch, "sequence": sequence, "height": height, "width": width, **image}


Draw = Callable[[tuple[int, ...], torch.Generator], Tensor]


class Call(nn.Module):
    """A network's method as a module of its own, since a module is what can be exported.

    names  of the arguments that become inputs, in order
    fixed  arguments that are the same in every call
    """

    def __init__(self, network: nn.Module, names: tuple[str, ...], method: str, fixed: dict[str, object]):
        super().__init__()
        self.network, self.names, self.method, self.fixed = network, names, method, fixed

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        outputs = getattr(self.network, self.method)(**dict(zip(self.names, values, strict=True)), **self.fixed)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return tuple(output for output in outputs if output is not None)


def normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


@dataclass(frozen=True, kw_only=True)
class Input:
    """One input: its shape, in which names stand for sizes that may differ from call to call, and values to try."""

    shape: tuple[int | str, ...]
    draw: Draw = normal

    def example(self, sizes: dict[str, int], generator: torch.Generator) -> Tensor:
        return self.draw(tuple(sizes.get(side, side) for side in self.shape), generator)


@dataclass(frozen=True, kw_only=True)
class Graph:
    """One file of an export: a method of a network."""

    name: str  # of the file, without its ending
    part: str  # the network whose weights it needs, by the name that our files use
    method: str = "forward"
    inputs: dict[str, Input]  # by the names of the method's arguments
    outputs: tuple[str, ...]
    fixed: dict[str, object] = field(default_factory=dict)  # other arguments

    def call(self, network: nn.Module) -> Call:
        return Call(network, tuple(self.inputs), self.method, self.fixed).eval()

    def examples(self, sizes: dict[str, int], seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator("cpu").manual_seed(seed)
        return tuple(each.example(sizes, generator) for each in self.inputs.values())


def graphs_of(config: ModelConfig, clip_skip: int = 1) -> list[Graph]:
    """Every file of a model's export, in the order in which a picture needs them.

    clip_skip  which layer the text encoders give: 1 the last, 2 the one before it; XL's towers never give the last
    """
    text_encoders = [name for name in ("text_encoder", "text_encoder_2") if getattr(config, name)]
    graphs = [_text_encoder(config, name, clip_skip) for name in text_encoders]
    if config.depth:
        side = config.depth.native_size
        image = Input(shape=("batch", config.vae.image_channels, side, side), draw=picture)
        graphs.append(Graph(name="depth", part="depth_network", inputs={"image": image}, outputs=("depth",)))
    return [*graphs, _unet(config), *_vae(config)]


def _text_encoder(config: ModelConfig, name: str, clip_skip: int) -> Graph:
    encoder = getattr(config, name)

    def prompt(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Rows of words between the start and the end token, then padding."""
        rows = torch.randint(START, shape, generator=generator, dtype=torch.int64, device="cpu")
        rows[:, 0], rows[:, -1] = START, encoder.pad_token
        rows[:, shape[1] // 2] = END
        return rows

    is_tower = encoder.skipped_layers > 0
    return Graph(
        name=name,
        part=name,
        method="encode" if is_tower else "forward",
        inputs={"tokens": Input(shape=("batch", encoder.context_length), draw=prompt)},
        outputs=("context", "pooled") if encoder.pooled_width else ("context",),
        fixed={"skip_layers": clip_skip - 1},
    )


def _unet(config: ModelConfig) -> Graph:
    unet, last = config.unet, config.schedule.timesteps - 1

    def timesteps(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return last * torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")

    inputs = {
        "x_t": Input(shape=("batch", unet.in_channels, "height", "width")),
        "timestep": Input(shape=("batch",), draw=timesteps),
        "context": Input(shape=("batch", "sequence", unet.context_width)),
    }
    if unet.vector_width:
        inputs["vector"] = Input(shape=("batch", unet.vector_width))
    if unet.guidance_width:
        inputs["guidance"] = Input(shape=("batch", unet.guidance_width))
    return Graph(name="unet", part="unet", inputs=inputs, outputs=("prediction",))


def _vae(config: ModelConfig) -> list[Graph]:
    vae = config.vae

    def latents(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """As the decoder gets them: the scale that gives them unit variance is undone."""
        return normal(shape, generator) / vae.latent_scale

    pixels = ("batch", vae.image_channels, "image_height", "image_width")
    return [
        Graph(
            name="vae_decoder",
            part="vae",
            method="decode",
            inputs={"latents": Input(shape=("batch", vae.latent_channels, "height", "width"), draw=latents)},
            outputs=("image",),
        ),
        Graph(
            name="vae_encoder",
            part="vae",
            method="encode",
            inputs={"image": Input(shape=pixels, draw=picture)},
            outputs=("mean", "logvar"),
        ),
    ]


def picture(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return 2 * torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu") - 1
