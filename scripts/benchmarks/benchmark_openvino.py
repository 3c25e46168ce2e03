"""OpenVINO as a contender of `benchmark.py`."""

import json
from collections.abc import Callable
from pathlib import Path

from benchmark_contender import Contender, Options
from benchmark_diffusers import Diffusers


class OpenVINO(Diffusers):
    """The three networks compiled by OpenVINO for one size, with the tokenizer and the scheduler of diffusers."""

    own_precision = None
    unet = "unet"  # the name of its file
    decoder = "vae_decoder"

    @classmethod
    def files(cls, options: Options) -> list[str]:
        return [*super().files(options), options.openvino, *map(str, cls.networks_in(options).values())]

    @classmethod
    def networks_in(cls, options: Options) -> dict[str, Path]:
        """The file of each network."""
        names = {"text_encoder": "text_encoder", "unet": cls.unet, "vae_decoder": cls.decoder}
        return {part: Path(options.openvino) / f"{name}.xml" for part, name in names.items()}

    def imports(self) -> None:
        Contender.imports(self)
        import openvino
        from diffusers import DDIMScheduler
        from diffusers.image_processor import VaeImageProcessor
        from transformers import CLIPTokenizer

        self.openvino, self.scheduler_class, self.tokenizer_class = openvino, DDIMScheduler, CLIPTokenizer
        self.processor = VaeImageProcessor()
        self.dtype = self.torch.float32  # of inputs and outputs; inside, networks use the requested precision

    def load(self) -> None:
        folder = Path(self.options.folder)
        self.core = self.openvino.Core()
        self.networks = {part: self.core.read_model(file) for part, file in self.networks_in(self.options).items()}
        self.scheduler = self.scheduler_class.from_config(
            self.scheduler_class.load_config(folder / "scheduler", local_files_only=True)
        )
        names = sorted(path.name for path in folder.glob("tokenizer*"))  # XL has two, which pad differently
        self.tokenizers = [self.tokenizer_class.from_pretrained(folder / name, local_files_only=True) for name in names]
        self.scale = json.loads((folder / "vae" / "config.json").read_text())["scaling_factor"]

    def prepare(self, width: int, height: int, batch_size: int) -> None:
        latents = [4, height // 8, width // 8]
        rows = batch_size * len(self.way.texts)
        context = json.loads((Path(self.options.folder) / "unet" / "config.json").read_text())["cross_attention_dim"]
        shapes = {
            "text_encoder": [[rows, 77]] * len(self.tokenizers),
            "unet": [[rows, *latents], [], [rows, 77, context]],
            "vae_decoder": [[batch_size, *latents]],
        }
        hints = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}[self.options.precision],
        }
        if self.options.threads:
            hints["INFERENCE_NUM_THREADS"] = self.options.threads
        if len(self.tokenizers) == 2:
            pooled = self.networks["text_encoder"].outputs[1].partial_shape[1].get_length()
            shapes["unet"] += [[rows, pooled], [rows, 6]]
        self.ready = {}
        for part, network in self.networks.items():
            network.reshape(dict(enumerate(shapes[part])))
            self.ready[part] = self.core.compile_model(network, "CPU", hints)
        super().prepare(width, height, batch_size)

    def answers(self, part: str, *inputs) -> list:
        return [self.torch.from_numpy(each) for each in self.ready[part]([x.numpy() for x in inputs]).to_tuple()]

    def encode_text(self) -> tuple:
        texts = [text for text in self.way.texts for _ in range(self.batch_size)]
        options = {"padding": "max_length", "max_length": 77, "truncation": True, "return_tensors": "pt"}
        context, *pooled = self.answers("text_encoder", *(read(texts, **options).input_ids for read in self.tokenizers))
        if pooled and "" in texts:
            context[: self.batch_size] = pooled[0][: self.batch_size] = 0  # as XL's pipeline has an empty prompt
        return context, *(self.with_sizes(each) for each in pooled)

    def predict(self, x, timestep, context, vector=()):
        return self.answers("unet", x, timestep, context, *vector)[0]

    def decode(self) -> list:
        return self.processor.postprocess(self.answers("vae_decoder", self.latest / self.scale)[0], output_type="pil")

    def denoised(self, steps: int):
        self.context = self.encode_text()
        self.begin(steps)
        for _ in range(steps):
            self.step()
        latents = self.latest
        self.begin(self.way.endless)
        return latents

    def pictures(self, steps: int) -> list:
        self.latest = self.denoised(steps)
        return self.decode()

    def versions(self) -> dict[str, object]:
        return {"openvino": self.openvino.__version__, **super().versions()}


def save_whole(model, path: Path) -> None:
    """Write a network as a pair of files under their names once they are complete: NAME.bin and NAME.xml."""
    import openvino

    unfinished = path.with_name(f"{path.stem}.unfinished.xml")
    openvino.save_model(model, unfinished, compress_to_fp16=False)
    for suffix in (".bin", ".xml"):
        unfinished.with_suffix(suffix).replace(path.with_suffix(suffix))


def export_to_openvino(options: Options, folder: Path) -> None:
    """Write the networks of the diffusers folder in OpenVINO's form, for any size.

    Weights keep the precision that they have there: with two bytes each, large models fit into memory.
    """
    import openvino
    import torch
    from diffusers import DiffusionPipeline
    from openvino.frontend.pytorch import patch_model

    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[options.file_precision]
    pipe = DiffusionPipeline.from_pretrained(options.folder, local_files_only=True, torch_dtype=dtype)
    encoders = [getattr(pipe, name) for name in ("text_encoder", "text_encoder_2") if getattr(pipe, name, None)]

    class Only(torch.nn.Module):
        """What is called of a network."""

        def __init__(self, call: Callable, *networks: torch.nn.Module):
            super().__init__()
            self.networks, self.call = torch.nn.ModuleList(networks), call

        def forward(self, *inputs):
            return self.call(*inputs)

    def read(*tokens):
        if len(encoders) == 1:
            return encoders[0](tokens[0])[0]
        told = [encoder(ids, output_hidden_states=True) for encoder, ids in zip(encoders, tokens, strict=True)]
        return torch.cat([each.hidden_states[-2] for each in told], dim=-1).float(), told[1][0].float()

    def predict(x, t, context, pooled=None, sizes=None):
        vector = None if pooled is None else {"text_embeds": pooled, "time_ids": sizes}
        return pipe.unet(x, t, context, added_cond_kwargs=vector, return_dict=False)[0]

    tokens, latents = torch.zeros(2, 77, dtype=torch.int64), torch.zeros(2, 4, 16, 16)
    vector = ()
    if len(encoders) == 2:
        vector = torch.zeros(2, encoders[1].config.projection_dim), torch.zeros(2, 6)
    context = torch.zeros(2, 77, pipe.unet.config.cross_attention_dim)
    wanted = {
        "text_encoder": (Only(read, *encoders), (tokens,) * len(encoders)),
        "unet": (Only(predict, pipe.unet), (latents, torch.tensor(1), context, *vector)),
        "vae_decoder": (Only(lambda x: pipe.vae.decode(x, return_dict=False)[0], pipe.vae), (latents,)),
    }
    for part, (network, example) in wanted.items():
        if dtype != torch.float32:
            patch_model.__make_16bit_traceable(network)
        with torch.no_grad():
            model = openvino.convert_model(network, example_input=example)
        save_whole(model, folder / f"{part}.xml")
